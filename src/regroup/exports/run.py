"""Export a checkpoint to the form that an engine reads."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import is_gguf, staged_folder
from ..checkpoint.header import nbytes_of
from ..checkpoint.writer import check_destination, existing_parent
from ..errors import RegroupError
from ..extras import require
from ..families import FAMILIES
from ..files import as_named
from ..listener import Listener
from ..modeling.expected import check_loadable
from ..opening import Source, open_source
from .check import check_length, compare, expect_memory, folder_logits
from .folder import CONFIGURATION_FILE, write_folder
from .heads import (
    block_config,
    check_served,
    config_with,
    heads_of,
    holds,
    repeated,
    source_config,
    spell,
    wanted_heads,
)
from .request import DTYPES, TARGETS, Exported, Request


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
        expand: repeat KV heads until a stock class supports them: same logits, larger cache.
        tensor_parallel: devices that will share each layer. KV heads fewer than that are repeated where the reader does
            not do so itself.
        dtype: of the matrices of a GGUF file, or of a checkpoint made from one; the source's by default.
        check: load the result and compare its logits with the source's, in float32, one model at a time.
        revision, allow_pickle: see ``open_source``.
        listener: callbacks for progress.

    Raises:
        RegroupError: the target cannot hold this model, the comparison does not fit into memory, or the result's
            logits differ from the source's; nothing is left behind.
    """
    if to not in TARGETS:
        raise RegroupError("this export target is not known", expected=" or ".join(TARGETS), got=to)
    if dtype is not None and dtype not in DTYPES:
        raise RegroupError("this dtype is not supported", expected=" or ".join(DTYPES), got=dtype)
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
    if request.to == "vllm" and FAMILIES[layout.family].vllm == "none":
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
        request.notes.append("engines read the blocks through the config class in the folder: --trust-remote-code")
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
        expect_memory(opened, changed, request.listener)
    with staged_folder(destination) as stage:
        with request.listener.writing(nbytes) as progress:
            write_folder(checkpoint, stage, config, changed, note=f"{form}.", progress=progress)
        checked = _compare(opened, stage, request.listener) if request.check else None
    if blocks:
        request.notes.append("the check ran transformers' Llama layers on these blocks, not vLLM")
    return Exported(destination, form, checked, tuple(request.notes))


def _compare(opened: Source, stage: Path, listener: Listener) -> str:
    import transformers

    length = check_length(opened)
    with listener.comparing() as advance, open_source(str(stage)) as made:
        wanted = folder_logits(opened.checkpoint.folder, source_config(opened), length=length)
        advance(1)
        config = source_config(made)
        found = folder_logits(stage, config, length=length)
        advance(1)
    own = " with regroup's classes" if "regroup" in config else ""
    return str(compare(wanted, found, f"transformers {transformers.__version__}{own}"))
