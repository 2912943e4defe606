"""Whether a GGUF file answers as its source does: in llama.cpp where it is installed, else through transformers."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import RegroupError
from ..models import load, load_tokenizer
from ..opening import Source
from . import llama_cpp
from .check import Comparison, compare, logits, model_inputs
from .gguf_source import load_gguf
from .run import check_length, source_config

PROMPT = "Once upon a time there was"
NEW_TOKENS = 24
_TRANSFORMERS_READS = ("llama", "qwen2")


def check_gguf(opened: Source, file: Path, arch: str, dtype: torch.dtype) -> tuple[str | None, str | None]:
    """Compare a file with its source.

    Args:
        opened: the source.
        file: the GGUF file.
        arch: its architecture.
        dtype: of its matrices.

    Returns:
        What was compared, or None and why nothing was.

    Raises:
        RegroupError: the answers differ, or llama.cpp does not load the file.
    """
    length = check_length(opened)
    if not llama_cpp.installed() and arch not in _TRANSFORMERS_READS:
        return None, f"transformers reads no GGUF of architecture {arch}, and llama-cpp-python is not installed"
    model = load(opened.checkpoint.folder, progress=False, config=source_config(opened), dtype=torch.float32)
    # The file's rounding of the weights is not the check's business.
    _round(model, dtype)
    inputs = model_inputs(model.config, length=length)
    wanted = logits(model, inputs)
    if llama_cpp.installed():
        return str(_llama_cpp(opened, file, model, inputs["input_ids"], wanted, dtype)), None
    del model
    found = logits(load_gguf(file, torch.float32), inputs)
    return str(compare(wanted, found, f"transformers {importlib.metadata.version('transformers')}'s GGUF loader")), None


def _round(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype).float()


@torch.no_grad()
def _llama_cpp(
    opened: Source, file: Path, model: Any, ids: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype
) -> Comparison:
    """Logits at every position; with a tokenizer also the ids of a prompt and the text that follows greedily."""
    loader = llama_cpp.version()
    tokenizer = None
    if any(opened.folder.glob("tokenizer*")):
        tokenizer = load_tokenizer(opened.folder)
    asked = {"rows": ids.tolist(), "prompt": PROMPT if tokenizer is not None else None, "new_tokens": NEW_TOKENS}
    answer = llama_cpp.ask(file, asked)
    text = ""
    if tokenizer is not None and dtype == torch.float32:
        prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        _same("token ids of a prompt", prompt[0].tolist(), answer["prompt_ids"], loader)
        longest = min(NEW_TOKENS, model.config.max_position_embeddings - prompt.shape[1])
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=longest, do_sample=False)
        continued = made[0, prompt.shape[1] :].tolist()
        _same("greedy tokens", continued, answer["greedy_ids"][: len(continued)], loader)
        wanted_text = tokenizer.decode(made[0], skip_special_tokens=True)
        _same("greedy text", wanted_text.strip(), (PROMPT + answer["greedy_text"]).strip(), loader)
        text = f"the same {len(continued)} greedy tokens and text"
    return compare(wanted, answer["logits"], loader, tolerance=llama_cpp.TOLERANCES[dtype], text=text)


def _same(what: str, wanted: object, found: object, loader: str) -> None:
    if wanted != found:
        raise RegroupError(
            "the exported model does not answer as its source does; nothing was written",
            expected=f"{what}: {str(wanted)[:200]}",
            got=f"{str(found)[:200]}, with {loader}",
            remedy="please report it with the checkpoint's config.json and tokenizer.json",
        )
