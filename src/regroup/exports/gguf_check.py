"""Compare a GGUF file with its source: in llama.cpp where that works, else by reading it back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import GGUFFile, read_gguf
from ..errors import RegroupError
from ..modeling import load, load_tokenizer
from ..opening import Source
from . import llama_cpp
from .check import Comparison, check_length, compare, logits, model_inputs
from .gguf_foreign import loader_logits
from .gguf_structure import check_file
from .gguf_texts import check_same, ids_of, texts_for
from .gguf_tokenizer import Vocabulary
from .gguf_vocabulary import tokenizer_of
from .heads import source_config
from .request import Request

PROMPT = "Once upon a time there was"
NEW_TOKENS = 24


def check_gguf(
    opened: Source, file: Path, config: Any, dtype: torch.dtype, vocab: Vocabulary | None, request: Request
) -> str:
    """Compare a file with its source, one model in memory at a time.

    Args:
        opened: the source.
        file: the GGUF file.
        config: the transformers config of the source.
        dtype: of the file's matrices.
        vocab: the source's tokenizer as the file has it, or None.
        request: gets notes of what was not compared.

    Returns:
        What was compared.

    Raises:
        RegroupError: the outputs differ, or llama.cpp does not load the file.
    """
    inputs = model_inputs(config, length=check_length(opened))
    tokenizer = load_tokenizer(opened.folder) if vocab is not None else None
    header = read_gguf(file)
    reason = llama_cpp.unsupported_reason(tensor.kind for tensor in header.tensors.values())
    with request.listener.comparing() as advance:
        if reason is None:
            windows = [layer.window for layer in opened.layout.layers if layer.window is not None]
            longest = min([config.max_position_embeddings, *windows])
            compared = [str(_llama_cpp(opened, file, tokenizer, inputs["input_ids"], dtype, longest, advance))]
        else:
            request.notes.append(f"logits were not compared with llama.cpp: {reason}")
            checkpoint = opened.checkpoint
            compared = [check_file(file, opened.layout, config, checkpoint.tensors, checkpoint.read, dtype)]
            found = loader_logits(header, config, torch.float32, inputs, request.notes)
            advance(1)
            if found is not None:
                wanted = logits(_rounded_source(opened, dtype), inputs)
                loader = f"transformers {importlib.metadata.version('transformers')}'s GGUF loader"
                compared.insert(0, str(compare(wanted, found, loader)))
            advance(1)
    if vocab is not None:
        compared.append(_check_ids(tokenizer, vocab, file, header, request))
    return "; ".join(compared)


def _check_ids(tokenizer: Any, vocab: Vocabulary, file: Path, header: GGUFFile, request: Request) -> str:
    """Token ids of texts, compared with llama.cpp's, but for differences that are known and noted."""
    texts = texts_for(tokenizer)
    if llama_cpp.unsupported_reason(()) is None:
        found, other = llama_cpp.ask(file, {"texts": texts})["ids"], llama_cpp.version()
    else:
        found, other = ids_of(tokenizer_of(header), texts), "the tokenizer that regroup makes of the file"
    own = ids_of(tokenizer, texts)
    if not vocab.differences:
        return f"{check_same(texts, own, found, other)}, with {other}"
    predicted = vocab.predicted(tokenizer)
    wanted = [predicted.encode(text).ids for text in texts]
    same = check_same(texts, wanted, found, other)
    differing = [text for text, a, b in zip(texts, own, wanted, strict=True) if a != b]
    request.notes.append(
        f"{len(differing)} of {len(texts)} texts get other token ids in llama.cpp than from this tokenizer"
        + (f", such as {min(differing, key=len)[:60]!r}" if differing else "")
    )
    return f"{same}, but for the differences that are noted, with {other}"


def _rounded_source(opened: Source, dtype: torch.dtype) -> Any:
    """The source in float32, with the file's rounding of the weights, which is not the check's business."""
    model: Any = load(opened.checkpoint.folder, progress=False, config=source_config(opened), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype).float()
    return model


def _llama_cpp(
    opened: Source,
    file: Path,
    tokenizer: Any,
    ids: torch.Tensor,
    dtype: torch.dtype,
    longest: int,
    advance: Callable[[int], None],
) -> Comparison:
    """Logits at every position; with a tokenizer also the ids of a prompt and the text that follows greedily."""
    loader, text = llama_cpp.version(), ""
    asked: dict[str, Any] = {"rows": ids.tolist(), "prompt": None, "new_tokens": 0}
    prompt: list[int] = []
    if tokenizer is not None:
        prompt = tokenizer(PROMPT)["input_ids"]
        asked |= {"prompt": PROMPT, "new_tokens": max(0, min(NEW_TOKENS, longest - len(prompt)))}
    # Asked before the source is loaded, in a process that has ended by then.
    answer = llama_cpp.ask(file, asked)
    advance(1)
    model = _rounded_source(opened, dtype)
    wanted = logits(model, {"input_ids": ids})
    if tokenizer is not None:
        _same("token ids of a prompt", prompt, answer["prompt_ids"], loader)
        made = answer["greedy_ids"]
        decoded = tokenizer.decode([*prompt, *made], skip_special_tokens=True)
        _same("text of the tokens", decoded.strip(), (PROMPT + answer["greedy_text"]).strip(), loader)
        same = greedy_agreement(model, prompt, made, loader, tolerance=llama_cpp.TOLERANCES[dtype])
        text = f"{same} of {len(made)} greedy tokens the same" + ("" if same == len(made) else ", the rest near ties")
    advance(1)
    return compare(wanted, answer["logits"], loader, tolerance=llama_cpp.TOLERANCES[dtype], text=text)


def greedy_agreement(model: Any, prompt: list[int], made: list[int], loader: str, *, tolerance: float) -> int:
    """How many of the tokens that follow a prompt greedily elsewhere are the model's own first choice.

    The model is given the tokens that were made, not asked to generate: settings of generation do not interfere, and
    one near tie does not spoil all that follows.

    Raises:
        RegroupError: it prefers another token by more than ``tolerance`` of the largest logit.
    """
    if not made:
        return 0
    scores = logits(model, {"input_ids": torch.tensor([[*prompt, *made]])})[0, len(prompt) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(made)[:, None])[:, 0]
    gap = scores.max(-1).values - chosen
    if not float(gap.max()) <= tolerance * float(scores.abs().max()):
        _same("greedy tokens", scores.argmax(-1).tolist(), made, loader)
    return int((gap == 0).sum())


def _same(what: str, wanted: object, found: object, loader: str) -> None:
    if wanted != found:
        raise RegroupError(
            "the exported model's output differs from its source's; nothing was written",
            expected=f"{what}: {str(wanted)[:200]}",
            got=f"{str(found)[:200]}, with {loader}",
            remedy="please report it with the checkpoint's config.json and tokenizer.json",
        )
