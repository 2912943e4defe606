"""Write a GGUF file for llama.cpp: weights under its names, metadata and tokenizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

from ..checkpoint import staged_file
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.writer import check_destination
from ..errors import RegroupError
from ..families import FAMILIES
from ..listener import Listener
from ..modeling import load_tokenizer
from ..modeling.lm_head import require_head
from ..opening import Source
from ..solver.rewrite import Change
from .check import expect_memory
from .gguf_check import check_gguf
from .gguf_models import rounded
from .gguf_tokenizer import Vocabulary, vocabulary
from .heads import heads_of, repeated, source_config, spell, wanted_heads
from .request import Exported, Request

_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_GGML_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "deci": gguf.MODEL_ARCH.DECI}
_COMPUTED = "rotary_emb.inv_freq"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def export_gguf(opened: Source, destination: Path, request: Request) -> Exported:
    """Write a checkpoint as a GGUF file and compare it with its source (see ``export``).

    Raises:
        RegroupError: llama.cpp lacks the layers, the rotary scaling or the tokenizer, a number does not fit the dtype,
            or the file's logits differ from the source's.
    """
    checkpoint, layout = opened.checkpoint, opened.layout
    heads = wanted_heads(opened, request)
    architecture = FAMILIES[layout.family].gguf
    if architecture is None:
        raise RegroupError(
            "this family is not written as GGUF here",
            file=opened.folder,
            expected=" or ".join(
                sorted({family.stock_type for family in FAMILIES.values() if family.gguf is not None})
            ),
            got=layout.family,
            remedy="export it with --to hf and try llama.cpp's own converter, if a stock class holds it",
        )
    require_head(opened.checkpoint.folder)  # llama.cpp would take the embedding for one that is not there
    uniform = len(set(heads)) == 1
    arch = architecture if uniform else "deci"
    config = _config(opened)
    dtype = getattr(torch, request.dtype) if request.dtype else TORCH_DTYPES[layout.dtype or "F32"]
    if dtype not in _GGML_TYPES:
        raise RegroupError("GGUF has no such dtype", got=str(dtype), remedy="choose one with --dtype")
    if not destination.suffix:
        raise RegroupError(
            "the name of a GGUF file needs a suffix", got=destination, remedy=f"call it {destination.name}.gguf"
        )
    changed = {} if heads == heads_of(layout) else repeated(layout, heads[0], checkpoint.tensors)
    vocab = _vocabulary(opened, config.vocab_size, request)
    windows = {layer.window for layer in layout.layers if layer.window is not None}
    if windows:
        request.notes.append(
            f"llama.cpp's {arch} layers attend to everything, these to the last {min(windows)} tokens: the answers are "
            "the same up to that length"
        )
    elements = sum(math.prod((changed.get(name) or entry).shape) for name, entry in checkpoint.tensors.items())
    check_destination(destination, opened.folder, elements * dtype.itemsize)
    if request.check:
        expect_memory(opened, changed, request.listener)
    with staged_file(destination) as file:
        with contextlib.closing(gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[arch]])) as writer:
            _describe(writer, config, heads, layout.layers[0].head_dim, _FILE_TYPES[dtype], opened.folder.name)
            if vocab is None:
                writer.add_tokenizer_model("no_vocab")
            else:
                vocab.add_to(writer)
            _write_tensors(writer, opened, changed, arch, config, heads, dtype, request.listener)
        checked = None
        if request.check:
            checked = check_gguf(opened, file, config, dtype, vocab, request)
    form = f"GGUF, architecture {arch}, {str(dtype).removeprefix('torch.')}, KV heads: {_spelled(heads)}"
    if vocab is not None:
        form += f", tokenizer {vocab.model}" + (f" (pre-tokenizer {vocab.pre})" if vocab.model == "gpt2" else "")
    return Exported(destination, form, checked, tuple(request.notes))


def _spelled(heads: tuple[int, ...]) -> str:
    return str(heads[0]) if len(set(heads)) == 1 else ", ".join(map(str, heads))


def _config(opened: Source) -> Any:
    """The transformers config of the source, of which llama.cpp's layers can say everything.

    Raises:
        RegroupError: something that they do not have.
    """
    import transformers

    plain = source_config(opened)
    config = transformers.AutoConfig.for_model(plain["model_type"]).from_dict(plain)
    layer = opened.layout.layers[0]
    kind = config.rope_parameters.get("rope_type", "default")
    for what, expected, got in (
        ("activation", ("silu",), getattr(config, "hidden_act", "silu")),
        ("rotary scaling", ("default", "linear", "llama3"), kind),
        ("rotated dimensions", (layer.head_dim,), layer.rotary.dim if layer.rotary else 0),
    ):
        if got not in expected:
            raise RegroupError(
                f"this model's {what} cannot be written as GGUF here",
                file="config.json",
                expected=" or ".join(map(str, expected)),
                got=got,
            )
    return config


def _vocabulary(opened: Source, size: int, request: Request) -> Vocabulary | None:
    if not any((opened.folder / name).is_file() for name in _TOKENIZER_FILES):
        request.notes.append("the checkpoint has no tokenizer, so the file has none: give the engine token ids")
        return None
    found = vocabulary(load_tokenizer(opened.folder), size)
    request.notes.extend(f"llama.cpp {difference}, unlike this tokenizer" for difference in found.differences)
    return found


def _describe(
    writer: gguf.GGUFWriter,
    config: Any,
    heads: tuple[int, ...],
    head_dim: int,
    file_type: gguf.LlamaFileType,
    name: str,
) -> None:
    layers = config.num_hidden_layers
    rope = config.rope_parameters
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    uniform = len(set(heads)) == 1
    # One number is what every reader of uniform models understands; llama.cpp's deci asks for lists.
    writer.add_feed_forward_length(config.intermediate_size if uniform else [config.intermediate_size] * layers)
    writer.add_head_count(config.num_attention_heads if uniform else [config.num_attention_heads] * layers)
    writer.add_head_count_kv(heads[0] if uniform else list(heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _write_tensors(
    writer: gguf.GGUFWriter,
    opened: Source,
    changed: dict[str, Change],
    arch: str,
    config: Any,
    heads: tuple[int, ...],
    dtype: torch.dtype,
    listener: Listener,
) -> None:
    """Header first, then one tensor at a time."""
    made: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]] = []
    factors = _frequency_factors(config)
    if factors is not None:
        if arch == "qwen2":
            raise RegroupError(
                "this model's rotary scaling cannot be written as GGUF here",
                expected="default or linear for qwen2",
                got=config.rope_parameters["rope_type"],
            )
        made.append(("rope_freqs.weight", torch.float32, tuple(factors.shape), lambda: factors))
    made += _tensors(opened, changed, arch, heads, dtype)
    sizes = [kind.itemsize * math.prod(shape) for _, kind, shape, _ in made]
    for (name, kind, shape, _), nbytes in zip(made, sizes, strict=True):
        writer.add_tensor_info(name, shape, _NOT_BYTES, nbytes, raw_dtype=_GGML_TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with listener.writing(sum(sizes)) as progress:
        for (name, kind, _, read), nbytes in zip(made, sizes, strict=True):
            writer.write_tensor_data(rounded(read(), kind, name).contiguous().view(torch.uint8).numpy())
            progress(nbytes)


# Shapes are given in elements; for arrays of bytes the library would take them to be in bytes.
_NOT_BYTES: Any = None


def _tensors(
    opened: Source, changed: dict[str, Change], arch: str, heads: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Name, dtype and shape of every tensor of the file, and how to make it."""
    checkpoint, layout = opened.checkpoint, opened.layout
    names = gguf.get_tensor_name_map(_ARCHITECTURES[arch], len(layout.layers))
    prefix = layout.layers[0].name.removesuffix(layout.layers[0].module)
    tied = layout.tied_embeddings
    # llama.cpp's llama and deci rotate neighbours, transformers dimensions i and i + D / 2; its qwen2 does as
    # transformers. So the rows of each head are reordered, by which the dot products of queries and keys stay.
    turned = {
        slot.tensor: count
        for layer, groups in zip(layout.layers, heads, strict=True)
        for part, count in ((layer.query, layer.num_attention_heads), (layer.key, groups))
        for slot in part.slots()
        if arch != "qwen2"
    }
    for name, entry in checkpoint.tensors.items():
        if name.endswith(_COMPUTED) or (tied and name == "lm_head.weight"):
            continue
        full = name if name.startswith(("model.", "lm_head.")) else f"model.{name.removeprefix(prefix)}"
        target = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise RegroupError(
                "llama.cpp has no place for a tensor of this checkpoint",
                file=checkpoint.folder / checkpoint.file_of(name),
                tensor=name,
                got=spell(layout),
            )
        change = changed.get(name)
        shape = entry.shape if change is None else change.shape

        def read(name: str = name, change: Change | None = change) -> torch.Tensor:
            tensor = checkpoint.read(name) if change is None else change.run(name, checkpoint.read)
            return tensor if name not in turned else neighbours(tensor, turned[name])

        yield target, dtype if len(shape) > 1 else torch.float32, shape, read


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads · D, …) with dimension i of each head at 2i and dimension i + D / 2 at 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _frequency_factors(config: Any) -> torch.Tensor | None:
    """(D / 2,): by how much Llama 3 slows down each frequency; None where nothing does, or a key of GGUF says it."""
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * slowed.numel()
    return config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim) / slowed.double()
