"""Calibration text as model inputs."""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from ..data import causal_batches, document_windows, pair_batches, read_pairs, read_texts, token_windows
from ..data.batches import check_vocabulary, id_batches
from ..data.text import check_window
from ..errors import RegroupError
from ..families import family_for, is_encoder_decoder
from ..families.reading import slow_output
from ..files import as_named
from ..modeling import load_tokenizer
from ..plans import OWN_TEXT_FILE, CalibrationText
from .own_text import MEAN_TARGET, SelfWrittenIds, own_sizes, read_own_text, write_own_text

# The command line's name for ``CalibrationText.window``.
_WINDOW = "--calibration-window"


Batches = list[dict[str, torch.Tensor]]


def calibration_batches(
    text: CalibrationText,
    folder: Path,
    config: dict[str, Any],
    *,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Batches:
    """Calibration text as model inputs: read and tokenised, written by the model itself, or both in turn.

    Args:
        text: what to read or to have written. What the model writes is in the file ``text.written``, or sampled here.
        folder: of the original model, for its tokenizer.
        config: of the original model.
        device, progress: for what is sampled here (see ``own_text.write_own_text``).

    Raises:
        DegenerateTextError: what the model writes is no text.
        RegroupError: a speech model, windows longer than its positions, no tokenizer, unreadable text, or too
            little for one batch to fit and one to hold out.
    """
    given, own = text.given, None
    read = [] if given is None else _given(given, folder, config, alone=not text.own)
    if text.own:
        own = _own(text, folder, config, device, progress)
    size = text.batch_size(pairs=is_encoder_decoder(config))
    batches = _mixed(read, [] if own is None else own, size)
    if len(batches) < 2:
        raise RegroupError(
            "there is too little calibration text",
            file=text.data,
            expected=f"at least two batches of {size}",
            got=f"{len(batches)}",
            remedy=f"raise --calibration-tokens, give more text, or a smaller {_WINDOW} or --calibration-batch",
        )
    return batches


def check_text(text: CalibrationText, folder: Path, config: dict[str, Any]) -> str:
    """Refuse what can be seen to be wrong before the model writes: too little text, or a given part of no use.

    Returns:
        A hash of what the model does not write; empty where it writes all.

    Raises:
        RegroupError: as ``calibration_batches``.
    """
    own_sizes(text, config)
    if text.given is None:
        return ""
    size = text.batch_size(pairs=is_encoder_decoder(config))
    return digest(_mixed(_given(text.given, folder, config, alone=False), [], size))


def digest(batches: Sequence[dict[str, torch.Tensor]]) -> str:
    """Hash of model inputs, whatever file or data set they were read from."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def _given(text: CalibrationText, folder: Path, config: dict[str, Any], *, alone: bool) -> Batches | torch.Tensor:
    """Windows (n, length) of a decoder-only model, or batches of pairs, that were there before.

    Args:
        alone: no other text is used; otherwise windows are as long as the model's own.
    """
    seq2seq, family = is_encoder_decoder(config), family_for(config)
    # Refuse what the config rules out before anything is read.
    if family is not None and family.speech:
        raise RegroupError("speech models cannot be calibrated on text", remedy="leave --calibration out")
    if slow_output(config, family):
        raise RegroupError(
            "calibration solves output projections, and transformers leaves out their biases here",
            file=folder / "config.json",
            got=f"slow_but_exact with pretraining_tp {config['pretraining_tp']}",
            remedy="leave --calibration out, or set slow_but_exact to false, which is another model: with the biases",
        )
    kept = None if text.data is None else read_own_text(as_named(text.data), pairs=seq2seq)
    if kept is not None:
        return _as_inputs(kept, text, config)
    if not seq2seq:
        if not alone:
            text = replace(text, window=own_sizes(text, config)[1])
        check_window(config, text.window, option=_WINDOW)
    tokenizer = load_tokenizer(folder)
    if not seq2seq:
        return _windows(text, tokenizer)
    # A dictionary or a corpus in order begins with what is alike: a sample of all of it stands for it.
    assert text.data is not None
    pairs, count = list(read_pairs(text.data)), max(1, text.tokens // MEAN_TARGET)
    draw = random.Random(text.seed)
    found = list(
        pair_batches(
            draw.sample(pairs, min(count, len(pairs))),
            tokenizer,
            batch_size=text.batch_size(pairs=True),
            start_token=_decoder_start(config),
        )
    )
    # Batches come sorted by length: what is held out should be like what is fitted.
    draw.shuffle(found)
    return [batch.inputs for batch in found]


def _own(
    text: CalibrationText,
    folder: Path,
    config: dict[str, Any],
    device: str | None,
    progress: Callable[[int], None] | None,
) -> Batches | torch.Tensor:
    """What the model writes itself, in the same forms."""
    pairs = is_encoder_decoder(config)
    with contextlib.ExitStack() as stack:
        path = text.written
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / OWN_TEXT_FILE
            write_own_text(text, folder, config, path, device=device, progress=progress)
        kept = read_own_text(path, pairs=pairs)
    if kept is None:
        raise RegroupError(
            "this is no text that a model wrote",
            file=text.written,
            expected=f"a {OWN_TEXT_FILE} of a converted model",
            remedy="give that file, or leave it out to have the text written again",
        )
    return _as_inputs(kept, text, config)


def _as_inputs(kept: SelfWrittenIds, text: CalibrationText, config: dict[str, Any]) -> Batches | torch.Tensor:
    largest = max(max(row) for row in (*kept.windows, *(side for pair in kept.pairs for side in pair)))
    if isinstance(config.get("vocab_size"), int):
        check_vocabulary(largest, config["vocab_size"], text.written or text.data)
    if kept.windows:
        return torch.tensor(kept.windows, dtype=torch.int64)
    found = list(id_batches(kept.pairs, batch_size=text.batch_size(pairs=True), start_token=_decoder_start(config)))
    random.Random(text.seed).shuffle(found)
    return [batch.inputs for batch in found]


def _decoder_start(config: dict[str, Any]) -> int:
    return config.get("decoder_start_token_id") or 0


def _mixed(given: Batches | torch.Tensor, own: Batches | torch.Tensor, size: int) -> Batches:
    """Batches of both, evenly: what is fitted and what is held out is of both kinds."""
    rows = _in_turn(list(given), list(own))
    if not rows or isinstance(rows[0], dict):
        return rows
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise RegroupError(
            "the windows of the calibration text differ in length",
            got=", ".join(map(str, sorted(lengths))),
            remedy=f"pass {_WINDOW} with the length of the text that the model wrote",
        )
    # A last batch of another shape would need masks of its own.
    whole = len(rows) // size * size or len(rows)
    return [batch.inputs for batch in causal_batches(torch.stack(rows[:whole]), size)]


def _in_turn(left: list[Any], right: list[Any]) -> list[Any]:
    """Both lists in their order, each spread evenly over the whole."""
    places = [
        ((number + 0.5) / len(each), part, value)
        for part, each in enumerate((left, right))
        for number, value in enumerate(each)
    ]
    return [value for _, _, value in sorted(places, key=lambda place: place[:2])]


def _windows(text: CalibrationText, tokenizer: Any) -> torch.Tensor:
    """The windows (n, length) of a decoder-only model."""
    assert text.data is not None
    count, place = max(1, text.tokens // text.window), {"file": text.data, "option": _WINDOW}
    if not text.document_starts:
        windows, _ = token_windows(read_texts(text.data), tokenizer, length=text.window, limit=count, **place)
        return windows
    windows = document_windows(_documents(text.data), tokenizer, length=text.window, limit=count, **place)
    # Later pieces of documents come last: what is held out would be continuations of what is fitted, and no beginning.
    order = list(range(len(windows)))
    random.Random(text.seed).shuffle(order)
    return windows[order]


def _documents(data: str | Path) -> Iterator[str]:
    """Documents that hold text, of which there must be several for their starts to mean anything."""
    documents = (document for document in read_texts(data) if document.strip())
    # Two tell; a large data set is not read through for it.
    first = list(islice(documents, 2))
    if len(first) < 2:
        raise RegroupError(
            "there are no document starts to begin windows at",
            file=data,
            expected="several documents",
            got="one",
            remedy="give JSON lines, one document a line, or leave --document-starts out",
        )
    return chain(first, documents)
