"""GGUF files of other architectures, by transformers' own loader; refused where that ignores a part of the file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import GGUFFile
from ..devices import check_fits
from ..errors import RegroupError
from ..modeling.silence import quiet
from .check import logits
from .gguf_models import FREQUENCIES, Model

# Architectures that the loader reads correctly, with the biases that it loads.
_LOADED_BIASES: dict[str, set[str]] = {"llama": set(), "qwen2": {"attn_q", "attn_k", "attn_v"}}
# Keys that change attention, and that it ignores.
_LOST_KEYS = (".rope.scaling.", ".attention.sliding_window")


def foreign_model(file: GGUFFile, dtype: torch.dtype) -> Model:
    """Read a file with transformers' loader.

    Raises:
        RegroupError: it does not know the architecture, ignores a key or a tensor, or finds one missing.
    """
    _check_header(file)
    check_fits(
        file.parameters * dtype.itemsize + file.path.stat().st_size,
        "the model of this GGUF file does not fit into memory; nothing was written",
        file=file.path,
        got=f"{file.parameters:,} weights in {str(dtype)[6:]} and the file's blocks",
        remedy="choose --dtype bfloat16 if that is less, free some memory, or start from the checkpoint that the file "
        "was made of",
    )
    try:
        model, missed = load_gguf(file.path, dtype)
    # The loader reports problems by any error.
    except Exception as error:
        raise RegroupError(
            "transformers cannot load the GGUF file",
            file=file.path,
            got=(str(error).strip() or type(error).__name__)[:400],
        ) from error
    if missed:
        raise RegroupError(
            "this GGUF file lacks a tensor that its model needs", file=file.path, tensor=", ".join(sorted(missed)[:5])
        )
    taken = sum(parameter.numel() for parameter in model.parameters())
    if taken != file.parameters:
        raise _lost(file, f"{taken} of {file.parameters} weights")
    return Model(file, model.config, {}, model)


def _check_header(file: GGUFFile) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    arch = file.values.get("general.architecture")
    if arch not in GGUF_SUPPORTED_ARCHITECTURES:
        raise RegroupError(
            "GGUF files of this architecture are read neither here nor by transformers",
            file=file.path,
            expected=", ".join(sorted({"llama", "qwen2", "qwen3", *GGUF_SUPPORTED_ARCHITECTURES})),
            got=str(arch)[:100],
            remedy="start from the checkpoint that the file was made of",
        )
    for key in ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length"):
        if f"{arch}.{key}" not in file.values:
            continue
        found = file.numbers(key, least=1)
        if isinstance(found, list) and len(set(found)) > 1:
            raise RegroupError(
                f"transformers reads one number for all layers from a GGUF file: {key}",
                file=file.path,
                got=", ".join(map(str, found))[:200],
                remedy="start from the checkpoint that the file was made of",
            )
    blocks = file.values.get(f"{arch}.block_count", 0)
    if isinstance(blocks, int) and blocks > len(file.tensors):
        raise RegroupError(
            "the GGUF header counts other layers than the file has",
            file=file.path,
            expected=f"at most {len(file.tensors)}, as there are tensors",
            got=blocks,
        )
    lost = [
        key
        for key, value in file.values.items()
        if any(part in key for part in _LOST_KEYS) and value not in ("none", 0)
    ]
    if lost:
        raise _lost(file, ", ".join(lost))


def _lost(file: GGUFFile, what: str) -> RegroupError:
    return RegroupError(
        "transformers ignores a part of this GGUF file",
        file=file.path,
        got=what,
        remedy="start from the checkpoint that the file was made of",
    )


def loader_logits(
    file: GGUFFile, config: Any, dtype: torch.dtype, inputs: Mapping[str, Tensor], notes: list[str]
) -> Tensor | None:
    """Logits of a file of Llama's kind in float32, by transformers' own loader; None where that ignores something.

    Args:
        file: the file's header.
        config: the transformers config of the model.
        dtype: that the weights are loaded in.
        inputs: arguments of the model.
        notes: gets a line where the result is None.
    """
    arch = file.values["general.architecture"]
    # Without this key there are as many KV heads as query heads, and the loader leaves the file's order of rows.
    ordered = f"{arch}.attention.head_count_kv" in file.values
    scaled = config.rope_parameters.get("rope_type", "default") != "default" or FREQUENCIES in file.tensors
    biases = {name.split(".")[-2] for name in file.tensors if name.endswith(".bias")}
    if ordered and not scaled and arch in _LOADED_BIASES and biases <= _LOADED_BIASES[arch]:
        # The loader reports a gap of its own, which is no fault of the file's, by any error.
        with contextlib.suppress(Exception):
            model, missing = load_gguf(file.path, dtype)
            if not missing:
                return logits(model.float(), inputs)
    notes.append("logits were not compared otherwise either: nothing else here reads all of such a file")
    return None


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The model of a GGUF file by transformers' own loader, every weight unpacked, so that it can be saved.

    Returns:
        The model, and the names of tensors that the file does not have; they are random.
    """
    import transformers

    # Releases before 5.20 or so unpack in any case, and have no class to say so with.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    with quiet(), _without_bar():
        loads: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, loaded = loads(
            file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, set(loaded["missing_keys"]) | {str(name) for name in loaded.get("mismatched_keys", ())}


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """The loader draws a bar that transformers' switch for bars does not reach."""
    from transformers import modeling_gguf_pytorch_utils as loader

    module: Any = loader
    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar
