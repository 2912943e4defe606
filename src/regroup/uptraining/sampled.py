"""The teacher as a writer of training data: what a recipe asks for, and the sampler behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RegroupError
from ..generation import open_sampler
from . import states
from .budget import parse_count
from .own_text import SELF, SampledWindows, is_own
from .recipe import Recipe

_HELD_OUT_STREAM, _STREAM = "evaluation", "uptraining"


def split_sources(recipe: Recipe) -> tuple[tuple[str, ...], int | None, bool]:
    """Sources that are read, tokens that the teacher writes (None for no end), and whether it writes any.

    Raises:
        RegroupError: no teacher, a number that cannot be read, or ``self`` twice.
    """
    own = [source for source in recipe.data if is_own(source)]
    if not own and not (recipe.held_out and is_own(recipe.held_out)):
        return recipe.data, None, False
    if recipe.teacher is None:
        raise RegroupError(
            "there is no teacher to write text",
            expected="a teacher, for data or held-out self",
            remedy="pass --teacher ORIGINAL",
        )
    if recipe.objective != "causal":
        raise RegroupError(
            "own text is written for decoders alone",
            expected="files of text or pairs",
            got=f"self, for the objective {recipe.objective}",
            remedy="give --data and --held-out files",
        )
    if len(own) > 1:
        raise RegroupError("own text is asked for twice", got=", ".join(own), remedy="name self once in --data")
    tokens = [parse_count(source.removeprefix(f"{SELF}:")) for source in own if source != SELF]
    return tuple(source for source in recipe.data if not is_own(source)), tokens[0] if tokens else None, bool(own)


def with_length(recipe: Recipe) -> Recipe:
    """The recipe with a number of tokens where it says only how many unique ones there are, and over how many passes.

    Raises:
        RegroupError: several passes over own text without an end.
    """
    given, tokens, own = split_sources(recipe)
    if recipe.unique_tokens is None and tokens is not None:
        # Given text is taken in turn with it.
        recipe = replace(recipe, unique_tokens=tokens * (2 if given else 1))
    if own and recipe.unique_tokens is None and recipe.epochs > 1:
        raise RegroupError(
            "own text has no end, so that there is no second pass over it",
            expected="the tokens of a pass, with several epochs",
            got="self",
            remedy="write --data self:262k, or set unique_tokens in the recipe",
        )
    if recipe.unique_tokens is not None and recipe.alpha is recipe.tokens is recipe.steps is None:
        recipe = replace(recipe, tokens=recipe.unique_tokens * recipe.epochs)
    return recipe


def windows_of(recipe: Recipe) -> int | None:
    """Windows of a pass, where the recipe bounds them."""
    return None if recipe.unique_tokens is None else max(1, recipe.unique_tokens // recipe.window)


def own_text(recipe: Recipe, teacher: Path | None) -> SampledWindows | None:
    """The training text that the teacher writes, or None."""
    _, _, own = split_sources(recipe)
    if not own or teacher is None:
        return None

    def sample(first: int, count: int) -> np.ndarray:
        return _sampled(recipe, teacher, _STREAM, first, count).numpy()

    return SampledWindows(sample, recipe.window, recipe.seed, recipe.output / states.OWN_FOLDER)


def held_out_examples(recipe: Recipe, teacher: Path) -> list[dict[str, Any]]:
    """Windows of another stream than those that are trained on, as examples."""
    windows = _sampled(recipe, teacher, _HELD_OUT_STREAM, 0, recipe.held_out_windows).numpy().astype(np.int32)
    return [{"ids": row, "starts": np.array([], np.int32)} for row in windows]


def _sampled(recipe: Recipe, teacher: Path, stream: str, first: int, count: int) -> torch.Tensor:
    # The sampler's model is not kept: it has a form of its own, and the training needs the memory.
    device = None if recipe.device is None else str(recipe.device)
    sampler = open_sampler(teacher, seed=recipe.seed, stream=stream, device=device)
    return sampler.windows(first, count, recipe.window)
