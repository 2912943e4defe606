"""Grouping on a loaded model's state dict, a family at a time: slow, plain, and independent of the converter.

Used as an oracle. Everything is read into (heads, head_dim, inputs) tensors, changed there, and written back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

Rule = Literal["mean", "first"]
State = dict[str, Tensor]

_PROJECTIONS = {
    "t5": ("q", "k", "v", "o"),
    "mt5": ("q", "k", "v", "o"),
    "umt5": ("q", "k", "v", "o"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "bloom": ("query_key_value", "dense"),
    "falcon": ("query_key_value", "dense"),
}
_OUT_PROJ = ("bart", "mbart", "pegasus", "marian", "m2m_100", "whisper", "opt")
_INTERLEAVED = ("gpt_bigcode", "gpt_neox", "bloom", "falcon")
_ATTENTION_NAMES = (
    "self_attn",
    "encoder_attn",
    "SelfAttention",
    "EncDecAttention",
    "attn",
    "attention",
    "self_attention",
)


@dataclass
class Attention:
    """Where one attention module keeps its heads in a state dict."""

    model_type: str
    path: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        output = "out_proj" if self.model_type in _OUT_PROJ else "o_proj"
        return _PROJECTIONS.get(self.model_type, ("q_proj", "k_proj", "v_proj", output))

    def read(self, state: State, suffix: str) -> list[Tensor | None]:
        """Query, key and value, each (heads, head_dim, inputs), or (heads, head_dim) for biases, or None."""
        if len(self.names) == 4:
            found = [state.get(f"{self.path}.{name}.{suffix}") for name in self.names[:3]]
            return [None if t is None else t.unflatten(0, (-1, self.head_dim)) for t in found]
        fused = state.get(f"{self.path}.{self.names[0]}.{suffix}")
        if fused is None:
            return [None, None, None]
        if self.model_type == "gpt2" and suffix == "weight":
            fused = fused.T
        if self.model_type in _INTERLEAVED:
            n = self.heads // self.kv_heads
            grouped = fused.unflatten(0, (self.kv_heads, n + 2, self.head_dim))
            return [grouped[:, :n].flatten(0, 1), grouped[:, n], grouped[:, n + 1]]
        split = fused.unflatten(0, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads])
        return list(split)

    def write(self, state: State, suffix: str, query: Tensor | None, key: Tensor | None, value: Tensor | None) -> None:
        """The reverse of `read`; the number of key heads may be another one than before."""
        if len(self.names) == 4:
            for name, heads in zip(self.names[:3], (query, key, value), strict=True):
                if heads is not None:
                    state[f"{self.path}.{name}.{suffix}"] = heads.flatten(0, 1)
            return
        if query is None or key is None or value is None:
            return
        if self.model_type in _INTERLEAVED:
            groups = query.unflatten(0, (len(key), -1))
            fused = torch.cat([groups, key[:, None], value[:, None]], dim=1).flatten(0, 2)
        else:
            fused = torch.cat([query, key, value]).flatten(0, 1)
        if self.model_type == "gpt2" and suffix == "weight":
            fused = fused.T.contiguous()
        state[f"{self.path}.{self.names[0]}.{suffix}"] = fused

    def read_norm(self, state: State, role: Literal["q", "k"]) -> Tensor | None:
        """Norm weights that differ from head to head, as (heads, head_dim)."""
        count = self.heads if role == "q" else self.kv_heads
        if self.model_type == "stablelm" and f"{self.path}.{role}_layernorm.norms.0.weight" in state:
            return torch.stack([state[f"{self.path}.{role}_layernorm.norms.{i}.weight"] for i in range(count)])
        if self.model_type in ("cohere", "olmo2") and f"{self.path}.{role}_norm.weight" in state:
            return state[f"{self.path}.{role}_norm.weight"].reshape(count, self.head_dim)
        return None

    def write_norm(self, state: State, role: Literal["q", "k"], weights: Tensor) -> None:
        if self.model_type == "stablelm":
            for key in [k for k in state if k.startswith(f"{self.path}.{role}_layernorm.norms.")]:
                del state[key]
            state |= {f"{self.path}.{role}_layernorm.norms.{i}.weight": w.clone() for i, w in enumerate(weights)}
        else:
            state[f"{self.path}.{role}_norm.weight"] = weights.flatten() if self.model_type == "olmo2" else weights


def attentions(model: PreTrainedModel) -> dict[str, Attention]:
    """Every attention module of a stock decoder, by its path relative to ``model.base_model``."""
    config = model.config
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    kv_heads = heads
    if config.model_type not in (*_OUT_PROJ, *_PROJECTIONS) or config.model_type in ("phi", "phi3"):
        kv_heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {
        path: Attention(config.model_type, prefix + path, heads, kv_heads, head_dim)
        for path, _ in model.base_model.named_modules()
        if path.rpartition(".")[2] in _ATTENTION_NAMES and not path.startswith("encoder")
        # Bloom, Falcon and OPT have no encoder; GPT-NeoX calls its module "attention".
    }


def group_state_dict(model: PreTrainedModel, heads: Mapping[str, int], rule: Rule = "mean") -> State:
    """The state dict of ``model`` with ``heads[path]`` key/value heads in each named attention module.

    A grouped parent's heads are repeated for every query head first. Sums are in float64.
    """
    state = dict(model.state_dict())
    known = attentions(model)
    for path, groups in heads.items():
        attention = known[path]

        def pool(tensor: Tensor | None, attention: Attention = attention, groups: int = groups) -> Tensor | None:
            if tensor is None:
                return None
            expanded = tensor.repeat_interleave(attention.heads // attention.kv_heads, dim=0)
            grouped = expanded.unflatten(0, (groups, -1)).double()
            pooled = grouped.mean(dim=1) if rule == "mean" else grouped[:, 0]
            return pooled.to(tensor.dtype)

        norm = pool(attention.read_norm(state, "k"))
        for suffix in ("weight", "bias"):
            query, key, value = attention.read(state, suffix)
            attention.write(state, suffix, query, pool(key), pool(value))
        if norm is not None:
            attention.write_norm(state, "k", norm)
    return state


@torch.no_grad()
def tie_groups(model: PreTrainedModel, groups: int | Mapping[str, int]) -> None:
    """Make the parent's key/value heads equal within each group, in place: grouping it then loses nothing.

    ``groups`` has to divide the parent's number of key/value heads.
    """
    state = dict(model.state_dict())
    for path, attention in attentions(model).items():
        count = groups if isinstance(groups, int) else groups.get(path, attention.kv_heads)
        assert attention.kv_heads % count == 0, f"{path}: {count} groups of {attention.kv_heads} key/value heads"
        take = torch.arange(attention.kv_heads) // (attention.kv_heads // count) * (attention.kv_heads // count)
        norm = attention.read_norm(state, "k")
        for suffix in ("weight", "bias"):
            query, key, value = attention.read(state, suffix)
            attention.write(state, suffix, query, *(None if t is None else t[take] for t in (key, value)))
        if norm is not None:
            attention.write_norm(state, "k", norm[take])
    model.load_state_dict(state)


@torch.no_grad()
def permute_query_heads(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Reorder the heads of every attention module, in place, without changing what the model computes.

    Query head i becomes the old ``order[i]``: query rows, output columns, query norms, T5's bias table, and the
    key/value heads that belong to them. A grouped parent's groups have to stay whole. ALiBi models cannot be reordered.
    """
    assert model.config.model_type != "bloom", "ALiBi slopes belong to head positions"
    assert not getattr(model.config, "alibi", False), "ALiBi slopes belong to head positions"
    state = dict(model.state_dict())
    query_order = torch.tensor(list(order))
    roles: tuple[Literal["q"], Literal["k"]] = ("q", "k")
    for attention in attentions(model).values():
        n = attention.heads // attention.kv_heads
        owners = (query_order // n).view(attention.kv_heads, n)
        assert bool((owners == owners[:, :1]).all()), f"{attention.path}: the order tears a group apart"
        kv_order = owners[:, 0]
        norms = {role: attention.read_norm(state, role) for role in roles}
        for suffix in ("weight", "bias"):
            query, key, value = attention.read(state, suffix)
            moved = [None if t is None else t[o] for t, o in ((query, query_order), (key, kv_order), (value, kv_order))]
            attention.write(state, suffix, *moved)
        for role in roles:
            norm = norms[role]
            if norm is not None:
                attention.write_norm(state, role, norm[query_order if role == "q" else kv_order])
        name = f"{attention.path}.{attention.names[-1]}.weight"
        dim = 0 if attention.model_type == "gpt2" else 1
        state[name] = (
            state[name].unflatten(dim, (attention.heads, -1)).index_select(dim, query_order).flatten(dim, dim + 1)
        )
        table = f"{attention.path}.relative_attention_bias.weight"
        if table in state:
            state[table] = state[table][:, query_order]
    model.load_state_dict(state)
