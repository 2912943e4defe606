"""Grouped-query variants of stock `transformers` classes, for checkpoints that `regroup` has converted.

This one file travels with such a checkpoint, so that ``AutoModelForX.from_pretrained(path, trust_remote_code=True)``
loads it where `regroup` is not installed. ``Regroup<Class>`` is the stock ``<Class>``, built as usual and then given,
in each attention module that ``config.regroup`` names, the number of key/value heads that it asks for.

Query head h uses key/value head h // n, n = H / G (Ainslie et al. 2023, arXiv:2305.13245, section 2.2).
Shapes: B batch, T query positions, S key positions, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

FORMAT = 1
PREFIX = "Regroup"
_Base = PreTrainedModel if TYPE_CHECKING else object


class RegroupMixin(_Base):
    """Placed before a stock class: builds it, then regroups the attention modules that ``config.regroup`` names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        name, record = type(self).__name__, getattr(config, "regroup", None)
        if not isinstance(record, dict) or not isinstance(record.get("num_key_value_heads"), dict):
            raise ValueError(
                f"{name}: config.regroup should be {{'format': {FORMAT}, 'num_key_value_heads': {{path: heads}}}}, "
                f"got {record!r}. A checkpoint that was not converted loads with {name.removeprefix(PREFIX)}."
            )
        if record.get("format") != FORMAT:
            raise ValueError(
                f"{name}: config.regroup has format {record.get('format')!r}, expected {FORMAT}. Update regroup, or "
                "load with trust_remote_code=True, which uses the modeling_regroup.py beside the checkpoint."
            )
        modules = dict(self.base_model.named_modules())
        for path, groups in record["num_key_value_heads"].items():
            if path not in modules:
                known = [p for p, m in modules.items() if type(m).__name__.endswith("Attention")]
                raise ValueError(
                    f"{name}: config.regroup names {path!r}, which {type(self.base_model).__name__} does not have. "
                    f"Expected attention modules such as {known[:2]}; correct the path in config.json."
                )
            regroup_attention(modules[path], groups, f"{name}: {path}")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as the stock class does, with this file and the ``auto_map`` entries that lead to it."""
        config, kept = self.config, getattr(self.config, "auto_map", None) or {}
        # A checkpoint that came from a hub has "owner/name--file.Class" here; the copy has its own file.
        kept = {auto: reference.rpartition("--")[2] for auto, reference in kept.items()}
        config.auto_map = kept | auto_map(config.model_type, type(self).__name__.removeprefix(PREFIX))
        if kwargs.get("is_main_process", True):
            target = Path(save_directory) / "modeling_regroup.py"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, target)
        return super().save_pretrained(save_directory, *args, **kwargs)


def auto_map(model_type: str, architecture: str) -> dict[str, str]:
    """The ``auto_map`` of config.json for a stock ``architecture``: every Auto class that serves it, and AutoModel."""
    found = {}
    for auto in (name for name in dir(modeling_auto) if name.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        served = getattr(mapping, "_model_mapping", {}).get(model_type, ())
        served = (served,) if isinstance(served, str) else tuple(served)
        if architecture in served:
            found[auto] = f"modeling_regroup.{PREFIX}{architecture}"
        elif auto == "AutoModel" and served:
            found[auto] = f"modeling_regroup.{PREFIX}{served[0]}"
    return found


def __getattr__(name: str) -> Any:
    """``Regroup<StockClass>``, made when it is first asked for."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # transformers finds the renamings of older checkpoints (GPT-NeoX's output layer) by the name of the class.
    renamed = get_checkpoint_conversion_mapping(stock.__name__)
    if renamed is not None:
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    made = type(name, (RegroupMixin, stock), {"__module__": __name__, "__qualname__": name, "__doc__": stock.__doc__})
    return globals().setdefault(name, made)


def regroup_attention(attention: Any, groups: int, where: str = "attention") -> None:
    """Leave a stock attention module G = ``groups`` key/value heads, in place, on any device, meta included.

    The heads that stay are the first ones: a fair random initialisation, and soon overwritten by a checkpoint.
    Separate projections end with G·D rows; fused ones with H·D + 2·G·D, stacked [q|k|v] (gpt2, phi3) or per group
    [n query heads, key head, value head] (gpt_neox, bloom, falcon, gpt_bigcode).
    Raises ValueError where ``groups`` does not divide the query heads or the module is of no known kind.
    """
    output, head_dim = _first(attention, _OUTPUTS), _first(attention, _HEAD_DIMS)
    linears = [getattr(attention, name) for name in _KEYS_VALUES if hasattr(attention, name)]
    if output is None or head_dim is None or not linears or hasattr(attention, "q_attn"):
        raise ValueError(
            f"{where}: expected an attention module with key and value projections, got {type(attention).__name__}. "
            "Correct the path in config.json."
        )
    heads = (output.nx if isinstance(output, Conv1D) else output.in_features) // head_dim
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        raise ValueError(
            f"{where}: the number of key/value heads should divide the {heads} query heads, got {groups!r}. "
            f"Use one of {[g for g in range(1, heads + 1) if heads % g == 0]} in config.json."
        )
    fused = len(linears) == 1
    rows = linears[0].nf if isinstance(linears[0], Conv1D) else linears[0].out_features
    before = (rows // head_dim - heads) // 2 if fused else rows // head_dim
    if groups > before:
        raise ValueError(
            f"{where}: expected at most the {before} key/value heads that config.json gives the stock class, got "
            f"{groups}. Set num_key_value_heads in config.json to the largest number in the map."
        )
    for linear in linears:
        _keep_rows(linear, (heads + 2 * groups if fused else groups) * head_dim)
    _keep_norm(_first(attention, ("k_norm", "k_layernorm")), before, groups, head_dim)

    # A family that knows grouped heads repeats them itself, by this attribute.
    if not hasattr(attention, "num_key_value_groups"):
        _repeat_in_eager(sys.modules[type(attention).__module__])
    attention.num_key_value_heads, attention.num_key_value_groups = groups, heads // groups
    if type(attention).__name__ in _METHODS:
        attention.__class__ = _with_own_methods(type(attention))
    if isinstance(linears[0], Conv1D):
        attention.split_size = [heads * head_dim, groups * head_dim, groups * head_dim]


_OUTPUTS = ("o_proj", "out_proj", "o", "dense", "c_proj")
_HEAD_DIMS = ("head_dim", "key_value_proj_dim", "head_size")
_KEYS_VALUES = ("k_proj", "v_proj", "k", "v", "qkv_proj", "query_key_value", "c_attn")


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _keep(module: nn.Module, name: str, count: int, dim: int = 0) -> None:
    old: Any = getattr(module, name)
    new: Any = nn.Parameter(old.detach().narrow(dim, 0, count).clone(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # marks such as "already initialised"
    setattr(module, name, new)


def _keep_rows(linear: Any, rows: int) -> None:
    _keep(linear, "weight", rows, dim=1 if isinstance(linear, Conv1D) else 0)
    if linear.bias is not None:
        _keep(linear, "bias", rows)
    setattr(linear, "nf" if isinstance(linear, Conv1D) else "out_features", rows)


def _keep_norm(norm: Any, before: int, groups: int, head_dim: int) -> None:
    """Norms with weights for each key head: StableLM (a list), Cohere (G, D), OLMo 2 (G·D)."""
    if norm is None or before == 1:
        return
    if hasattr(norm, "norms"):
        norm.norms, norm.num_heads = norm.norms[:groups], groups
    elif norm.weight.shape == (before, head_dim):
        _keep(norm, "weight", groups)
    elif norm.weight.shape == (before * head_dim,):
        _keep(norm, "weight", groups * head_dim)


def _repeat_in_eager(module: ModuleType) -> None:
    """Let a modelling file's eager attention take fewer key/value heads than query heads."""
    stock: Callable[..., Any] | None = getattr(module, "eager_attention_forward", None)
    if stock is None or hasattr(stock, "regroup_repeats"):
        return

    @wraps(stock)
    def eager_attention_forward(
        attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return stock(attention, query, _repeat(key, query), _repeat(value, query), *args, **kwargs)

    eager_attention_forward.__dict__["regroup_repeats"] = True
    module.__dict__["eager_attention_forward"] = eager_attention_forward


def _repeat(states: Tensor, query: Tensor) -> Tensor:
    """(B, G, S, D) to (B, H, S, D), each key/value head n times in a row."""
    n = query.shape[1] // states.shape[1]
    return states if n == 1 else states.repeat_interleave(n, dim=1)


# ---- own methods for the stock classes whose forward takes H key/value heads for granted -----------------------------
# Each takes and returns what the stock method does.


def _heads(states: Tensor, head_dim: int) -> Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _update(self: Any, past: Any, key: Tensor, value: Tensor) -> Any:
    past = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
    return (key, value) if past is None else past.update(key, value, self.layer_idx)


def _split_groups(self: Any, fused: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """(B, T, G·(n+2)·D) to query (B, H, T, D), key and value (B, G, T, D)."""
    grouped = fused.view(*fused.shape[:2], self.num_key_value_heads, -1, head_dim)
    return tuple(part.flatten(2, 3).transpose(1, 2) for part in grouped.split((grouped.shape[3] - 2, 1, 1), dim=3))


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products (B, H, T, S) of (B, H, T, D) and (B, G, S, D), without repeating a key."""
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    return (query.reshape(B, G, -1, D) @ key.transpose(2, 3)).view(B, H, T, S)


def _grouped_mix(weights: Tensor, value: Tensor) -> Tensor:
    """Weighted sums (B, T, H·D) of values (B, G, S, D) by (B, H, T, S)."""
    (B, H, T, S), (G, D) = weights.shape, value.shape[1::2]
    return (weights.reshape(B, G, -1, S) @ value).view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, **kwargs: Any) -> Any:
    """The implementation that the configuration names; output (B, T, H·D), and the weights if it gives any."""
    eager: Any = getattr(sys.modules[type(self).__module__], "eager_attention_forward", None)
    interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    mask, dropout = kwargs.pop("attention_mask", None), dropout if self.training else 0.0
    output, weights = interface(self, query, key, value, mask, dropout=dropout, **kwargs)
    return output.flatten(2), weights


def _keys_values(self: Any, names: str, states: Tensor, memory: Tensor | None, past: Any, head_dim: int) -> Any:
    """Keys and values (B, G, S, D) of self-attention, or of cross-attention to ``memory``, through the cache."""
    cache, crossed = past, memory is not None and isinstance(past, EncoderDecoderCache)
    if isinstance(past, EncoderDecoderCache):
        cache = past.self_attention_cache if memory is None else past.cross_attention_cache
        if crossed and past.is_updated.get(self.layer_idx):
            return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    shape = (states.shape[0], -1, self.num_key_value_heads, head_dim)
    source = states if memory is None else memory
    key, value = (getattr(self, name)(source).view(shape).transpose(1, 2) for name in names.split())
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    if crossed:
        past.is_updated[self.layer_idx] = True
    return key, value


def _whisper(
    self: Any, hidden_states: Tensor, key_value_states: Any = None, past_key_values: Any = None, **kwargs: Any
) -> Any:
    """Whisper's and OPT's: the query is scaled before the attention function, which keeps their rounding."""
    query = _heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
    key, value = _keys_values(self, "k_proj v_proj", hidden_states, key_value_states, past_key_values, self.head_dim)
    output, weights = _attend(self, query, key, value, self.dropout, scaling=1.0, **kwargs)
    return self.out_proj(output), weights


def _umt5(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, past_key_values: Any = None, **kwargs: Any
) -> Any:
    D = self.key_value_proj_dim
    seen = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
    seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache advances it in place
    query = _heads(self.q(hidden_states), D)
    key, value = _keys_values(self, "k v", hidden_states, encoder_hidden_states, past_key_values, D)
    shape = (query.shape[2], key.shape[2])
    if self.has_relative_attention_bias:
        bias = self.compute_bias(*shape, device=query.device, past_seen_tokens=seen)
    else:
        bias = query.new_zeros(()).expand(1, query.shape[1], *shape)
    output, weights = _attend(self, query, key, value, self.dropout, scaling=1.0, position_bias=bias, **kwargs)
    return self.o(output), weights


def _gpt_neox(
    self: Any, hidden_states: Tensor, layer_past: Any = None, position_embeddings: Any = None, **kwargs: Any
) -> Any:
    query, key, value = _split_groups(self, self.query_key_value(hidden_states), self.head_size)
    query, key = sys.modules[type(self).__module__].apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = _update(self, layer_past, key, value)
    output, weights = _attend(self, query, key, value, self.attention_dropout, scaling=self.scaling, **kwargs)
    return self.dense(output), weights


def _gpt_bigcode(self: Any, hidden_states: Tensor, layer_past: Any = None, **kwargs: Any) -> Any:
    query, key, value = _split_groups(self, self.c_attn(hidden_states), self.head_dim)
    key, value = _update(self, layer_past, key, value)
    for unused in ("encoder_hidden_states", "encoder_attention_mask"):
        kwargs.pop(unused, None)
    output, weights = _attend(self, query, key, value, self.attn_dropout, scaling=self.scaling, **kwargs)
    return self.resid_dropout(self.c_proj(output)), weights


def _bloom(self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, layer_past: Any = None, **kw: Any) -> Any:
    query, key, value = _split_groups(self, self.query_key_value(hidden_states), self.head_dim)
    key, value = _update(self, layer_past, key, value)
    scores = _grouped_scores(query, key) * self.inv_norm_factor
    scores = scores + self.beta * alibi.view(scores.shape[0], scores.shape[1], 1, -1)
    if kw["attention_mask"] is not None:
        scores = scores + kw["attention_mask"]
    weights = self.attention_dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    mixed = _grouped_mix(weights, value)
    if self.pretraining_tp > 1 and self.slow_but_exact:
        # The stock class sums the product part by part, in the order of training, and leaves the bias out.
        width = self.hidden_size / self.pretraining_tp
        output = torch.zeros_like(mixed)
        for part in range(self.pretraining_tp):
            columns = slice(int(part * width), int((part + 1) * width))
            output = output + nn.functional.linear(mixed[..., columns], self.dense.weight[:, columns])
    else:
        output = self.dense(mixed)
    return residual + nn.functional.dropout(output, self.hidden_dropout, self.training), weights


def _falcon(self: Any, hidden_states: Tensor, alibi: Any = None, layer_past: Any = None, **kw: Any) -> Any:
    query, key, value = _split_groups(self, self.query_key_value(hidden_states), self.head_dim)
    if alibi is None:
        query, key = sys.modules[type(self).__module__].apply_rotary_pos_emb(query, key, *kw["position_embeddings"])
    key, value = _update(self, layer_past, key, value)
    implementation = self.config._attn_implementation
    if implementation.startswith("flash") and alibi is not None:
        raise ValueError(f"{implementation} has no ALiBi; load with attn_implementation='sdpa' or 'eager'.")
    if implementation != "eager" and not kw.get("output_attentions"):
        # The stock class has attention dropout with ALiBi and with flash attention, not otherwise.
        dropout = 0.0 if implementation == "sdpa" and alibi is None else self.attention_dropout.p
        given = {name: kw.get(name) for name in ("attention_mask", "position_ids")}
        output, weights = _attend(self, query, key, value, dropout, **given)
        return self.dense(output), weights
    scores = _grouped_scores(query, key)
    if alibi is not None:
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        scores = scores + alibi.view(scores.shape[0], scores.shape[1], 1, -1)
    scores = scores * self.inv_norm_factor
    if kw["attention_mask"] is not None:
        scores = scores + kw["attention_mask"]
    weights = scores.softmax(-1, dtype=hidden_states.dtype)
    weights = weights if alibi is None else self.attention_dropout(weights)
    return self.dense(_grouped_mix(weights, value)), weights


def _gpt2_upcast(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    key, value = _repeat(key, query), _repeat(value, query)
    stock: Any = super(type(self), self)
    return stock._upcast_and_reordered_attn(query, key, value, attention_mask)


_METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "OPTAttention": {"forward": _whisper},
    "WhisperAttention": {"forward": _whisper},
    "UMT5Attention": {"forward": _umt5},
    "GPTNeoXAttention": {"forward": _gpt_neox},
    "GPTBigCodeAttention": {"forward": _gpt_bigcode},
    "BloomAttention": {"forward": _bloom},
    "FalconAttention": {"forward": _falcon},
    "FalconFlashAttention2": {"forward": _falcon},
    "GPT2Attention": {"_upcast_and_reordered_attn": _gpt2_upcast},
}


@cache
def _with_own_methods(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the stock class's name, by which `transformers` finds attention modules in places."""
    place = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**_METHODS[stock.__name__], **place})
