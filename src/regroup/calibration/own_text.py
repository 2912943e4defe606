"""Calibration text that the original model writes itself: sampled, kept in a file, and read from it.

What is calibrated on always comes from the file: the one that a converted model keeps reproduces its conversion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.writer import write_text
from ..data.text import longest_window
from ..errors import RegroupError
from ..families import family_for, is_encoder_decoder
from ..families.reading import slow_output
from ..files import parse_json
from ..generation import Sampler, open_sampler
from ..generation.degenerate import refuse_degenerate
from ..modeling import load_tokenizer
from ..modeling.lm_head import require_head_of
from ..plans import CalibrationText

# Tokens of a target: at most, and about how many for a number of pairs.
_TARGET, MEAN_TARGET = 128, 16
# Pairs that are sampled between looks at how many tokens there are: part of what is sampled, whatever a batch holds.
_ROUND = 32


@dataclass(frozen=True)
class SelfWrittenIds:
    """Token ids that the model wrote.

    Attributes:
        windows: of a decoder-only model, each of one length.
        pairs: source and target of an encoder-decoder.
    """

    windows: list[list[int]] = field(default_factory=list)
    pairs: list[tuple[list[int], list[int]]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the windows, or of the targets."""
        return sum(map(len, self.windows)) + sum(len(target) for _, target in self.pairs)


def obstacle(config: dict[str, Any]) -> str | None:
    """Why a model cannot be calibrated on text of its own, or None, from its config alone."""
    family = family_for(config)
    if family is not None and family.speech:
        return "a speech model needs audio to write text"
    if slow_output(config, family):
        return "calibration solves output projections, and transformers leaves out their biases here (slow_but_exact)"
    try:
        require_head_of(config, "config.json")
    except RegroupError as error:
        return error.what
    return None


def own_sizes(text: CalibrationText, config: dict[str, Any]) -> tuple[int, int]:
    """Windows and tokens per window that the model is to write; for pairs about how many, and tokens per target.

    Raises:
        RegroupError: that is too little for one batch to fit and one to hold out.
    """
    limit = longest_window(config)
    if is_encoder_decoder(config):
        length = min(_TARGET, limit or _TARGET)
        return max(1, text.own_tokens // MEAN_TARGET), length
    length = min(text.window, limit or text.window)
    count, batch = max(1, text.own_tokens // length), text.batch_size(pairs=False)
    if text.data is None and count < 2 * batch:
        raise RegroupError(
            "there is too little calibration text",
            expected=f"at least two batches of {batch} windows of {length} tokens",
            got=f"{text.own_tokens} tokens",
            remedy="raise self:TOKENS, or a smaller --calibration-window or --calibration-batch",
        )
    return count, length


def write_own_text(
    text: CalibrationText,
    folder: Path,
    config: dict[str, Any],
    path: Path,
    *,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Have the original model write calibration text, and keep it as JSON lines.

    Args:
        text: how much, with which seed.
        folder, config: of the original model.
        path: the file; it appears when it is complete. A line holds ``input_ids`` (for pairs of the source, with the
            target's as ``labels``) and, where there is a tokenizer, the same as text.
        device: where the model runs; by default a GPU where there is one.
        progress: called with the number of tokens just written.

    Raises:
        DegenerateTextError: what the model writes is no text.
        RegroupError: the model cannot be loaded.
    """
    count, length = own_sizes(text, config)
    pairs = is_encoder_decoder(config)
    sampler = open_sampler(
        folder, seed=text.seed, stream="calibration", start=text.start or "mixed", device=device, check=not pairs
    )
    if pairs:
        made = SelfWrittenIds(pairs=_pairs(sampler, text.own_tokens, 8 * count, length, progress))
    else:
        made = SelfWrittenIds(windows=sampler.windows(0, count, length, progress=progress).tolist())
    decode = _decoder(folder)
    rows = [{"input_ids": row, **decode(text=row)} for row in made.windows]
    rows += [
        {"input_ids": source, "labels": target, **decode(source=source, target=target)} for source, target in made.pairs
    ]
    part = path.with_name(path.name + ".part")
    write_text(part, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.replace(path)


def read_own_text(path: Path, *, pairs: bool) -> SelfWrittenIds | None:
    """What ``write_own_text`` kept; None where a file holds something else.

    Args:
        path: a file.
        pairs: whether the model is an encoder-decoder.

    Raises:
        RegroupError: the file begins as such a file and goes on otherwise, or is for the other kind of model.
    """
    found = SelfWrittenIds()
    if not path.is_file():
        return None  # a pipe can be read only once
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                if row is None and number == 1:
                    return None
                if row is None or (row[1] is not None) != pairs:
                    raise RegroupError(
                        "this is no calibration text of such a model",
                        file=path,
                        expected='"input_ids" and "labels"' if pairs else '"input_ids" alone',
                        got=f"line {number}: {line.strip()[:80]}",
                        remedy="give the file that was kept with this model's conversion",
                    )
                source, target = row
                if target is None:
                    found.windows.append(source)
                else:
                    found.pairs.append((source, target))
    except (OSError, UnicodeDecodeError):
        return None  # whoever reads it as text says what is wrong
    if len({len(window) for window in found.windows}) > 1:
        raise RegroupError("the windows of the calibration text differ in length", file=path)
    return found if found.windows or found.pairs else None


def _pairs(
    sampler: Sampler, tokens: int, most: int, length: int, progress: Callable[[int], None] | None
) -> list[tuple[list[int], list[int]]]:
    """Pairs with so many tokens in their targets; at most so many pairs, where answers are short."""
    made: list[tuple[list[int], list[int]]] = []
    written = 0
    while written < tokens and len(made) < most:
        found = sampler.pairs(len(made), _ROUND, length)
        count = sum(len(target) for _, target in found)
        made, written = made + found, written + count
        if progress is not None:
            progress(count)
    refuse_degenerate([target for _, target in made], sampler.vocabulary.ends)
    return made


def _decoder(folder: Path) -> Callable[..., dict[str, str]]:
    """From rows of ids by name to text by name; to nothing without a tokenizer."""
    try:
        tokenizer = load_tokenizer(folder)
    except RegroupError:
        return lambda **rows: {}
    return lambda **rows: {name: tokenizer.decode(ids) for name, ids in rows.items()}


def _row(line: str) -> tuple[list[int], list[int] | None] | None:
    try:
        data = parse_json(line.encode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or "input_ids" not in data:
        return None
    sides = [data["input_ids"], *([data["labels"]] if "labels" in data else [])]
    if not all(isinstance(side, list) and side and all(type(i) is int and i >= 0 for i in side) for side in sides):
        return None
    return sides[0], sides[1] if len(sides) == 2 else None
