"""Muon for matrices with AdamW for the rest, and rates of their own for the attention of converted layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

# PyTorch has it from version 2.9 on.
HAS_MUON = hasattr(torch.optim, "Muon")
MUON = "muon"


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` as one optimizer, with one state to save and one schedule.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the
    nearest matrix with orthogonal rows or columns, so that all directions of a layer are learned at the same rate. Its
    update is scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2): 0.2 · √max(rows, columns).

    Args:
        matrices: parameter groups for Muon; every parameter has two dimensions.
        others: parameter groups for AdamW.
        betas: of AdamW.
        weight_decay: of both, unless a group has its own.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        # Each fills up its own groups, which are then the groups of this one.
        self._parts: dict[str, Any] = {}
        if matrices:
            self._parts[MUON] = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        if others:
            self._parts["adamw"] = AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)
        groups = [{**group, "part": name} for name, part in self._parts.items() for group in part.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # Loading a state and the schedule put others in their place.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.step()
        return loss


def attention_matrices(model: Any, modules: Collection[str]) -> set[int]:
    """The matrices of query, key, value and output of some attention layers, as the ``id`` of their parameters.

    Args:
        model: a transformers model.
        modules: paths of attention modules below the base model, as ``AttentionLayer.module`` has them. Whether a
            module has one matrix for each projection or one for several makes no difference: all are attention's.
    """
    return {
        id(parameter)
        for path in modules
        for parameter in model.base_model.get_submodule(path).parameters()
        if parameter.ndim == 2
    }


def make_optimizer(
    model: Any,
    *,
    muon: bool,
    rate: float,
    attention: Collection[str],
    attention_rate: float,
    adamw_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    decayed: Collection[str],
) -> MuonAdamW:
    """The optimizer of a model, in groups that differ in their rates.

    Args:
        model: a transformers model; parameters that are not trained get no state.
        muon: train the matrices of linear layers with Muon. AdamW keeps what is looked up (embeddings), the output
            over the vocabulary, norms, biases, and tensors of more than two dimensions.
        rate: of matrices.
        attention: see ``attention_matrices``; their rate is ``attention_rate`` times the others'.
        attention_rate: see there.
        adamw_rate: how many times ``rate`` AdamW takes where Muon is used.
        betas, weight_decay: see ``MuonAdamW``.
        decayed: names of the parameters that decay.
    """
    faster = attention_matrices(model, attention)
    wide = {id(weight) for weight in _matrices(model)} if muon else set()
    groups: dict[tuple[bool, bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (id(parameter) in wide, id(parameter) in faster, name in decayed)
            groups.setdefault(key, []).append(parameter)
    made: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    # The first group is the one whose rate is logged: that of the most weights.
    for (is_wide, is_faster, decays), parameters in sorted(groups.items(), key=lambda item: item[0][1]):
        own = rate * (attention_rate if is_faster else 1.0) * (adamw_rate if muon and not is_wide else 1.0)
        made[is_wide].append({"params": parameters, "lr": own, "weight_decay": weight_decay if decays else 0.0})
    return MuonAdamW(made[True], made[False], betas=betas)


def _matrices(model: Any) -> Iterator[nn.Parameter]:
    """Weights of linear layers, the output over the vocabulary apart."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        tables.add(id(head.weight))
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tables:
            yield cast(nn.Parameter, module.weight)
