"""A GGUF file as a source: transformers' own loader reads it, and a stock checkpoint comes of it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import read_gguf, staged_folder
from ..checkpoint.writer import check_destination
from ..devices import check_fits
from ..errors import RegroupError
from ..planning import Listener
from . import llama_cpp
from .check import TOLERANCE, check_memory, compare, folder_logits, logits, model_inputs
from .run import Exported, Request

# Dtypes of a file's matrices by the library's name; what is quantised is stored anew in float32.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Keys and tensors that change how dimensions are rotated, and that transformers' loader passes over.
_ROTATION_KEYS = (".rope.scaling.", ".attention.sliding_window")
_FREQUENCIES = "rope_freqs.weight"


def export_from_gguf(file: Path, destination: Path, request: Request) -> Exported:
    """Turn a GGUF file into a checkpoint folder of a stock transformers class (see ``export_checkpoint``).

    Raises:
        RegroupError: the target is another one, or the file holds what transformers does not take from it.
    """
    if request.to != "hf" or request.expand or request.tensor_parallel is not None:
        raise RegroupError(
            "a GGUF file is exported to a plain checkpoint alone",
            file=file,
            expected="--to hf, without --expand or --tensor-parallel",
            got=f"--to {request.to}",
            remedy="export it with --to hf first, and go on from the folder",
        )
    facts = read_gguf(file)
    _check_header(file, facts)
    dtype = getattr(torch, request.dtype) if request.dtype else _stored(file)
    check_destination(destination, None, facts["parameters"] * dtype.itemsize)
    _check_memory(file, facts["parameters"], dtype, request)
    with staged_folder(destination) as stage:
        config, wanted = _write(file, facts["parameters"], dtype, stage, request)
        checked = _compare(file, stage, config, wanted, request.told) if request.check else None
    form = f"a checkpoint of the stock {config.model_type} class of transformers, {str(dtype)[6:]}"
    return Exported(destination, form, checked, None if checked else "--no-check", tuple(request.notes))


def _check_header(file: Path, facts: dict[str, Any]) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    arch = facts.get("general.architecture")
    if arch not in GGUF_SUPPORTED_ARCHITECTURES:
        raise RegroupError(
            "transformers does not read GGUF files of this architecture",
            file=file,
            expected=", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES)),
            got=arch,
            remedy="start from the checkpoint that the file was made of",
        )
    heads = facts.get(f"{arch}.attention.head_count_kv")
    if isinstance(heads, list) and len(set(heads)) > 1:
        raise RegroupError(
            "transformers reads one number of KV heads from a GGUF file",
            file=file,
            got=", ".join(map(str, heads)),
            remedy="start from the checkpoint that the file was made of",
        )
    lost = [key for key in facts if any(part in key for part in _ROTATION_KEYS) and facts[key] not in ("none", 0)]
    if lost:
        raise _lost(file, ", ".join(lost))


def _lost(file: Path, what: str) -> RegroupError:
    return RegroupError(
        "transformers does not take everything from this GGUF file",
        file=file,
        got=what,
        remedy="start from the checkpoint that the file was made of",
    )


def _stored(file: Path) -> torch.dtype:
    """The dtype of the file's matrices where they share one that transformers stores, else float32."""
    from gguf import GGUFReader

    kinds = {tensor.tensor_type.name for tensor in GGUFReader(str(file)).tensors if len(tensor.shape) > 1}
    return _DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _load(file: Path, dtype: torch.dtype) -> Any:
    try:
        return load_gguf(file, dtype)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise RegroupError(
            "transformers cannot load the GGUF file", file=file, got=str(error).strip()[:400] or type(error).__name__
        ) from error


def load_gguf(file: Path, dtype: torch.dtype) -> Any:
    """The model of a GGUF file by transformers' own loader, every weight unpacked, so that it can be saved."""
    import transformers

    # Releases before 5.20 or so unpack in any case, and have no class to say so with.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _check_memory(file: Path, parameters: int, dtype: torch.dtype, request: Request) -> None:
    """The model is in memory as a whole here, checked or not, beside the blocks that it is unpacked from."""
    check_fits(
        parameters * dtype.itemsize + file.stat().st_size,
        "the model of this GGUF file does not fit into memory; nothing was written",
        file=file,
        got=f"{parameters:,} weights in {str(dtype)[6:]} and the file's blocks",
        remedy="choose --dtype bfloat16 if that is less, free some memory, or start from the checkpoint that the file "
        "was made of",
    )
    if request.check:
        check_memory(file, parameters, 0, request.told)


def _write(file: Path, parameters: int, dtype: torch.dtype, stage: Path, request: Request) -> tuple[Any, Tensor | None]:
    """Write the checkpoint. The model is gone when this returns: the next one to be loaded is the result.

    Returns:
        The config, and the logits of the loader's model; None where llama.cpp will be asked for them, or nobody.
    """
    model = _load(file, dtype)
    _check_all_taken(file, parameters, model)
    _save_tokenizer(file, stage, model, request)
    model.save_pretrained(stage)
    if not request.check or llama_cpp.installed():
        return model.config, None
    return model.config, logits(model.float(), model_inputs(model.config))


def _check_all_taken(file: Path, parameters: int, model: Any) -> None:
    """Its loader leaves out tensors that the config does not ask for, such as biases, without a word."""
    from gguf import GGUFReader

    tensors = GGUFReader(str(file)).tensors
    if any(tensor.name == _FREQUENCIES for tensor in tensors):
        raise _lost(file, f"{_FREQUENCIES}: Llama 3's slower frequencies")
    taken = sum(parameter.numel() for parameter in model.parameters())
    if taken != parameters:
        kinds = sorted({tensor.name.split(".")[-2] for tensor in tensors if tensor.name.endswith(".bias")})
        biases = f"; biases in it: {', '.join(kinds)}" if kinds else ""
        raise _lost(file, f"{taken} of {parameters} weights{biases}")


def _save_tokenizer(file: Path, stage: Path, model: Any, request: Request) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    if "tokenizer.ggml.tokens" not in GGUFReader(str(file)).fields:
        request.notes.append("the GGUF file has no tokenizer, so the checkpoint has none")
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(stage)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        request.notes.append(
            f"transformers cannot make a tokenizer of the file's ({str(error).strip()[:120]}): copy the model's own"
        )
        return
    # The loader leaves the config's own defaults, which are the ids of another model's tokens.
    for kind in ("bos", "eos", "pad"):
        for config in (model.config, model.generation_config):
            setattr(config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))


def _compare(file: Path, stage: Path, config: Any, wanted: Tensor | None, told: Listener) -> str:
    """Against llama.cpp where it is installed, which reads the file by code of its own; else against the loader."""
    inputs = model_inputs(config)
    with told.comparing() as answered:
        if wanted is None:
            asked = {"rows": inputs["input_ids"].tolist(), "prompt": None, "new_tokens": 0}
            answer: Tensor = llama_cpp.ask(file, asked)["logits"]
            wanted, other = answer, llama_cpp.version()
            tolerance = llama_cpp.TOLERANCES[torch.bfloat16]  # whatever the file's blocks are
        else:
            other, tolerance = "its GGUF loader", TOLERANCE
        answered(1)
        found = folder_logits(stage, None)
        answered(1)
    loader = f"transformers {importlib.metadata.version('transformers')}, against {other}"
    return str(compare(wanted, found, loader, tolerance=tolerance))
