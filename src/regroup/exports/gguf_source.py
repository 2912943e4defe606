"""From a GGUF file to a stock checkpoint, tensor by tensor."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import GGUFFile, ShardFile, read_gguf, staged_folder
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.writer import check_destination
from ..devices import check_fits
from ..errors import RegroupError
from . import llama_cpp
from .check import TOLERANCE, check_memory, compare, folder_logits, logits, model_inputs
from .gguf_foreign import foreign_model, loader_logits
from .gguf_models import CLASSES, Model, model_of, rounded
from .gguf_structure import check_folder
from .gguf_texts import check_against_llama_cpp, check_reloaded
from .gguf_vocabulary import described, tokenizer_of
from .request import Exported, Request

_SPELLED = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def export_from_gguf(file: Path, destination: Path, request: Request) -> Exported:
    """Turn a GGUF file into a checkpoint folder of a stock transformers class (see ``export``).

    Raises:
        RegroupError: the target is another one, or the file holds or lacks what the checkpoint cannot do without.
    """
    if request.to != "hf" or request.expand or request.tensor_parallel is not None:
        raise RegroupError(
            "a GGUF file can only be exported to a plain checkpoint",
            file=file,
            expected="--to hf, without --expand or --tensor-parallel",
            got=f"--to {request.to}",
            remedy="export it with --to hf first, and export that folder",
        )
    found = read_gguf(file)
    if not found.tensors:
        raise RegroupError("this GGUF file has no tensors", file=file, expected="a model, not a vocabulary alone")
    dtype = getattr(torch, request.dtype) if request.dtype else _stored(found)
    check_destination(destination, None, found.parameters * dtype.itemsize)
    if request.check:
        check_memory(file, found.parameters, 0, request.listener)
    arch = found.values.get("general.architecture")
    model = model_of(found) if arch in CLASSES else foreign_model(found, dtype)
    _check_largest(found)
    tokenizer = tokenizer_of(found)
    if tokenizer is None:
        request.notes.append("the GGUF file has no tokenizer, so the checkpoint has none")
    else:
        _check_vocabulary(found, tokenizer, model.config.vocab_size)
        for kind in ("bos", "eos", "pad"):
            setattr(model.config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    with staged_folder(destination) as stage:
        _write(model, dtype, stage, request)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
            check_reloaded(stage, tokenizer)
        checked = _compare(model, dtype, stage, tokenizer, request) if request.check else None
    form = f"a checkpoint of the stock {model.config.model_type} class of transformers, {str(dtype)[6:]}"
    if tokenizer is not None:
        form += f", with the file's tokenizer ({described(found)})"
    return Exported(destination, form, checked, tuple(request.notes))


def _check_largest(file: GGUFFile) -> None:
    """One tensor at a time is in memory: as it is stored, unpacked, and in its new dtype."""
    largest = max(file.tensors.values(), key=lambda tensor: tensor.parameters)
    check_fits(
        largest.nbytes + 8 * largest.parameters,
        "a tensor of this GGUF file does not fit into memory; nothing was written",
        file=file.path,
        got=largest.name,
        remedy="free some memory",
    )


def _stored(file: GGUFFile) -> torch.dtype:
    """The dtype of the file's matrices where they share one that transformers stores, else float32."""
    kinds = {file.dtype_of(name) for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    return (kinds.pop() if len(kinds) == 1 else None) or torch.float32


def _check_vocabulary(file: GGUFFile, tokenizer: Any, rows: int) -> None:
    if len(tokenizer) > rows:
        raise RegroupError(
            "the GGUF file has more tokens than its embedding has rows",
            file=file.path,
            expected=f"at most {rows}",
            got=len(tokenizer),
        )


def _write(model: Model, dtype: torch.dtype, stage: Path, request: Request) -> None:
    """Weights, config and generation settings; one tensor is in memory at a time, unless transformers read the file."""
    import transformers

    model.config.dtype = dtype
    model.config.save_pretrained(stage)
    transformers.GenerationConfig.from_model_config(model.config).save_pretrained(stage)
    if model.loaded is not None:
        model.loaded.save_pretrained(stage)
        return
    tensors = model.file.tensors
    specs = {name: (_SPELLED[dtype], tensors[source].shape) for name, source in model.names.items()}
    written = ShardFile(stage / "model.safetensors", specs, {"format": "pt"})
    try:
        with request.listener.writing(written.nbytes) as progress:
            for name, (_, shape) in specs.items():
                written.write(name, rounded(model.read(name), dtype, name))
                progress(dtype.itemsize * int(torch.Size(shape).numel()))
    finally:
        written.close()


def _compare(model: Model, dtype: torch.dtype, stage: Path, tokenizer: Any, request: Request) -> str:
    """Compare with llama.cpp, which reads the file with its own code; without it, with what the file holds."""
    file, inputs = model.file, model_inputs(model.config)
    compared = []
    reason = llama_cpp.unsupported_reason(tensor.kind for tensor in file.tensors.values())
    with request.listener.comparing() as advance:
        if reason is None:
            wanted = llama_cpp.ask(file.path, {"rows": inputs["input_ids"].tolist()})["logits"]
            # Whatever the file's blocks are.
            other, tolerance = llama_cpp.version(), llama_cpp.TOLERANCES[torch.bfloat16]
        else:
            request.notes.append(f"logits were not compared with llama.cpp: {reason}")
            other, tolerance = "its GGUF loader", TOLERANCE
            if model.loaded is not None:
                wanted = logits(model.loaded.float(), inputs)
            else:
                compared.append(check_folder(file.path, stage, dtype))
                wanted = loader_logits(file, model.config, dtype, inputs, request.notes)
        advance(1)
        found = folder_logits(stage, None)
        advance(1)
    if wanted is not None:
        loader = f"transformers {importlib.metadata.version('transformers')}, against {other}"
        compared.insert(0, str(compare(wanted, found, loader, tolerance=tolerance)))
    if tokenizer is not None and llama_cpp.unsupported_reason(()) is None:
        compared.append(check_against_llama_cpp(file.path, tokenizer))
    elif tokenizer is not None:
        request.notes.append("token ids were not compared: nothing else that works here reads the file's tokenizer")
    return "; ".join(compared)
