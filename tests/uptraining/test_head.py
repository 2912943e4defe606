"""Logits a chunk at a time: the head apart from its model, and the loss through it against the loss of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from regroup.uptraining.distill import Mix, mixed_loss, top_k
from regroup.uptraining.head import Head, Unprojected, separate_head, tapped
from regroup.uptraining.objective import IGNORED

V, WIDTH = 11, 6


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt2", "opt", "t5", "bart", "marian"])
def test_the_head_of_a_family_gives_its_logits(name: str) -> None:
    model: Any = tiny.build(name)
    inputs = tiny.inputs(name, 2, 5)
    head = separate_head(model)
    assert head is not None
    whole = model(**inputs).logits
    with tapped(head) as found:
        first = model(**inputs).logits
    assert first.shape[:2] == (2, 1)
    assert found.hidden is not None
    torch.testing.assert_close(head.after(head.product(found.hidden, head.weight())), whole)
    # Nothing is left behind.
    assert torch.equal(model(**inputs).logits, whole)


def test_a_head_with_something_unknown_behind_it_is_not_taken_apart() -> None:
    model: Any = tiny.build("llama")
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits + 1e-3 * outputs.logits.square()
        return outputs

    assert separate_head(model) is not None
    model.forward = other
    assert separate_head(model) is None
    model.forward = forward
    model.lm_head = nn.Sequential(model.lm_head)
    assert separate_head(model) is None


def case(bias: bool, cap: float | None) -> tuple[Tensor, Head, Tensor, Head, Tensor]:
    """Hidden states and heads of a student and a teacher in float64, and targets of which some are ignored."""
    torch.manual_seed(0)

    def after(logits: Tensor) -> Tensor:
        return logits if cap is None else torch.tanh(logits / cap) * cap

    own, other = (Head(nn.Linear(WIDTH, V, bias=bias, dtype=torch.float64), after) for _ in range(2))
    hidden, theirs = (torch.randn(2, 7, WIDTH, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, V, (2, 7))
    targets[0, :3] = IGNORED
    return hidden.requires_grad_(), own, theirs, other, targets


@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, 3.0)])
@pytest.mark.parametrize("kind", ["logits", "hidden", "top-k", "none"])
@pytest.mark.parametrize("mix", [Mix(0.0), Mix(0.3, 2.5), Mix(1.0)])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_the_loss_through_a_head_is_that_of_all_logits(
    bias: bool, cap: float | None, kind: str, mix: Mix, chunk: int
) -> None:
    hidden, own, theirs, other, targets = case(bias, cap)
    logits, teacher = (head.after(head.linear(x)) for x, head in ((hidden, own), (theirs, other)))
    known = top_k(teacher, targets, 3, mix.temperature)
    given: Any = {"logits": teacher, "hidden": Unprojected(theirs, other), "top-k": known, "none": None}[kind]
    if kind == "top-k":
        found = top_k(Unprojected(theirs, other), targets, 3, mix.temperature, chunk=4)
        assert torch.equal(found.ids, known.ids)
        torch.testing.assert_close(found.log_q, known.log_q)
    plain: Any = {"hidden": teacher.detach(), "logits": teacher.detach()}.get(kind, given)
    parameters = [hidden, *own.linear.parameters()]
    wanted = mixed_loss(logits, targets, teacher=plain, mix=mix)
    right = torch.autograd.grad(2 * wanted[0], parameters)
    found_loss = mixed_loss(Unprojected(hidden, own), targets, teacher=given, mix=mix, chunk=chunk)
    torch.testing.assert_close(found_loss, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(2 * found_loss[0], parameters)
    torch.testing.assert_close(gradients, right, rtol=1e-11, atol=1e-12)


def test_the_gradient_through_a_head_is_a_gradient() -> None:
    hidden, own, theirs, other, targets = case(True, 3.0)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        linear = nn.Linear(WIDTH, V, dtype=torch.float64)
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
        left, right = Unprojected(x, Head(linear, own.after)), Unprojected(theirs, other)
        return mixed_loss(left, targets, teacher=right, mix=Mix(0.4, 1.5), chunk=4)[0]

    class Anew(torch.autograd.Function):
        """The loss, computed anew for each backward pass: gradcheck runs many, and a gradient is used once."""

        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> Tensor:
            ctx.save_for_backward(*given)
            return loss(*given)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(loss(*given), given, grads)

    parameters = (hidden, *(p.detach().requires_grad_() for p in own.linear.parameters()))
    assert torch.autograd.gradcheck(Anew.apply, parameters)


def test_a_gradient_is_used_once() -> None:
    hidden, own, theirs, other, targets = case(True, 3.0)
    found = mixed_loss(Unprojected(hidden, own), targets, teacher=Unprojected(theirs, other), mix=Mix(0.4))[0]
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        found.backward()
