"""A model's output head apart from its body, so that logits need not exist at all positions at once.

Over a vocabulary of 50,000 tokens the logits of 2,048 positions take 400 MB in float32, and their gradient as much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Head:
    """The last linear layer of a model and what the model does to its result.

    Attributes:
        linear: from the width of the model to the vocabulary.
        after: applied to logits, element by element: a bias, a scale, a cap.
        dtype: of the matrix product; None for that of the weights.
    """

    linear: nn.Linear
    after: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None

    def weight(self) -> Tensor:
        """(vocabulary, width) in the dtype of the product."""
        return self.linear.weight if self.dtype is None else self.linear.weight.to(self.dtype)

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """What the linear layer gives for inputs (n, width): (n, vocabulary)."""
        bias = self.linear.bias
        return functional.linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


@dataclass(frozen=True)
class Unprojected:
    """What stands for a model's logits: the input of its head.

    Attributes:
        hidden: (batch, length, width).
        head: of the model.
    """

    hidden: Tensor
    head: Head


@dataclass
class Tapped:
    """The input of a head in a forward pass, once that has run."""

    hidden: Tensor | None = None


@contextlib.contextmanager
def tapped(head: Head) -> Iterator[Tapped]:
    """Within the block a forward pass computes logits of each row's first position alone; what the head was given is
    in the value of the block, (batch, length, width)."""
    found = Tapped()

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.hidden = args[0]
        return (args[0][:, :1], *args[1:])

    handle = head.linear.register_forward_pre_hook(take)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def separate_head(model: Any, dtype: torch.dtype | None = None) -> Head | None:
    """The head of a model, or None where its logits are not a linear layer's with the operations that are known here.

    That is tried out: the model is run on a few tokens, and its logits have to be those of the head, bit for bit.

    Args:
        model: a transformers model, not wrapped.
        dtype: see ``Head``.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    head = Head(linear, _after(model))
    device = linear.weight.device
    tokens = (torch.arange(1, 7, device=device) * max(1, linear.out_features // 8))[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    training = model.training
    model.eval()
    try:
        whole = model(**inputs, use_cache=False).logits
        handle.remove()
        if len(seen) != 1 or seen[0].ndim != 3:
            return None
        own = head.after(head.product(seen[0], head.weight()))
        with tapped(head) as found:
            first = model(**inputs, use_cache=False).logits
        right = found.hidden is not None and first.shape[:2] == (1, 1) and torch.equal(found.hidden, seen[0])
        right = right and own.shape == whole.shape and torch.equal(own.to(whole.dtype), whole)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # a forward of another kind; all logits at once are always right
    finally:
        handle.remove()
        model.train(training)
    return Head(linear, head.after, dtype) if right else None


def _after(model: Any) -> Callable[[Tensor], Tensor]:
    """What families do with the result of the linear layer, by their configurations' names."""
    config = model.config.get_text_config(decoder=True)
    bias = getattr(model, "final_logits_bias", None)  # BART, Marian, Pegasus
    factor = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def after(logits: Tensor) -> Tensor:
        if bias is not None:
            logits = logits + bias.to(logits.device)
        if factor is not None:
            logits = logits * factor
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return after
