"""From a checkpoint to a form that an engine reads: ``export``, behind `regroup export`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import is_gguf, staged_folder
from ..checkpoint.header import nbytes_of
from ..checkpoint.writer import check_destination, existing_parent
from ..errors import RegroupError
from ..extras import require
from ..files import as_named
from ..listener import Listener
from ..modeling.expected import check_loadable
from ..opening import Source, open_source
from ..writer.rewrite import Change
from .folder import CONFIGURATION_FILE, write_folder
from .heads import (
    FOREIGN,
    LLAMA_LAYERS,
    block_config,
    check_devices,
    check_served,
    config_with,
    heads_of,
    holds,
    repeated,
    spell,
    stock_heads,
)

TARGETS = ("hf", "vllm", "gguf")
# What a stock class holds, by ``Layout.native_kv_heads``.
_HELD = {
    "any": "the same number in every layer",
    "mqa": "1 in every layer, or as many as query heads",
    "none": "as many as query heads: this family knows no grouped heads",
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        destination: the folder, or the GGUF file.
        form: what it is, for people.
        checked: what was compared with the source and how far apart it was; None where nothing was.
        unchecked: why nothing was compared; None where something was.
        notes: what the user should know of it.
    """

    destination: Path
    form: str
    checked: str | None
    unchecked: str | None
    notes: tuple[str, ...] = ()


@dataclass
class Request:
    """What is asked of an export, beside source and destination (see ``export``)."""

    to: str
    expand: bool = False
    tensor_parallel: int | None = None
    dtype: str | None = None
    check: bool = True
    told: Listener = field(default_factory=Listener)
    notes: list[str] = field(default_factory=list)


def export(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    expand: bool = False,
    tensor_parallel: int | None = None,
    dtype: str | None = None,
    check: bool = True,
    revision: str | None = None,
    allow_pickle: bool = False,
    listener: Listener | None = None,
) -> Exported:
    """Write a checkpoint in the form that an engine reads, and compare it with its source before it appears.

    Args:
        source: a checkpoint folder, a hub id, or a GGUF file (to ``"hf"`` alone).
        destination: what is made, and must not exist yet: a folder, for ``"gguf"`` a file.
        to: ``"hf"``, a checkpoint of a stock transformers class; ``"vllm"``, that or, where layers differ in their KV
            heads, the Nemotron-NAS layout; ``"gguf"``, llama.cpp's file.
        expand: repeat KV heads until a stock class holds them: same answers, larger cache.
        tensor_parallel: devices that will share each layer. KV heads fewer than that are repeated where the reader does
            not do so itself.
        dtype: of the matrices of a GGUF file, or of a checkpoint made from one; the source's by default.
        check: load the result and compare its logits with the source's, in float32, one model at a time.
        revision, allow_pickle: see ``open_source``.
        listener: told how it goes on.

    Raises:
        RegroupError: the target holds no such model, memory holds no comparison, or what was made does not answer as
            its source does; nothing is left behind.
    """
    if to not in TARGETS:
        raise RegroupError("this export target is not known", expected=" or ".join(TARGETS), got=to)
    if dtype is not None and dtype not in DTYPES:
        raise RegroupError("this dtype is not known here", expected=" or ".join(DTYPES), got=dtype)
    request = Request(to, expand, tensor_parallel, dtype, check, listener or Listener())
    file, target = as_named(source), as_named(destination)
    if to == "gguf" or is_gguf(file):
        require("gguf", "gguf")
    if is_gguf(file):
        from .gguf_source import export_from_gguf

        return export_from_gguf(file, target, request)
    if to == "gguf" and tensor_parallel is not None:
        raise RegroupError(
            "a GGUF file is not divided by heads",
            got=f"--tensor-parallel {tensor_parallel}",
            remedy="leave it out: llama.cpp splits layers or rows of matrices by itself",
        )
    if to != "gguf" and dtype is not None:
        raise RegroupError(
            "the tensors are copied as they are stored", got=f"--dtype {dtype}", remedy="leave --dtype out"
        )
    existing_parent(target)  # refuses what can have no folder
    scratch = target.absolute().parent
    with open_source(str(source), revision=revision, allow_pickle=allow_pickle, scratch=scratch) as opened:
        check_loadable(source_config(opened), opened.checkpoint.tensors, opened.folder)
        if to == "gguf":
            from .gguf_target import export_gguf

            return export_gguf(opened, target, request)
        return _export_folder(opened, target, request)


def _export_folder(opened: Source, destination: Path, request: Request) -> Exported:
    checkpoint, layout = opened.checkpoint, opened.layout
    if request.to == "vllm" and layout.encoder_layers and layout.family != "whisper":
        raise RegroupError(
            "vLLM serves no encoder-decoder of this family",
            got=layout.family,
            remedy="export it with --to hf, for transformers or for CTranslate2's converter",
        )
    if request.to == "vllm":
        check_served(checkpoint.config, layout)
    if opened.ignores_code:
        request.notes.append("the code that the checkpoint brings along was neither run nor copied")
    heads = wanted_heads(opened, request)
    changed = {} if heads == heads_of(layout) else repeated(layout, heads[0], checkpoint.tensors)
    blocks = False
    if holds(layout, heads):
        config = config_with(checkpoint.config, layout, heads)
        form = f"a checkpoint of the stock {config['model_type']} class of transformers"
    elif request.to == "vllm":
        config = block_config(checkpoint.config, layout)
        config["auto_map"] = {"AutoConfig": f"{CONFIGURATION_FILE.stem}.NemotronNASConfig"}
        form, blocks = "the Nemotron-NAS layout (DeciLMForCausalLM): block_configs with KV heads by layer", True
        request.notes.append("engines read the blocks through the config class beside it: --trust-remote-code")
        if any("ffn_mult" not in block["ffn"] for block in config["block_configs"]):
            request.notes.append(
                "the feed-forward width is not a multiple of 256, so blocks name intermediate_size instead of "
                "ffn_mult: llama.cpp's converter and older engines do not read that (--to gguf writes the file itself)"
            )
    else:
        config = config_with(checkpoint.config, layout, heads)
        form = f"regroup's form of {config['model_type']}, with trust_remote_code=True: {spell(layout)}"
    made = {name: changed.get(name) or entry for name, entry in checkpoint.tensors.items()}
    nbytes = sum(nbytes_of(one.dtype, one.shape) for one in made.values())
    if not blocks:  # those are read by engines alone
        check_loadable(config, made, destination)
    check_destination(destination, opened.folder, nbytes)
    if request.check:
        foresee_check(opened, changed, request.told)
    with staged_folder(destination) as stage:
        with request.told.writing(nbytes) as progress:
            write_folder(checkpoint, stage, config, changed, note=f"{form}.", progress=progress)
        checked = _compare(opened, stage, request.told) if request.check else None
    if blocks:
        request.notes.append("the check ran transformers' Llama layers on these blocks, not vLLM")
    return Exported(destination, form, checked, None if checked else "--no-check", tuple(request.notes))


def wanted_heads(opened: Source, request: Request) -> tuple[int, ...]:
    """The KV heads of each layer afterwards.

    Raises:
        RegroupError: the target holds no such heads, or they cannot be spread over the devices.
    """
    layout, devices = opened.layout, request.tensor_parallel
    heads = heads_of(layout)
    if devices is not None:
        check_devices(layout, devices)
    stock = holds(layout, heads)
    if request.expand and not stock:
        heads = (stock_heads(layout),) * len(heads)
        request.notes.append(
            f"KV heads were repeated ({spell(layout)}, now {heads[0]} in every layer): the cache grows with them"
        )
    elif request.to == "hf" and not stock and opened.checkpoint.config.get("model_type") not in FOREIGN:
        engines = "export it with --to vllm or --to gguf, " if layout.family in LLAMA_LAYERS else ""
        raise RegroupError(
            "no stock class of transformers holds these KV heads",
            file=opened.folder,
            expected=_HELD[layout.native_kv_heads],
            got=spell(layout),
            remedy=f"load it as it is with trust_remote_code=True, {engines}or repeat KV heads until a stock class "
            "holds them: --expand",
        )
    if devices is not None and min(heads) < devices:
        few = f"{min(heads)} KV heads for {devices} devices"
        if request.to == "vllm":
            request.notes.append(f"{few}: vLLM gives each device a copy; the cache does not shrink with more devices")
        elif layout.native_kv_heads == "any" and len(set(heads)) == 1:
            request.notes.append(f"{few}: each KV head was repeated {devices // heads[0]} times, one for each device")
            heads = (devices,) * len(heads)
        else:
            raise RegroupError(
                "the KV heads cannot be divided over the tensor-parallel devices",
                expected=f"at least {devices} in every layer",
                got=spell(layout),
                remedy="add --expand",
            )
    return heads


def source_config(opened: Source) -> dict[str, Any]:
    """The config by which the source loads as it is, whatever layout its own config is in."""
    return config_with(opened.checkpoint.config, opened.layout, heads_of(opened.layout))


def check_length(opened: Source) -> int:
    """Positions that a check runs over: at most a window's, so that engines without windows answer alike."""
    from .check import LENGTH

    return min([LENGTH, *(layer.window for layer in opened.layout.layers if layer.window is not None)])


def foresee_check(opened: Source, changed: Mapping[str, Change], told: Listener) -> None:
    """Say what memory the check at the end takes, from the headers (see ``check_memory``)."""
    from .check import check_memory

    tensors = opened.checkpoint.tensors
    parameters = sum(math.prod((changed.get(name) or entry).shape) for name, entry in tensors.items())
    check_memory(opened.folder, parameters, opened.checkpoint.config.get("vocab_size", 0), told)


def _compare(opened: Source, stage: Path, told: Listener) -> str:
    import transformers

    from .check import compare, folder_logits

    length = check_length(opened)
    with told.comparing() as answered, open_source(str(stage)) as made:
        wanted = folder_logits(opened.checkpoint.folder, source_config(opened), length=length)
        answered(1)
        config = source_config(made)
        found = folder_logits(stage, config, length=length)
        answered(1)
    own = " with regroup's classes" if "regroup" in config else ""
    return str(compare(wanted, found, f"transformers {transformers.__version__}{own}"))
