"""GGUF files of Llama's kind in transformers' terms: the config of a header, and what each tensor becomes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import GGUFFile
from ..errors import RegroupError

# Architectures of llama.cpp whose layers are these classes'.
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FREQUENCIES = "rope_freqs.weight"
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that the config takes, and keys that describe how a file came about.
_TAKEN = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
)
_HISTORY = ("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
_ROTATED = ("attn_q", "attn_k")
# Beyond any model that there is, and small enough for shapes whose elements can be counted.
_MOST, _MOST_HEADS = 2**24, 2**16


@dataclass(frozen=True)
class Model:
    """A GGUF file as a transformers model.

    Attributes:
        file: the file.
        config: of the class.
        names: of a tensor of the checkpoint, to the tensor of the file that it is made of; empty with
        loaded: the model, where transformers' loader has read the whole file.
    """

    file: GGUFFile
    config: Any
    names: dict[str, str]
    loaded: Any = None

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint, as the file stores it or unpacked to float32."""
        source = self.names[name]
        tensor = self.file.read(source)
        part = source.split(".")[2] if source.startswith("blk.") else ""
        if self.config.model_type == "llama" and part in _ROTATED:
            heads = self.config.num_attention_heads if part == "attn_q" else self.config.num_key_value_heads
            return halves(tensor, heads)
        return tensor


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads · D, …) whose dimensions 2i and 2i + 1 are rotated together, with i and i + D / 2 in their places."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype.

    Raises:
        RegroupError: float16 does not hold it.
    """
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool(found.isinf().any()) and not bool(tensor.isinf().any()):
        raise RegroupError(
            "a weight is too large for float16",
            tensor=name,
            expected=f"at most {torch.finfo(torch.float16).max:g}",
            got=f"{float(tensor.abs().max()):g}",
            remedy="choose --dtype bfloat16 or float32",
        )
    return found


def model_of(file: GGUFFile) -> Model:
    """The transformers model that a file holds, with every tensor accounted for.

    Raises:
        RegroupError: a key, a tensor or a shape that the class does not have, or one of its own that is missing; named.
    """
    arch = file.values["general.architecture"]
    facts = _Facts(file, arch)
    facts.check_known()
    names = _targets(file)
    config = _config(facts, names)
    model = Model(file, config, names)
    with _accepted(file):
        shapes = _shapes(config)
    _check_complete(model, shapes)
    return model


class _Facts:
    """The keys of one architecture, each checked when it is asked for."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def check_known(self) -> None:
        for key, value in self.file.values.items():
            kept = key.removeprefix(f"{self.arch}.")
            harmless = np.isscalar(value) and value in (0, False, "none", "")
            if kept != key and kept not in _TAKEN and kept not in _HISTORY and not harmless:
                raise RegroupError(
                    "this GGUF file has a setting that its checkpoint would lose",
                    file=self.file.path,
                    got=f"{key} = {str(value)[:80]}",
                    remedy="start from the checkpoint that the file was made of",
                )
        if self.file.order != "<":
            raise RegroupError("big-endian GGUF files are not exported", file=self.file.path)

    def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A positive number, that a list may repeat for each layer."""
        found = self.file.numbers(key, default, least=1, most=most)
        if isinstance(found, int):
            return found
        if len(set(found)) > 1:
            raise RegroupError(
                f"the layers of this GGUF file differ in {key}, which no stock class supports",
                file=self.file.path,
                got=", ".join(map(str, found))[:200],
                remedy="start from the checkpoint that the file was made of",
            )
        return found[0]

    def real(self, key: str, default: float | None = None) -> float:
        value = self.file.values.get(f"{self.arch}.{key}", default)
        if type(value) not in (int, float) or not np.isfinite(value) or value <= 0:
            raise self.file.impossible(key, "a positive number", value)
        # As somebody wrote it: 1e-05, and not the float32 nearest to it with all its digits.
        short = float(str(np.float32(value)))
        return short if np.float32(short) == value else float(value)


def target_of(name: str) -> str | None:
    """The name in a checkpoint of a tensor of a GGUF file; None where it has no place there."""
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in _WHOLE:
            return f"{_WHOLE[stem]}.{kind}"
        start, _, rest = stem.partition(".")
        number, _, part = rest.partition(".")
        if start == "blk" and number.isdecimal() and str(int(number)) == number and part in _BLOCK:
            return f"model.layers.{number}.{_BLOCK[part]}.{kind}"
    return None


def _targets(file: GGUFFile) -> dict[str, str]:
    """Names in a checkpoint, to those in the file."""
    found = {}
    for name in file.tensors:
        target = target_of(name)
        if target is not None:
            found[target] = name
        elif name != FREQUENCIES:
            raise RegroupError(
                "this GGUF file has a tensor that its checkpoint would lose",
                file=file.path,
                tensor=name,
                remedy="start from the checkpoint that the file was made of",
            )
    return found


def _config(facts: _Facts, names: dict[str, str]) -> Any:
    import transformers

    file, arch = facts.file, facts.arch
    if "token_embd.weight" not in file.tensors:
        raise _missing(file, "token_embd.weight")
    hidden, heads = facts.whole("embedding_length", most=_MOST), facts.whole("attention.head_count", most=_MOST_HEADS)
    groups = facts.whole("attention.head_count_kv", heads, most=_MOST_HEADS)
    if heads % groups:
        raise facts.file.impossible("attention.head_count_kv", f"a number that divides {heads}", groups)
    head_dim = facts.whole("attention.key_length", hidden // heads, most=_MOST_HEADS)
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.whole(key, head_dim) != head_dim:
            raise facts.file.impossible(key, f"{head_dim}, as wide as keys", facts.whole(key))
    if head_dim % 2:
        raise facts.file.impossible("attention.key_length", "an even number", head_dim)
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": facts.whole("block_count", most=_MOST_HEADS),
        "intermediate_size": facts.whole("feed_forward_length", most=_MOST),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": facts.whole("context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "rope_parameters": _rope(facts, head_dim),
    }
    # A huge count would take long to build; the file is too small for it.
    if settings["num_hidden_layers"] > len(file.tensors):
        raise facts.file.impossible("block_count", f"no more layers than there are tensors ({len(file.tensors)})",
                          settings["num_hidden_layers"])  # fmt: skip
    if arch == "llama":
        settings["attention_bias"] = any(name.endswith("_proj.bias") and "self_attn" in name for name in names)
        settings["mlp_bias"] = any(name.endswith("_proj.bias") and "mlp" in name for name in names)
    cls: Any = getattr(transformers, CLASSES[arch])
    with _accepted(file):
        return cls.config_class(**settings, architectures=[CLASSES[arch]], bos_token_id=None, eos_token_id=None)


@contextlib.contextmanager
def _accepted(file: GGUFFile) -> Iterator[None]:
    """What transformers says to numbers that contradict each other, by whatever its code runs into."""
    try:
        yield
    except Exception as error:
        raise RegroupError(
            "the numbers of this GGUF header do not make a model",
            file=file.path,
            got=" ".join(str(error).split())[-300:] or type(error).__name__,
        ) from error


def _rope(facts: _Facts, head_dim: int) -> dict[str, Any]:
    """transformers' ``rope_parameters``."""
    theta = facts.real("rope.freq_base", 10000.0)
    values = facts.file.values
    kind = values.get(f"{facts.arch}.rope.scaling.type", "linear")
    factor = values.get(f"{facts.arch}.rope.scaling.factor", values.get(f"{facts.arch}.rope.scale_linear", 0.0))
    scaled = kind != "none" and factor not in (0, 1)
    if kind not in ("none", "linear"):
        raise facts.file.impossible("rope.scaling.type", "none or linear", kind)
    if FREQUENCIES in facts.file.tensors:
        if scaled or facts.arch != "llama":
            raise facts.file.impossible("rope.scaling.type", f"none for {facts.arch} with {FREQUENCIES}", kind)
        return _slowed(facts, theta, head_dim)
    if scaled:
        return {"rope_type": "linear", "rope_theta": theta, "factor": facts.real("rope.scaling.factor", float(factor))}
    return {"rope_type": "default", "rope_theta": theta}


def _slowed(facts: _Facts, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings by which transformers slows down each frequency as the file's factors do.

    Llama 3's are found again by trying, as the file has what they lead to and not the settings. Factors of another
    origin become a list of them (``longrope`` without its other effects).
    """
    tensor = facts.file.tensors[FREQUENCIES]
    if tensor.shape != (head_dim // 2,):
        raise _shape(facts.file, FREQUENCIES, (head_dim // 2,), tensor.shape)
    wanted = facts.file.read(FREQUENCIES).double().numpy()
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise RegroupError("frequency factors are positive numbers", file=facts.file.path, tensor=FREQUENCIES)
    context = facts.whole("context_length")
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(f"{wanted.max():.6g}")  # the file has it in float32
    for original in _originals(wanted, waves, factor, context):
        found = llama3_factors(waves, factor, 1.0, 4.0, original)
        if factor > 1 and np.allclose(found, wanted, rtol=3e-6, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    listed = wanted.tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def llama3_factors(waves: np.ndarray, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """(D / 2,): by how much Llama 3.1 slows down each frequency.

    Args:
        waves: tokens that each frequency takes for a turn.
        factor, low, high, original: ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings`` of its config.
    """
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _originals(wanted: np.ndarray, waves: np.ndarray, factor: float, context: int) -> Iterator[int]:
    """Lengths that a model may have been trained at before its context was extended, the likely first."""
    yield 8192
    yield from (2**power for power in range(3, 21))
    yield context
    if factor > 1:
        smooth = (1 / wanted - 1 / factor) / (1 - 1 / factor)
        for share, wave in zip(smooth, waves, strict=True):
            if 0.01 < share < 0.99:
                yield round(float(wave * (3 * share + 1)))


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that the class has, by its name in a checkpoint; a tied head is the embedding."""
    import transformers

    with torch.device("meta"):
        cls: Callable[..., Any] = getattr(transformers, config.architectures[0])
        state = cls(config).state_dict()
    tied = config.tie_word_embeddings
    return {name: tuple(value.shape) for name, value in state.items() if not (tied and name == "lm_head.weight")}


def _check_complete(model: Model, shapes: dict[str, tuple[int, ...]]) -> None:
    file = model.file
    for name, shape in shapes.items():
        if name not in model.names:
            raise _missing(file, name)
        found = file.tensors[model.names[name]].shape
        if found != shape:
            raise _shape(file, model.names[name], shape, found)
    for name in model.names:
        if name not in shapes:
            raise RegroupError(
                f"{model.config.architectures[0]} has no place for a tensor of this GGUF file",
                file=file.path,
                tensor=model.names[name],
                got=name,
                remedy="start from the checkpoint that the file was made of",
            )


def _missing(file: GGUFFile, name: str) -> RegroupError:
    return RegroupError(
        "this GGUF file lacks a tensor that its model needs",
        file=file.path,
        tensor=name,
        remedy="download or create it again",
    )


def _shape(file: GGUFFile, name: str, expected: object, got: object) -> RegroupError:
    return RegroupError(
        "a tensor of this GGUF file has another shape than its header leads to",
        file=file.path,
        tensor=name,
        expected=expected,
        got=got,
    )
