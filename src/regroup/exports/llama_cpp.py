"""Run llama.cpp on a GGUF file, through llama-cpp-python where that works."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from ..errors import RegroupError

# Relative to the largest logit. llama.cpp rounds activations to the 16 bits of its matrices; the models that it is
# compared with compute in float32.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TIMEOUT = 120  # seconds; the file takes a fraction of one


def installed() -> bool:
    """Whether there is a package of that name; it may still not work (see ``unsupported_reason``)."""
    return importlib.util.find_spec("llama_cpp") is not None


def version() -> str:
    """Name and release."""
    try:
        return f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"
    except importlib.metadata.PackageNotFoundError:
        return "llama-cpp-python of an unknown version"


def unsupported_reason(kinds: Iterable[str]) -> str | None:
    """Why llama.cpp cannot be used here; None where it works for a file that is known to be good.

    An installation that fails there says nothing about other files.

    Args:
        kinds: ggml's names of how the tensors of the file in question are stored, such as ``"F16"``: code for some of
            them may not run on this processor. None of them for the tokenizer alone.
    """
    return _unsupported_reason(frozenset(kinds)) if installed() else "llama-cpp-python is not installed"


@functools.lru_cache(maxsize=16)
def _unsupported_reason(kinds: frozenset[str]) -> str | None:
    with tempfile.TemporaryDirectory(prefix="regroup-llama-cpp-") as folder:
        for kind in sorted({"F32", *kinds}):
            file = Path(folder) / f"{kind}.gguf"
            write_control(file, kind)
            decoded = {"rows": [list(range(1, 17))], "prompt": "a", "new_tokens": 1} if kinds else {}
            known = f"a {kind} file that is known to be good"
            try:
                answer = _run(file, {"texts": ["ab  12"], **decoded}, timeout=_TIMEOUT)
            except (_DiedError, subprocess.TimeoutExpired, OSError) as error:
                return f"{version()} does not work here, not even for {known} ({error})"
            # Six bytes, six tokens: the one merge of this vocabulary is of others.
            finite = not decoded or bool(answer["logits"].isfinite().all())
            if len(answer["ids"][0]) != len("ab  12") or not finite:
                return f"{version()} does not work here: its answers for {known} are wrong"
    return None


def write_control(file: Path, kind: str) -> None:
    """Write a tiny model of llama.cpp's with a tokenizer of bytes.

    Args:
        file: what to write.
        kind: how its matrices are stored; other than float32 they are zero.
    """
    tokens = sorted(ByteLevel.alphabet())
    tokens.append(tokens[0] + tokens[1])
    width, size = 256, len(tokens)  # the widest blocks are of 256
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
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
    matrices = {"token_embd": size} | {f"blk.0.attn_{part}": width for part in ("q", "k", "v", "output")}
    matrices |= {f"blk.0.ffn_{part}": width for part in ("gate", "up", "down")}
    noise = np.random.default_rng(0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", noise.normal(size=width).astype(np.float32))
    stored = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[stored]
    for name, rows in matrices.items():
        if kind == "F32":
            writer.add_tensor(f"{name}.weight", noise.normal(size=(rows, width)).astype(np.float32))
        else:
            zeros = np.zeros((rows, width // block * nbytes), dtype=np.uint8)
            writer.add_tensor(f"{name}.weight", zeros, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _DiedError(Exception):
    """The process failed; its last lines."""


def ask(file: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run llama.cpp on a file in a separate process: it ends the process at files that it does not accept.

    Args:
        file: the GGUF file.
        asked: ``texts`` to encode; ``rows``, lists of token ids, with ``prompt``, a text or None, and ``new_tokens``,
            how many follow it. Either may be left out.

    Returns:
        With texts their ``ids``, special tokens in them taken as such; with rows ``logits`` (rows, positions,
        vocabulary), float32; with a prompt also ``prompt_ids``, ``greedy_ids`` and ``greedy_text``.

    Raises:
        RegroupError: it failed, where it works for a good file (see ``unsupported_reason``).
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


def _last_words(status: int, said: str) -> str:
    """The signal that ended a process, and its last lines that are not mere warnings."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "training context" not in line]
    if status < 0:
        with contextlib.suppress(ValueError):
            lines = [f"killed by {signal.Signals(-status).name}", *lines[-2:]]
    return "; ".join(lines[-3:])[:600] or f"exit status {status}"


def _run(file: Path, asked: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="regroup-llama-cpp-") as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "regroup.exports.llama_cpp_process", str(file), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=timeout)
        if done.returncode != 0 or not answer.is_file():
            raise _DiedError(_last_words(done.returncode, done.stderr.decode(errors="replace")))
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
