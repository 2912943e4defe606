"""llama.cpp, through llama-cpp-python where that works: what it answers of a GGUF file."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from ..errors import RegroupError

# Of the largest logit. It multiplies matrices of 16 bits by activations rounded to as many, and the models that it is
# compared with compute in float32.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PATIENCE = 120  # seconds, for a file that takes a fraction of one


def installed() -> bool:
    """Whether there is a package of that name; it may still not work (see ``trouble``)."""
    return importlib.util.find_spec("llama_cpp") is not None


def version() -> str:
    """Name and release, for people."""
    try:
        return f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"
    except importlib.metadata.PackageNotFoundError:
        return "llama-cpp-python of an unknown version"


def trouble() -> str | None:
    """Why llama.cpp cannot be asked here; None where it answers for a file that is known to be good.

    An installation that does not even do that says nothing about other files.
    """
    return _trouble() if installed() else "llama-cpp-python is not installed"


@functools.lru_cache(maxsize=1)
def _trouble() -> str | None:
    with tempfile.TemporaryDirectory(prefix="regroup-llama-cpp-") as folder:
        file = Path(folder) / "control.gguf"
        write_control(file)
        asked = {"rows": [[1, 2, 3]], "texts": ["ab  12"], "prompt": "a", "new_tokens": 1}
        try:
            answer = _run(file, asked, timeout=_PATIENCE)
        except (_DiedError, subprocess.TimeoutExpired, OSError) as error:
            return f"{version()} does not work here ({' '.join(str(error).split())[-300:]})"
        # Six bytes, six tokens: the one merge of this vocabulary is of others.
        if len(answer["ids"][0]) != len("ab  12") or not bool(answer["logits"].isfinite().all()):
            return f"{version()} does not work here (wrong answers for a file that is known to be good)"
    return None


def write_control(file: Path) -> None:
    """Write a tiny model with a tokenizer of bytes, as small as llama.cpp takes it."""
    tokens = sorted(ByteLevel.alphabet())
    tokens.append(tokens[0] + tokens[1])
    width, size = 32, len(tokens)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    shapes = {"token_embd": (size, width), "output_norm": (width,), "blk.0.attn_norm": (width,)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (width,)} | {f"blk.0.ffn_{part}": (width, width) for part in ("gate", "up", "down")}
    noise = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", noise.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _DiedError(Exception):
    """The process ended badly; what it said last."""


def ask(file: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run llama.cpp on a file in a process of its own: where it does not like a file it ends the process.

    Args:
        file: the GGUF file.
        asked: ``texts`` to encode; ``rows``, lists of token ids, with ``prompt``, a text or None, and ``new_tokens``,
            how many follow it. Either may be left out.

    Returns:
        With texts their ``ids``, special tokens in them taken as such; with rows ``logits`` (rows, positions,
        vocabulary), float32; with a prompt also ``prompt_ids``, ``greedy_ids`` and ``greedy_text``.

    Raises:
        RegroupError: it ended badly, where it answers for a good file (see ``trouble``).
    """
    try:
        return _run(file, asked)
    except _DiedError as error:
        raise RegroupError(
            "llama.cpp does not load the GGUF file; nothing was written",
            file=file.name,
            got=str(error),
            remedy="please report it with the checkpoint's config.json, or skip this with --no-check",
        ) from error


def _run(file: Path, asked: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="regroup-llama-cpp-") as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "regroup.export.llama_cpp_process", str(file), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=timeout)
        if done.returncode != 0 or not answer.is_file():
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            raise _DiedError("; ".join(lines[-3:])[:600] or f"exit status {done.returncode}")
        found: dict[str, Any] = {}
        with np.load(answer) as arrays:
            if "texts" in asked:
                ends = np.cumsum(arrays["lengths"])[:-1]
                found["ids"] = [part.tolist() for part in np.split(arrays["ids"], ends)]
            if "rows" in asked:
                found["logits"] = torch.from_numpy(arrays["logits"])
            if asked.get("prompt") is not None:
                found |= {name: arrays[name].tolist() for name in ("prompt_ids", "greedy_ids")}
                found["greedy_text"] = arrays["greedy_text"].tobytes().decode("utf-8", errors="replace")
    return found
