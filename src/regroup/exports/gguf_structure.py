"""Compare a GGUF file with a checkpoint tensor by tensor and key by key, by other code than wrote it.

The file is read with the format's own library, rows are ordered one by one instead of by reshaping, and names are
mapped by the table that the direction under test does not use.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors import safe_open

from ..errors import RegroupError
from ..layout import Layout
from .gguf_models import FREQUENCIES, llama3_factors, target_of

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def turned_rows(heads: int, head_dim: int) -> torch.Tensor:
    """(heads · D,): which row of a checkpoint's query or key projection each row of a file of llama.cpp's is.

    Its llama layers rotate dimensions 2i and 2i + 1 together, transformers i and i + D / 2.
    """
    rows = [
        head * head_dim + half * (head_dim // 2) + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return torch.tensor(rows)


def _tensors(reader: gguf.GGUFReader) -> dict[str, Callable[[], torch.Tensor]]:
    def read(tensor: Any) -> torch.Tensor:
        shape = [int(n) for n in reversed(tensor.shape)]
        dtype = _DTYPES.get(tensor.tensor_type.name)
        if dtype is None:
            return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).view(shape)
        return torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8).view(dtype).view(shape)

    return {tensor.name: lambda tensor=tensor: read(tensor) for tensor in reader.tensors}


def _fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}


def _same(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit, but for which zero and which NaN it is."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype or not found.equal(wanted):
        raise RegroupError(
            "a tensor of the result differs from its source's; nothing was written",
            tensor=name,
            expected=f"{str(wanted.dtype)[6:]} {tuple(wanted.shape)}",
            got=f"{str(found.dtype)[6:]} {tuple(found.shape)}" if found.shape != wanted.shape else "other values",
            remedy="please report it with the checkpoint's config.json",
        )


def _same_names(found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise RegroupError(
            "the result has other tensors than its source; nothing was written",
            expected=", ".join(sorted(wanted - found)[:5]) or "none of these",
            got=", ".join(sorted(found - wanted)[:5]) or "none of these",
            remedy="please report it with the checkpoint's config.json",
        )


def _reader() -> str:
    return f"gguf {importlib.metadata.version('gguf')}"


def check_folder(file: Path, folder: Path, dtype: torch.dtype) -> str:
    """Compare a checkpoint that was made of a GGUF file with the file.

    Args:
        file: of an architecture of Llama's kind.
        folder: the checkpoint, in one safetensors file.
        dtype: of the checkpoint.

    Returns:
        What was compared.

    Raises:
        RegroupError: a tensor is missing, or is another one.
    """
    reader = gguf.GGUFReader(str(file))
    facts, source = _fields(reader), _tensors(reader)
    arch = facts["general.architecture"]
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[arch],
        facts[f"{arch}.block_count"],
    )
    heads = _one(facts[f"{arch}.attention.head_count"])
    counts = {"attn_q": heads, "attn_k": _one(facts.get(f"{arch}.attention.head_count_kv", heads))}
    taken = {FREQUENCIES} & set(source)
    with safe_open(folder / "model.safetensors", framework="pt") as made:
        for name in made.keys():  # noqa: SIM118 - no mapping
            target = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
            _same_names({target}, {target} & set(source))
            rows = source[target]()
            part = target.split(".")[2] if target.startswith("blk.") else ""
            if arch == "llama" and part in counts:
                order = turned_rows(counts[part], rows.shape[0] // counts[part])
                rows = torch.empty_like(rows).index_copy_(0, order, rows)
            _same(name, made.get_tensor(name), rows.to(dtype))
            taken.add(target)
    _same_names(taken, set(source))
    return f"{_reader()}: {len(taken)} tensors of the file are in the checkpoint, bit for bit"


def _one(value: Any) -> int:
    return value[0] if isinstance(value, list) else value


def check_file(
    file: Path, layout: Layout, config: Any, tensors: Mapping[str, Any], read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Compare a GGUF file with the checkpoint that it was made of.

    Args:
        file: the file.
        layout: of the checkpoint.
        config: its transformers config.
        tensors: its tensors by name.
        read: reads one of them.
        dtype: of the file's matrices; vectors are float32.

    Returns:
        What was compared.

    Raises:
        RegroupError: a tensor or a key is missing, or says something else.
    """
    reader = gguf.GGUFReader(str(file))
    facts, found = _fields(reader), _tensors(reader)
    arch = facts["general.architecture"]
    layers, groups = layout.layers, facts[f"{arch}.attention.head_count_kv"]
    per_layer = groups if isinstance(groups, list) else [groups] * len(layers)
    prefix = layers[0].name.removesuffix(layers[0].module)
    # A tied head is the embedding, and frequencies are computed.
    sources = {target_of(name) for name in found if name != FREQUENCIES}
    kept = {
        _below(name, prefix)
        for name in tensors
        if not name.endswith("rotary_emb.inv_freq") and not (layout.tied_embeddings and name == "lm_head.weight")
    }
    _same_names({str(name) for name in sources}, kept)
    stored = {_below(name, prefix): name for name in tensors}
    for name in found:
        if name == FREQUENCIES:
            continue
        wanted = read(stored[target_of(name) or ""])
        block, part = ([*name.split("."), "", ""])[1:3] if name.startswith("blk.") else ("", "")
        if part in ("attn_q", "attn_k", "attn_v"):
            layer = layers[int(block)]
            before, after = layer.num_key_value_heads, per_layer[int(block)]
            if part != "attn_q" and after != before:
                split = wanted.unflatten(0, (before, layer.head_dim))
                wanted = torch.cat([split[head * before // after] for head in range(after)])
            if part != "attn_v" and arch != "qwen2":
                heads = layer.num_attention_heads if part == "attn_q" else after
                wanted = wanted[turned_rows(heads, layer.head_dim)]
        _same(name, found[name](), wanted.to(dtype if wanted.ndim > 1 else torch.float32))
    count = _check_keys(facts, arch, layout, config, per_layer, found)
    return f"{_reader()}: {len(found)} tensors bit for bit and {count} settings are the checkpoint's"


def _below(name: str, prefix: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name.removeprefix(prefix)}"


def _check_keys(
    facts: Mapping[str, Any], arch: str, layout: Layout, config: Any, groups: list[int], found: Mapping[str, Any]
) -> int:
    layer, count = layout.layers[0], len(layout.layers)
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    wanted: dict[str, Any] = {
        "block_count": count,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": [one.num_attention_heads for one in layout.layers],
        "attention.head_count_kv": groups,
        "attention.key_length": layer.head_dim,
        "attention.value_length": layer.head_dim,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "rope.dimension_count": layer.head_dim,
        "rope.freq_base": np.float32(rope["rope_theta"]),
        "rope.scaling.type": "linear" if kind == "linear" else None,
        "rope.scaling.factor": np.float32(rope["factor"]) if kind == "linear" else None,
    }
    for key, value in wanted.items():
        said = facts.get(f"{arch}.{key}")
        # One number may stand for all layers, or a list for one number.
        spelled = [value] * count if isinstance(said, list) and not isinstance(value, list) else value
        if isinstance(spelled, list) and not isinstance(said, list):
            said = [said] * count
        if said != spelled:
            raise RegroupError(
                "a setting of the result differs from its source's; nothing was written",
                expected=f"{arch}.{key} = {value}",
                got=said,
                remedy="please report it with the checkpoint's config.json",
            )
    if (kind == "llama3") != (FREQUENCIES in found):
        _same_names({FREQUENCIES} & set(found), {FREQUENCIES} if kind == "llama3" else set())
    if kind == "llama3":
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, layer.head_dim, 2) / layer.head_dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        own = llama3_factors(waves, rope["factor"], low, high, rope["original_max_position_embeddings"])
        # transformers computes its own in float32.
        if not np.allclose(found[FREQUENCIES]().double().numpy(), own, rtol=1e-5, atol=0):
            _same(FREQUENCIES, found[FREQUENCIES](), torch.from_numpy(own).float())
    return len(wanted)
