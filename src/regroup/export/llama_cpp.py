"""llama.cpp, through llama-cpp-python where that is installed: what it answers of a GGUF file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RegroupError

# Of the largest logit. It multiplies matrices of 16 bits by activations rounded to as many, and the models that it is
# compared with compute in float32.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def version() -> str:
    return f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"


def ask(file: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run llama.cpp on a file in a process of its own: where it does not like a file it ends the process.

    Args:
        file: the GGUF file.
        asked: ``rows``, lists of token ids; ``prompt``, a text or None; ``new_tokens``, how many follow it.

    Returns:
        ``logits`` (rows, positions, vocabulary), float32; with a prompt also ``prompt_ids``, ``greedy_ids`` and
        ``greedy_text``.

    Raises:
        RegroupError: it ended badly.
    """
    with tempfile.TemporaryDirectory(prefix="regroup-llama-cpp-") as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "regroup.export.llama_cpp_process", str(file), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RegroupError(
                "llama.cpp does not load the exported file; nothing was written",
                got="; ".join(lines[-3:])[:600] or f"exit status {done.returncode}",
                remedy="please report it with the checkpoint's config.json, or skip this with --no-check",
            )
        with np.load(answer) as arrays:
            found: dict[str, Any] = {"logits": torch.from_numpy(arrays["logits"])}
            if asked["prompt"] is not None:
                found |= {name: arrays[name].tolist() for name in ("prompt_ids", "greedy_ids")}
                found["greedy_text"] = arrays["greedy_text"].tobytes().decode("utf-8", errors="replace")
    return found
