"""Models to benchmark: the config of a name, the costs of a step, and the model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import fetch, headers_of, is_hub_id, open_checkpoint, refuse_gguf
from ..checkpoint.reader import read_json
from ..errors import RegroupError
from ..files import as_named
from ..modeling.expected import check_loadable, refuse_kernels
from ..modeling.spelled import runnable
from .roofline import DecodingLayer, Experts, Weights
from .variants import decoder_layers, variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model to benchmark, described by its config.

    Attributes:
        config: its ``config.json``.
        kv_heads: num_key_value_heads of every layer; None if layers differ.
        attention: its attention layers.
        weights: the weights that a step reads.
        parameters: number of parameters in memory; without an encoder, whose output is random.
        layers, full_layers: decoder layers of this model, and of the whole model.
        vocabulary, hidden, intermediate: vocabulary size, hidden size and feed-forward size.
        folder: the folder of its weights; None: random weights.
    """

    config: dict[str, Any]
    kv_heads: int | None
    attention: tuple[DecodingLayer, ...]
    weights: Weights
    parameters: int
    layers: int
    full_layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    folder: Path | None

    @property
    def is_encoder_decoder(self) -> bool:
        return any(layer.kind == "cross" for layer in self.attention)


def read_config(source: str, *, revision: str | None = None) -> tuple[dict[str, Any], Path | None]:
    """The config of a model, and the folder with its weights or None.

    Args:
        source: a checkpoint folder, a folder with a config alone, a ``config.json``, or a hub id, of which
            only config and headers are downloaded.

    Raises:
        RegroupError: it is none of these.
    """
    path = as_named(source)
    refuse_gguf(path)
    if path.is_file():
        return read_json(path), None
    if not path.exists() and is_hub_id(source):
        return dict(headers_of(source, revision=revision)[0]), None
    folder = fetch(source, revision=revision)
    if not (folder / "config.json").is_file():
        raise RegroupError("the folder is not a checkpoint", file=folder, expected="a config.json in it")
    return read_json(folder / "config.json"), folder if any(folder.glob("*.safetensors")) else None


def describe(
    config: Mapping[str, Any], *, kv_heads: int | None, layers: int | None, folder: Path | None = None
) -> Model:
    """Describe a model of this config with other KV heads or fewer layers.

    Args:
        folder: the weights of ``config``; they are used if nothing is changed.

    Raises:
        RegroupError: see :func:`variants.variant`; or transformers cannot build it.
    """
    made = variant(config, kv_heads=kv_heads, layers=layers)
    own = variant(config)
    model = _on_meta(made)
    excluded, attention = _attention(made)
    heads = {layer.num_key_value_heads for layer in attention}
    full = decoder_layers(own)
    text = model.config.get_text_config(decoder=True)
    sizes = (
        getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "n_inner")
    )
    kept = {id(p): p.numel() for p in model.parameters()}
    same = layers in (None, full) and [x.num_key_value_heads for x in attention] == [
        x.num_key_value_heads for x in _attention(own)[1]
    ]
    if same and folder is not None:
        # Raise errors before the machine is measured, not when the weights are loaded.
        check_loadable(own, open_checkpoint(folder).tensors, folder)
    return Model(
        config=made,
        kv_heads=heads.pop() if len(heads) == 1 else None,
        attention=attention,
        weights=_weights(model, excluded),
        parameters=sum(kept.values()),
        layers=decoder_layers(made),
        full_layers=full,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=next((size for size in sizes if isinstance(size, int)), 4 * text.hidden_size),
        folder=folder if same else None,
    )


def parameters_of(config: Mapping[str, Any]) -> int:
    """Number of parameters of a whole model, including its encoder; shared parameters count once."""
    return sum(p.numel() for p in {id(p): p for p in _on_meta(config, encoder=True).parameters()}.values())


def build(model: Model, dtype: str, device: torch.device) -> Any:
    """The model in memory, in evaluation mode, with its own weights or with random ones.

    Random matrices have small normal numbers, norms are 1 and biases 0: infinities and denormals would be slow. Layers
    of an encoder are removed. Attention is transformers' default.
    """
    if model.folder is not None:
        from ..modeling import load

        made: Any = load(model.folder, progress=False, dtype=DTYPES[dtype])
        _drop_encoder(made)
        return made.to(device).eval()
    from transformers.initialization import no_init_weights

    cls, config = _class_and_config(model.config)
    with no_init_weights(), device:
        made = cls._from_config(config, dtype=DTYPES[dtype])
    made.tie_weights()
    _drop_encoder(made)
    _fill(made)
    return made.eval()


def _class_and_config(config: Mapping[str, Any]) -> tuple[Any, Any]:
    import transformers
    from transformers import CONFIG_MAPPING

    from ..modeling import modeling_regroup

    refuse_kernels(config, "config.json")
    name = (config.get("architectures") or ["none"])[0]
    try:
        cls = getattr(modeling_regroup if name.startswith(modeling_regroup.PREFIX) else transformers, name)
        return cls, CONFIG_MAPPING[config["model_type"]].from_dict(dict(runnable(config)))
    # Configs are untrusted data: building a model may fail in any way.
    except Exception as error:
        raise _unbuildable(name, error) from error


def _on_meta(config: Mapping[str, Any], *, encoder: bool = False) -> Any:
    """The model on the meta device, by default without the layers of its encoder."""
    cls, made = _class_and_config(config)
    try:
        with torch.device("meta"), quiet():
            model = cls._from_config(made, dtype=torch.float32, attn_implementation="eager")
            model.tie_weights()
    except Exception as error:
        raise _unbuildable(cls.__name__, error) from error
    if not hasattr(model, "generate") or not model.can_generate():
        raise RegroupError(
            "the model does not generate",
            expected="an architecture with a language-modelling head, such as LlamaForCausalLM",
            got=cls.__name__,
            remedy="correct architectures in its config.json",
        )
    if not encoder:
        _drop_encoder(model)
    return model


def _unbuildable(name: str, error: Exception) -> RegroupError:
    return RegroupError(
        "transformers cannot build a model of this config",
        file="config.json",
        got=f"{name}: {str(error).strip()[:300]}",
        remedy="correct it, for example from the config.json of a published checkpoint",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' messages below errors within the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _drop_encoder(model: Any) -> None:
    """Remove the encoder's layers: only decoding is measured, with random encoder output."""
    if not model.config.is_encoder_decoder:
        return
    for module in list(model.get_encoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList):
                setattr(module, name, nn.ModuleList())


def _attention(config: Mapping[str, Any]) -> tuple[set[str], tuple[DecodingLayer, ...]]:
    from .variants import detect, memory_projections

    layout = detect(config)
    return memory_projections(layout), layout.layers


def _weights(model: Any, excluded: set[str]) -> Weights:
    """The weights that each step of a model without encoder layers reads.

    Args:
        excluded: names of linear layers that are read once per sequence.
    """
    head = model.get_output_embeddings()
    looked_up = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    if head is not None:
        looked_up -= {id(parameter) for parameter in head.parameters()}
    encoder = set()
    if model.config.is_encoder_decoder:
        encoder = {id(parameter) for parameter in model.get_encoder().parameters()}
        encoder -= {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    read = multiplied = experts = 0
    # Names of a head class may have a prefix that the layout's names lack, or the reverse.
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up or id(parameter) in encoder or _named(name.rpartition(".")[0], excluded):
            continue
        if ".experts." in name:
            experts += parameter.numel()
            continue
        read += parameter.numel()
        multiplied += parameter.numel() if parameter.dim() > 1 else 0
    if not experts:
        return Weights(read, multiplied)
    text = model.config.get_text_config(decoder=True)
    number = getattr(text, "num_local_experts", None) or text.num_experts
    return Weights(read, multiplied, Experts(experts, number, text.num_experts_per_tok))


def _named(name: str, names: set[str]) -> bool:
    return name in names or any(name.endswith("." + other) or other.endswith("." + name) for other in names)


@torch.no_grad()
def _fill(model: Any) -> None:
    """Fill with random matrices, norms of 1 and biases of 0. Matrices are copied from one block, for speed."""
    generator = torch.Generator().manual_seed(0)
    block = torch.empty((1 << 20) + 7).normal_(0, 0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat = parameter.view(-1)
        source = block.to(parameter.device, parameter.dtype)
        for start in range(0, flat.numel(), source.numel()):
            piece = flat[start : start + source.numel()]
            piece.copy_(source[: piece.numel()])
