"""Small runs for the tests: checkpoints with a tokenizer, text, and recipes of a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import texts
import tiny
from helpers import convert_heads, head_map
from regroup.uptraining.recipe import Recipe


def t5_tokenizer() -> Any:
    """Bytes of the text and eight sentinels, within the 96 tokens that the tiny checkpoints have."""
    letters = sorted(set(texts.TEXT) - {" ", "\n"})[:60]
    words = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{number}>" for number in range(8)]})
    return made


def pair(folder: Path, name: str = "llama", kind: str = "some") -> tuple[Path, Path]:
    """An original model with a tokenizer, and the converted one."""
    original = tiny.save(name, folder / "parent")
    made = t5_tokenizer() if name.startswith("t5") else texts.tokenizer()
    made.save_pretrained(original)
    convert_heads(original, folder / "child", head_map(name, kind))
    return original, folder / "child"


def text(folder: Path) -> tuple[Path, Path]:
    """Text to train on, about 7,000 tokens, and held-out text."""
    train, held_out = folder / "train.txt", folder / "held-out.txt"
    train.write_text(texts.TEXT * 8, encoding="utf-8")
    held_out.write_text(texts.TEXT, encoding="utf-8")
    return train, held_out


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps of eight windows of 32 tokens on the converted model in ``folder``, at a rate that shows."""
    return {
        "model": str(folder / "child"),
        "output": folder / "run",
        "data": (str(folder / "train.txt"),),
        "steps": 12,
        "window": 32,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "windows": "packed",
        "save_every": 4,
        "log_every": 1,
        "report_to": ("none",),
        "device": "cpu",
        **changes,
    }


def recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe.load(**settings(folder, **changes))


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["results"]["history"] if "loss" in entry]


def start(*arguments: object, processes: int = 1, script: Path | None = None) -> subprocess.Popen[str]:
    """``regroup uptrain`` in processes of its own."""
    command = [sys.executable, "-m", "regroup.cli"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "regroup.cli"] if script is None else [str(script)]
    return subprocess.Popen(
        [*command, "uptrain", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
