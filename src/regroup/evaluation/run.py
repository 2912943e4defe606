"""`regroup evaluate` as one function: load, cut windows, score, record."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fetch
from ..data import causal_batches, pair_batches, read_pairs, read_texts, token_windows
from ..data.text import check_window
from ..devices import device_named
from ..errors import RegroupError
from ..files import as_named, kind_of
from ..modeling import load, load_tokenizer
from ..modeling.lm_head import require_head
from ..opening import readable
from ..record import record
from .score import score

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    teacher: str | Path | None = None,
    window: int = 512,
    windows: int | None = None,
    document_starts: bool = False,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int], None] | None = None,
    ahead: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on held-out text or pairs.

    Args:
        model, teacher: checkpoint folders or hub ids; the teacher is the original model to compare with.
        data: see ``regroup.data.read_texts`` and ``read_pairs``.
        window, windows, document_starts: tokens per window, windows at most, and where they begin (``token_windows``).
        batch_size: windows or pairs at a time.
        dtype: of weights and activations; ``"auto"`` as stored.
        device: a torch device; a GPU where there is one.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there is nothing else.
        progress: called with the number of rows after each batch.
        ahead: called before the first with the number of all rows.

    Returns:
        A record (see ``regroup.record``).

    Raises:
        RegroupError: anything missing, unreadable or mismatched.

    Example:
        >>> record = regroup.evaluate("llama-2-7b-gqa8", "held-out.txt", teacher="llama-2-7b")  # doctest: +SKIP
        >>> record["results"]["kl_nats_per_token"]  # doctest: +SKIP
    """
    check_dtype(dtype)
    data = as_named(data)
    if kind_of(data) == "nothing":
        raise RegroupError(
            "the data cannot be read", file=data, expected="a file, a folder of files, or a pipe", got="no such file"
        )
    place = device_named(device)
    with readable(str(model), allow_pickle=allow_pickle) as name:
        folder = fetch(name)
        student, tokenizer = load_for_scoring(folder, dtype, place), load_tokenizer(folder)
    original = None
    if teacher is not None:
        with readable(str(teacher), allow_pickle=allow_pickle) as name:
            original = load_for_scoring(fetch(name), dtype, place)

    nbytes = None
    if student.config.is_encoder_decoder:
        if student.main_input_name != "input_ids":
            raise RegroupError("models that listen or look cannot be evaluated on text", file=folder)
        pairs = list(islice(read_pairs(data), windows))
        start = student.generation_config.decoder_start_token_id
        batches = pair_batches(
            pairs,
            tokenizer,
            batch_size=batch_size,
            start_token=student.config.decoder_start_token_id if start is None else start,
        )
        rows = len(pairs)
    else:
        check_window(student.config.to_dict(), window)
        cut, nbytes = token_windows(
            read_texts(data), tokenizer, length=window, limit=windows, document_starts=document_starts, file=data
        )
        batches = causal_batches(cut, batch_size)
        rows = len(cut)
    if ahead is not None:
        ahead(rows)
    result = score(student, batches, teacher=original, progress=progress)
    if math.isnan(result.nats_per_token):
        raise RegroupError(
            "the model's loss is not a number",
            file=folder,
            got="nan",
            remedy="see whether the weights are sound, or pass --dtype float32",
        )

    results: dict[str, Any] = {
        "rows": rows,
        "tokens": result.tokens,
        "nats_per_token": result.nats_per_token,
        "standard_error": result.standard_error,
        "perplexity": result.perplexity,
    }
    if nbytes is not None:
        results["bits_per_byte"] = result.bits_per_byte(nbytes)
    if result.teacher_nats_per_token is not None:
        results |= {
            "teacher_nats_per_token": result.teacher_nats_per_token,
            "teacher_standard_error": result.teacher_standard_error,
            "excess_nats_per_token": result.nats_per_token - result.teacher_nats_per_token,
            "excess_standard_error": result.excess_standard_error,
            "kl_nats_per_token": result.kl_nats_per_token,
            "top1_agreement": result.top1_agreement,
        }
    configuration = {
        "model": str(model),
        "teacher": None if teacher is None else str(teacher),
        "data": data.name,
        "window": window,
        "windows": windows,
        "document_starts": document_starts,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": torch.device(place).type,
    }
    return record("evaluate/language-modeling", configuration, results)


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that weights cannot have.

    Raises:
        RegroupError: naming those that there are.
    """
    if dtype not in _DTYPES:
        raise RegroupError("the dtype is not known", expected=", ".join(_DTYPES), got=dtype)


def load_for_scoring(folder: Path, dtype: str, device: str) -> Any:
    """A checkpoint in evaluation mode on a device.

    Raises:
        RegroupError: it has no language-modelling head, or see ``models.load``.
    """
    require_head(folder)
    model: Any = load(folder, dtype=_DTYPES[dtype], progress=False)
    return model.to(device).eval()
