"""Whether anything is learned: checked before the first step, and again after the last."""

from __future__ import annotations

from typing import Any

import torch

from ..data import IGNORED
from ..errors import RegroupError
from .objective import SpanCorruption
from .recipe import Recipe
from .stream import ExampleStream

# Examples that are looked at where the first step's hold nothing.
_LOOKED_AT = 1024
# Numbers of each weight that are remembered: every step changes all of a matrix, rows of embeddings apart.
_REMEMBERED = 1024


class NothingLearnedError(RegroupError):
    """A run that ended without having learned anything; nothing of it is kept."""


def check_enough(recipe: Recipe, stream: ExampleStream, tokenizer: Any) -> None:
    """Refuse data that end before the first step, or that hold no token to learn from.

    Args:
        recipe: with nothing left open.
        stream: at its beginning; it is left there.
        tokenizer: of the model. Tokens that mark beginnings, ends and padding are nothing to learn: texts that are
            empty leave such tokens alone.

    Raises:
        RegroupError: there are fewer examples than a step takes, over all passes; or no label is a token of text.
    """
    found = stream.take(recipe.batch_size)
    where = ", ".join(recipe.data)
    what = "pairs" if stream.objective.pairs else f"windows of {recipe.window} tokens"
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    marks = {getattr(tokenizer, name, None) for name in names} - {None}
    if isinstance(stream.objective, SpanCorruption):
        marks |= set(stream.objective.sentinels)

    def learned(examples: list[Any]) -> bool:
        for example in examples:
            labels = stream.objective.collate([example])["labels"]
            if set(labels[labels != IGNORED].tolist()) - marks:
                return True
        return False

    if not learned(found) and not learned(found := stream.take(_LOOKED_AT)):
        raise RegroupError(
            "there are no tokens to learn from",
            file=where,
            expected="text",
            got=f"nothing but marks of beginnings and ends, or masked labels, in the first {len(found)} {what}",
            remedy="see whether texts are empty or shorter than two tokens, and whether the column is the right one",
        )
    if len(found) < recipe.batch_size:
        raise RegroupError(
            "the data end before the first step",
            file=where,
            expected=f"at least {recipe.batch_size} {what}, which is one step",
            got=f"{len(found)} in {recipe.epochs} pass{'es' if recipe.epochs > 1 else ''} over the data",
            remedy="give more data, a smaller --batch-size"
            + ("" if stream.objective.pairs else ", a shorter --window")
            + ", or more epochs in the recipe",
        )


def sample(model: Any) -> list[torch.Tensor]:
    """Some numbers of every weight that is trained, as they are now."""
    return [p.detach().reshape(-1)[:_REMEMBERED].clone() for p in model.parameters() if p.requires_grad]


def check_changed(before: list[torch.Tensor], model: Any, steps: int) -> None:
    """Refuse the result of a training that changed nothing.

    Args:
        before: of ``sample``.
        model: after the training.
        steps: that were taken since.

    Raises:
        NothingLearnedError: every weight is what it was.
    """
    if steps and all(torch.equal(old, new) for old, new in zip(before, sample(model), strict=True)):
        raise NothingLearnedError(
            "the training changed no weight",
            got=f"{steps} step{'s' if steps > 1 else ''} without an effect",
            remedy="look at the learning rate and the labels; in float16 the first steps only find the scale of the "
            "loss: take more steps, or --dtype bfloat16. A teacher that is the model itself has nothing to teach",
        )
