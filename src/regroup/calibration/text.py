"""Calibration text as model inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from ..data import causal_batches, document_windows, pair_batches, read_pairs, read_texts, token_windows
from ..data.text import check_window
from ..errors import RegroupError
from ..families import family_for, is_encoder_decoder
from ..families.reading import slow_output
from ..modeling import load_tokenizer
from ..plans import CalibrationText

# The command line's name for ``CalibrationText.window``.
_WINDOW = "--calibration-window"


def calibration_batches(text: CalibrationText, folder: Path, config: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Tokenise calibration text into model inputs.

    Args:
        text: what to read.
        folder: of the original model, for its tokenizer.
        config: of the original model.

    Raises:
        RegroupError: a speech model, windows longer than its positions, no tokenizer, unreadable text, or too
            little for one batch to fit and one to hold out.
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
    if not seq2seq:
        check_window(config, text.window, option=_WINDOW)
    tokenizer = load_tokenizer(folder)
    if seq2seq:
        # A dictionary or a corpus in order begins with what is alike: a sample of all of it stands for it.
        pairs, count = list(read_pairs(text.data)), max(1, text.tokens // 16)
        draw = random.Random(text.seed)
        found = list(
            pair_batches(
                draw.sample(pairs, min(count, len(pairs))),
                tokenizer,
                batch_size=text.batch,
                start_token=config.get("decoder_start_token_id") or 0,
            )
        )
        # Batches come sorted by length: what is held out should be like what is fitted.
        draw.shuffle(found)
        batches = [batch.inputs for batch in found]
    else:
        windows = _windows(text, tokenizer)
        # A last batch of another shape would need masks of its own.
        whole = len(windows) // text.batch * text.batch or len(windows)
        batches = [batch.inputs for batch in causal_batches(windows[:whole], text.batch)]
    if len(batches) < 2:
        raise RegroupError(
            "there is too little calibration text",
            file=text.data,
            expected=f"at least two batches of {text.batch}",
            got=f"{len(batches)}",
            remedy=f"raise --calibration-tokens, give more text, or a smaller {_WINDOW} or --calibration-batch",
        )
    return batches


def _windows(text: CalibrationText, tokenizer: Any) -> torch.Tensor:
    """The windows (n, length) of a decoder-only model."""
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
