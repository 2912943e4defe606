"""The loss of uptraining: cross-entropy, KL to the original model's logits, the distance from its hidden states.

Hinton et al. 2015 (arXiv:1503.02531, section 2): both softmaxes are taken at a temperature T, and their KL is
multiplied by T², which keeps its gradients on the scale of cross-entropy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head import Head, Unprojected
from .objective import IGNORED

# Elements of float32 that one chunk's softmax may take: 64 MB, of which a handful are alive at once.
CHUNK_ELEMENTS = 1 << 24
_FEWEST = 128
# Below every log-probability that matters, above float16's lowest number.
_LOWEST = -60_000.0
_SMALLEST = 1e-12


@dataclass(frozen=True)
class TopK:
    """A distribution over a vocabulary, of which k tokens are kept apart and the rest is one bucket.

    Attributes:
        ids: (N, k) int64, the k most likely tokens of each of N positions.
        log_q: (N, k + 1) log-probabilities of those, and last of all others together.
    """

    ids: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class Mix:
    """What is minimised: ``(1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student)`` at temperature T."""

    weight: float = 0.0
    temperature: float = 1.0


def aligned_targets(labels: Tensor, *, shifted: bool) -> Tensor:
    """For each position of the logits the token that they should predict, (batch, length).

    ``shifted`` says that labels are the inputs themselves, as causal models have them, so that position i predicts
    label i + 1. Labels of an encoder-decoder are aligned already.
    """
    if not shifted:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def mixed_loss(
    logits: Tensor | Unprojected,
    targets: Tensor,
    *,
    teacher: Tensor | Unprojected | TopK | None = None,
    mix: Mix | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the positions that carry loss.

    Softmaxes are computed in float32 (float64 if the logits are), ``chunk`` positions at a time; the gradient is
    computed along with the loss. So no copy of all logits in float32 is made. Where the input of a head is given in
    place of logits, these are computed a chunk at a time, too, and never exist for all positions; the gradient of the
    head's weight is summed in float32.

    Args:
        logits: (batch, length, vocabulary) of the student, or what stands for them.
        targets: (batch, length) int64, ``IGNORED`` where there is no target (see ``aligned_targets``).
        teacher: its logits, (batch, length, vocabulary) in any dtype, or what stands for them, or their ``TopK`` at the
            positions that carry loss, in the order of ``targets.flatten()``; None where the weight is 0.
        mix: cross-entropy alone by default.
        chunk: positions at a time; 0 for as many as ``CHUNK_ELEMENTS`` allows.

    Returns:
        Scalars in float32 (float64): the loss, differentiable in ``logits`` or in the head's input and parameters; the
        cross-entropy; the KL at the temperature, not multiplied by T² (0 without a teacher). The latter two have no
        gradient.
    """
    wanted = targets.flatten()
    rows = (wanted != IGNORED).nonzero().squeeze(1)
    rest = (wanted, rows, teacher, mix or Mix())
    if isinstance(logits, Unprojected):
        linear = logits.head.linear
        size = chunk or chunk_rows(2 * linear.out_features)
        hidden = logits.hidden.flatten(0, -2)
        return _ThroughHead.apply(hidden, linear.weight, linear.bias, logits.head, *rest, size)  # type: ignore[no-any-return]
    flat = logits.flatten(0, -2)
    return _Chunked.apply(flat, *rest, chunk or chunk_rows(flat.shape[-1]))  # type: ignore[no-any-return]


def chunk_rows(vocabulary: int) -> int:
    """Positions of a chunk: few enough for memory, but enough for a matrix product to be fast."""
    return max(_FEWEST, CHUNK_ELEMENTS // vocabulary)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, targets: Tensor, rows: Tensor, teacher: Any, mix: Mix, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(flat.dtype, torch.float32)
        sums = torch.zeros(3, dtype=wide, device=flat.device)
        gradient = torch.zeros_like(flat) if flat.requires_grad else None
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            with torch.enable_grad():
                x = flat[part].to(wide).requires_grad_(gradient is not None)
                loss, cross_entropy, kl = _rows_loss(x, targets[part], _teacher_rows(teacher, part, first, wide), mix)
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, x)[0].to(gradient.dtype)
            sums += torch.stack([loss.detach(), cross_entropy.detach(), kl.detach()])
        ctx.gradient = gradient
        loss, cross_entropy, kl = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of mixed_loss was used already")
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None, None, None


class _ThroughHead(torch.autograd.Function):
    """As ``_Chunked``, with the matrix product of the head in it; its gradients are computed along with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        rows: Tensor,
        teacher: Any,
        mix: Mix,
        size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = head.weight().detach()
        wide = torch.promote_types(matrix.dtype, torch.float32)
        sums = torch.zeros(3, dtype=wide, device=flat.device)
        wanted = (flat, weight, *([] if bias is None else [bias]))
        into = [torch.zeros_like(x, dtype=wide) if x.requires_grad else None for x in wanted]
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            inputs = flat.detach()[part].to(matrix.dtype)
            with torch.enable_grad():
                x = head.product(inputs, matrix).detach().requires_grad_(any(g is not None for g in into))
                logits = head.after(x)
            given = _teacher_rows(teacher, part, first, wide)
            loss, cross_entropy, kl, back = _rows_gradient(logits.detach().to(wide), targets[part], given, mix)
            if x.requires_grad:
                if logits is not x:
                    back = torch.autograd.grad(logits, x, back.to(logits.dtype))[0]
                _add_products(into, back.to(matrix.dtype), inputs, matrix, part)
            sums += torch.stack([loss, cross_entropy, kl])
        ctx.gradients = [g if g is None else g.to(x.dtype) for g, x in zip(into, wanted, strict=True)]
        loss, cross_entropy, kl = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of mixed_loss was used already")
        own = [None if gradient is None else gradient.mul_(grads[0].to(gradient.dtype)) for gradient in gradients]
        return (*own, *[None] * (9 - len(own)))


def _add_products(into: list[Tensor | None], back: Tensor, inputs: Tensor, matrix: Tensor, part: Tensor) -> None:
    """Add what a chunk gives to the gradients of a head's input, weight and bias.

    Args:
        into: those gradients, in float32; None where none is wanted.
        back: gradient of the product, (n, vocabulary).
        inputs, matrix: of the product.
        part: which rows of the input these are.
    """
    hidden, weight, *bias = into
    if hidden is not None:
        hidden[part] = (back @ matrix).to(hidden.dtype)
    if weight is not None and back.dtype == weight.dtype:
        weight.addmm_(back.T, inputs)
    elif weight is not None:
        weight += back.T @ inputs
    if bias and bias[0] is not None:
        bias[0] += back.sum(0, dtype=bias[0].dtype)


def _teacher_rows(teacher: Any, part: Tensor, first: int, wide: torch.dtype) -> Tensor | TopK | None:
    if isinstance(teacher, TopK):
        own = slice(first, first + len(part))
        return TopK(teacher.ids[own], teacher.log_q[own].to(wide))
    return None if teacher is None else logits_at(teacher, part).to(wide)


@torch.no_grad()
def logits_at(logits: Tensor | Unprojected, part: Tensor) -> Tensor:
    """Logits (n, vocabulary) at some positions, by their numbers in the flattened batch; without gradient."""
    if isinstance(logits, Unprojected):
        head = logits.head
        return head.after(head.product(logits.hidden.flatten(0, -2)[part], head.weight()))
    return logits.flatten(0, -2)[part]


def _rows_loss(x: Tensor, targets: Tensor, teacher: Tensor | TopK | None, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and KL of rows (n, vocabulary)."""
    log_p = x.log_softmax(-1)
    alone = teacher is None or mix.weight == 0
    # It is reported in any case; a gradient is needed only where it counts.
    with torch.set_grad_enabled((alone or mix.weight < 1) and x.requires_grad):
        cross_entropy = -log_p.gather(-1, targets.unsqueeze(-1)).sum()
    if alone:
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
    T = mix.temperature
    assert teacher is not None
    log_p = log_p if T == 1 else (x / T).log_softmax(-1)
    if isinstance(teacher, TopK):
        log_q, log_p = teacher.log_q, _coarse(log_p, teacher.ids)
    else:
        log_q = (teacher / T).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    loss = mix.weight * T**2 * kl
    return (loss if mix.weight == 1 else loss + (1 - mix.weight) * cross_entropy), cross_entropy, kl


def _rows_gradient(
    x: Tensor, targets: Tensor, teacher: Tensor | TopK | None, mix: Mix
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_rows_loss``, and the gradient in ``x``; by formulas where that saves memory: rows are long.

    The gradient of cross-entropy is p - 1 at the target and p elsewhere, that of T² · KL is T · (p - q), with the
    softmaxes p and q of student and teacher at the temperature.
    """
    if isinstance(teacher, TopK):
        with torch.enable_grad():
            x = x.requires_grad_()
            loss, cross_entropy, kl = _rows_loss(x, targets, teacher, mix)
        return loss.detach(), cross_entropy.detach(), kl.detach(), torch.autograd.grad(loss, x)[0]
    goal, T = targets.unsqueeze(-1), mix.temperature
    log_p = x.log_softmax(-1)
    cross_entropy = -log_p.gather(-1, goal).sum()
    if teacher is None or mix.weight == 0:
        gradient = log_p.exp_()
        gradient.scatter_add_(-1, goal, -torch.ones_like(gradient[:, :1]))
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy), gradient
    own = log_p if T == 1 else (x / T).log_softmax(-1)
    log_q = (teacher if T == 1 else teacher / T).log_softmax(-1)
    del x, teacher
    q = log_q.exp()
    kl = torch.linalg.vecdot(q, log_q.sub_(own)).sum()
    del log_q
    loss = mix.weight * T**2 * kl
    if mix.weight < 1:
        loss = loss + (1 - mix.weight) * cross_entropy
        plain = log_p.exp()
        plain.scatter_add_(-1, goal, -torch.ones_like(plain[:, :1]))
        gradient = own.exp_().sub_(q).mul_(mix.weight * T).add_(plain, alpha=1 - mix.weight)
    else:
        gradient = own.exp_().sub_(q).mul_(mix.weight * T)
    return loss, cross_entropy, kl, gradient


def _coarse(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (n, k + 1) of the tokens ``ids`` and of all others together."""
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), others], dim=-1).clamp(min=_LOWEST)


@torch.no_grad()
def top_k(logits: Tensor | Unprojected, targets: Tensor, k: int, temperature: float = 1.0, chunk: int = 0) -> TopK:
    """The teacher's k most likely tokens at the positions that carry loss, and the rest as one bucket.

    The KL over these k + 1 outcomes is that of a coarser distribution, so it is never above the whole KL.

    Args:
        logits: (batch, length, vocabulary), or what stands for them.
        targets: (batch, length), see ``mixed_loss``.
        k: below the vocabulary.
        temperature: of the softmax.
        chunk: see ``mixed_loss``.
    """
    vocabulary = logits.head.linear.out_features if isinstance(logits, Unprojected) else logits.shape[-1]
    assert 0 < k < vocabulary
    rows = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    ids, values = [], []
    for part in rows.split(chunk or chunk_rows(vocabulary)):
        found = logits_at(logits, part)
        log_q = (found.to(torch.promote_types(found.dtype, torch.float32)) / temperature).log_softmax(-1)
        best = log_q.topk(k).indices
        ids.append(best)
        values.append(_coarse(log_q, best))
    return TopK(torch.cat(ids), torch.cat(values))


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Tensor) -> Tensor:
    """How far the student's hidden states are from the teacher's, summed over the positions that carry loss.

    At each position the mean over layers of ``‖s - t‖² / ‖t‖²``. Matching hidden states is FitNets' idea (Romero et al.
    2015, arXiv:1412.6550), for all layers of a transformer that of Jiao et al. 2020 (TinyBERT, arXiv:1909.10351,
    section 3.1). A converted model has the layers and the width of the original, so no map is needed. The distance is
    relative to the norm of each position, since a few positions (the first one) can be 1000 times as large as the rest.

    Args:
        student, teacher: after each layer, (batch, length, hidden) each, as many of one as of the other.
        targets: (batch, length), see ``mixed_loss``.

    Returns:
        A scalar in float32 (float64 for such states), differentiable in ``student``.
    """
    carry_loss = targets != IGNORED
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for own, wanted in zip(student, teacher, strict=True):
        right = wanted[carry_loss].to(total.dtype)
        distance = (own[carry_loss].to(total.dtype) - right).square().sum(-1)
        total = total + (distance / right.square().sum(-1).clamp(min=_SMALLEST)).sum()
    return total / len(student)


def layer_outputs(outputs: Any) -> tuple[Tensor, ...]:
    """Hidden states after each layer, of an encoder-decoder after those of its decoder, from a model's outputs."""
    found = getattr(outputs, "decoder_hidden_states", None)
    states = outputs.hidden_states if found is None else found
    return tuple(states[1:])
