"""Summarise a checkpoint, a config or a GGUF file, and compute its KV cache for any number of KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .checkpoint import GGUFFile, fetch, headers_of, is_gguf, is_hub_id, open_checkpoint, read_gguf
from .checkpoint.reader import read_json
from .errors import RegroupError
from .files import as_named
from .layout import Layout, detect
from .layout.detect import MAX_HEADS, MAX_LAYERS
from .layout.kv_cache import cache_dtype, kv_cache_bytes
from .opening import layout_of, readable


@dataclass(frozen=True)
class LayerSummary:
    """One attention layer. ``window`` is in tokens, or None; ``rotary_dim`` counts the rotated dimensions per head."""

    name: str
    kind: Literal["self", "cross"]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None
    rotary_dim: int


@dataclass(frozen=True)
class Summary:
    """What ``regroup inspect`` shows.

    Attributes:
        source, format: what was read: ``"safetensors"``, ``"config"`` or ``"gguf"``.
        family: model type; for GGUF its architecture.
        hidden_size, dtype, parameters, tied_embeddings: None where the source does not say.
        layers: the attention layers that keep a KV cache.
        encoder_layers: layers that keep none.
        native_kv_heads: what the stock transformers class holds (see ``Layout``).
    """

    source: str
    format: Literal["safetensors", "config", "gguf"]
    family: str
    hidden_size: int | None
    dtype: str | None
    parameters: int | None
    tied_embeddings: bool | None
    layers: tuple[LayerSummary, ...]
    encoder_layers: int = 0
    native_kv_heads: str | None = None

    def with_kv_heads(self, heads: int) -> Summary:
        """The same model with at most ``heads`` KV heads in every layer."""
        for layer in self.layers:
            if heads < 1 or layer.num_attention_heads % heads:
                raise RegroupError(
                    "the query heads cannot be divided into that many groups",
                    layer=layer.name,
                    expected=f"a divisor of {layer.num_attention_heads}",
                    got=heads,
                    remedy="choose a number that divides the query heads of every layer",
                )
        layers = (replace(x, num_key_value_heads=min(heads, x.num_key_value_heads)) for x in self.layers)
        return replace(self, layers=tuple(layers))

    def kv_bytes(self, dtype: str, *, context: int = 1, batch: int = 1, encoder_context: int | None = None) -> int:
        """Bytes of KV cache (see ``layout.kv_cache.kv_cache_bytes``)."""
        return kv_cache_bytes(self.layers, context=context, batch=batch, encoder_context=encoder_context, dtype=dtype)

    def to_json(
        self, kv_heads: Sequence[int], *, context: int, batch: int, encoder_context: int | None
    ) -> dict[str, Any]:
        """Everything that the command prints, as plain data; bytes throughout.

        The cache is given in several dtypes, by safetensors name; ``kv_cache_dtype`` is the one that the command shows
        first and that a conversion counts in: the source's own, or 16 bits where that is not known.
        """
        own, _ = cache_dtype(self.dtype)

        def costs(summary: Summary) -> dict[str, Any]:
            return {
                dtype: {
                    "kv_bytes_per_token": summary.kv_bytes(dtype),
                    "kv_bytes": summary.kv_bytes(dtype, context=context, batch=batch, encoder_context=encoder_context),
                }
                for dtype in dict.fromkeys((own, "F32", "BF16", "F8"))
            }

        return {
            **asdict(self),
            "context": context,
            "batch": batch,
            "encoder_context": encoder_context,
            "kv_cache_dtype": own,
            "kv_cache": {"now": costs(self), **{str(g): costs(self.with_kv_heads(g)) for g in kv_heads}},
        }


def inspect(source: str | Path, *, revision: str | None = None, allow_pickle: bool = False) -> Summary:
    """Summarise a folder, a ``config.json``, a ``.gguf`` file, or a hub repository (its headers only).

    Args:
        source: a path, or a hub id.
        revision: branch, tag or commit of a hub repository.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there is nothing else.

    Returns:
        Where the heads are, and what their KV cache costs; no weight is read.

    Raises:
        RegroupError: there is no such source, or its layout is not known.

    Example:
        >>> regroup.inspect("meta-llama/Llama-2-7b-hf").kv_bytes("BF16", context=4096)  # doctest: +SKIP
    """
    with readable(str(source), revision=revision, allow_pickle=allow_pickle) as place:
        return replace(_summary(place, revision), source=str(source))


def _summary(source: str, revision: str | None) -> Summary:
    path = as_named(source)
    if path.suffix.lower() == ".gguf" or is_gguf(path):
        return _from_gguf(path)
    if path.suffix == ".safetensors":
        raise RegroupError(
            "a single file of weights does not say what it belongs to",
            file=path,
            expected="a folder with config.json, a config.json or a .gguf file",
            remedy="give the folder",
        )
    if path.is_file():
        return _from_layout(source, detect(read_json(path)))
    if path.is_dir() and (path / "config.json").exists() and not _has_weights(path):
        return _from_layout(source, detect(read_json(path / "config.json")))
    if not path.exists() and is_hub_id(source):
        config, tensors = headers_of(source, revision=revision)
        return _from_layout(source, detect(config, tensors))
    return _from_layout(source, layout_of(open_checkpoint(fetch(source, revision=revision))))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")) or any(folder.glob("*.pt"))


def _from_layout(source: str, layout: Layout) -> Summary:
    return Summary(
        source=source,
        format="config" if layout.parameters is None else "safetensors",
        family=layout.family,
        hidden_size=layout.hidden_size,
        dtype=layout.dtype,
        parameters=layout.parameters,
        tied_embeddings=layout.tied_embeddings,
        layers=tuple(
            LayerSummary(
                name=layer.name,
                kind=layer.kind,
                num_attention_heads=layer.num_attention_heads,
                num_key_value_heads=layer.num_key_value_heads,
                head_dim=layer.head_dim,
                window=layer.window,
                rotary_dim=layer.rotary.dim if layer.rotary else 0,
            )
            for layer in layout.layers
        ),
        encoder_layers=layout.encoder_layers,
        native_kv_heads=layout.native_kv_heads,
    )


def _from_gguf(path: Path) -> Summary:
    file = read_gguf(path)
    blocks = file.number("block_count", least=1, most=MAX_LAYERS)
    _check_blocks(file, blocks)
    heads = _per_layer(file.numbers("attention.head_count", most=MAX_HEADS), blocks, path)
    kv_heads = _per_layer(file.numbers("attention.head_count_kv", heads, most=MAX_HEADS), blocks, path)
    hidden = file.number("embedding_length", least=1)
    # Files of mixed models list layers without attention with no heads; they keep no cache.
    present = [index for index in range(blocks) if heads[index] and kv_heads[index]]
    if not present:
        raise RegroupError("no layer of this GGUF file has attention heads", file=path)
    for index in present:
        if heads[index] % kv_heads[index]:
            raise RegroupError(
                "the query heads cannot be divided among the KV heads of this GGUF file",
                file=path,
                layer=f"blk.{index}",
                expected=f"KV heads that divide {heads[index]}",
                got=kv_heads[index],
            )
    head_dim = file.number("attention.key_length", hidden // max(heads), least=1)
    if (value_dim := file.number("attention.value_length", head_dim)) != head_dim:
        raise RegroupError(
            "keys and values of this model differ in width, which is not described here",
            file=path,
            got=f"keys {head_dim}, values {value_dim}",
        )
    for index in present:
        _check_widths(file, index, kv_heads[index] * head_dim)
    window = file.values.get(f"{file.architecture}.attention.sliding_window")
    return Summary(
        source=str(path),
        format="gguf",
        family=file.architecture,
        hidden_size=hidden,
        dtype=None,
        parameters=file.parameters,
        tied_embeddings=None,
        layers=tuple(
            LayerSummary(
                name=f"blk.{index}",
                kind="self",
                num_attention_heads=heads[index],
                num_key_value_heads=kv_heads[index],
                head_dim=head_dim,
                window=window if type(window) is int and window > 0 else None,
                rotary_dim=file.number("rope.dimension_count", 0),
            )
            for index in present
        ),
    )


def _check_blocks(file: GGUFFile, blocks: int) -> None:
    """A count of layers that the tensors contradict would make every figure wrong."""
    numbers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    strange = [text for text in numbers if not text.isdecimal()]
    found = max((int(text) for text in numbers - set(strange)), default=blocks - 1) + 1
    if strange or found != blocks or len(numbers) not in (0, blocks):
        raise RegroupError(
            "the GGUF header counts other layers than the file has",
            file=file.path,
            expected=f"tensors of {blocks} layers",
            got=f"{len(numbers)} layers, up to blk.{found - 1}" if not strange else f"blk.{strange[0][:40]}",
        )


def _check_widths(file: GGUFFile, index: int, width: int) -> None:
    for part in ("attn_k", "attn_v"):
        tensor = file.tensors.get(f"blk.{index}.{part}.weight")
        if tensor is not None and tensor.shape[0] != width:
            raise RegroupError(
                "a tensor of the GGUF file has another width than its header says",
                file=file.path,
                tensor=tensor.name,
                expected=f"{width}: KV heads times head_dim",
                got=tensor.shape[0],
            )


def _per_layer(value: Any, blocks: int, path: Path) -> list[int]:
    """One number for each layer, from one number for all or a list."""
    if isinstance(value, list) and len(value) != blocks:
        raise RegroupError(
            "the GGUF header counts its layers in two ways",
            file=path,
            expected=f"heads of {blocks} layers",
            got=f"heads of {len(value)} layers",
        )
    return value if isinstance(value, list) else [value] * blocks
