"""``GroupedQueryAttention``: a layer for models that are trained from scratch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import RegroupError
from .checks import checked_number, whole_number
from .grouped import grouped_query_attention


class LayerCache(Protocol):
    """The interface of a layer's cache, such as :class:`regroup.attention.cache.KVLayer`."""

    keys: Tensor | None
    values: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...
    def get_seq_length(self) -> int: ...


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share key/value heads in groups (Ainslie et al. 2023, section 2.2).

    ``num_key_value_heads = num_heads`` is multi-head attention, 1 is multi-query attention (Shazeer 2019). Query head h
    uses KV head h // (num_heads / num_key_value_heads). Parameters are named as in Llama: ``q_proj`` (H·D, hidden),
    ``k_proj`` and ``v_proj`` (G·D, hidden or memory), ``o_proj`` (hidden, H·D).

    Args:
        hidden_size: width of input and output.
        num_heads: H, query heads.
        num_key_value_heads: G, a divisor of H; H by default.
        head_dim: D; hidden_size / H by default.
        bias: whether q, k and v have biases.
        output_bias: whether the output projection has a bias; the value of ``bias`` by default.
        rotary: base of rotary position embeddings (Su et al. 2021, section 3.4.2), 10000 in most models; None:
            no rotation. The pairs are those of Llama and GPT-NeoX: (i, i + D/2). Only self-attention is rotated.
        rotary_dim: how many of the D elements are rotated, from the first; all by default.
        is_causal: whether self-attention sees only earlier positions.
        window: how many keys a query sees, including its own; None: all.
        softcap: c; scores become c · tanh(score / c).
        scale: factor of the products; 1 / sqrt(D) by default.
        memory_size: width of the memory, for cross-attention; hidden_size by default.

    Raises:
        RegroupError: a size is not a whole number, heads do not divide evenly, or the rotary dimension is odd.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        output_bias: bool | None = None,
        rotary: float | None = None,
        rotary_dim: int | None = None,
        is_causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        memory_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size, num_heads = _count(hidden_size, "hidden_size"), _count(num_heads, "num_heads")
        kv_heads = num_heads if num_key_value_heads is None else whole_number(num_key_value_heads)
        head_dim = None if head_dim is None else _count(head_dim, "head_dim")
        if kv_heads is None or kv_heads < 1 or num_heads % kv_heads:
            raise RegroupError(
                "the query heads do not divide into groups of equal size",
                expected=f"num_key_value_heads that divides {num_heads}",
                got=repr(num_key_value_heads),
            )
        if head_dim is None and hidden_size % num_heads:
            raise RegroupError(
                "the hidden size does not divide into heads",
                expected=f"a multiple of {num_heads}",
                got=hidden_size,
                remedy="pass head_dim",
            )
        self.hidden_size, self.num_heads, self.num_key_value_heads = hidden_size, num_heads, kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.is_causal, self.window, self.softcap, self.scale = is_causal, window, softcap, scale
        made = {"device": device, "dtype": dtype}
        memory = hidden_size if memory_size is None else _count(memory_size, "memory_size")
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias, **made)
        self.k_proj = nn.Linear(memory, kv_heads * self.head_dim, bias, **made)
        self.v_proj = nn.Linear(memory, kv_heads * self.head_dim, bias, **made)
        last = bias if output_bias is None else output_bias
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, last, **made)
        self.rotary = None if rotary is None else checked_number(rotary, "rotary base")
        self.rotary_dim = self.head_dim if rotary_dim is None else _count(rotary_dim, "rotary_dim")
        if rotary is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise RegroupError(
                "rotary embeddings rotate pairs of elements",
                expected=f"an even rotary_dim, at most {self.head_dim}",
                got=self.rotary_dim,
            )

    def forward(
        self,
        states: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            states: (B, T, hidden_size).
            memory: (B, S, memory_size), for cross-attention: no causality, window or rotation. With a filled ``cache``
                its keys and values are used instead of those of ``memory``.
            mask: broadcasts to (B, H, T, S): bool (True: may attend), or added to the scores; pass padding (B, S) as
                ``mask[:, None, None, :]``. It applies in addition to causality and window.
            bias: broadcasts to (B, H, T, S), added to the scores.
            positions: (T,) or (B, T), for rotation; by default they start at the cache's length.
            cache: for decoding, such as ``regroup.KVLayer(max_length)``; new states are appended.

        Returns:
            (B, T, hidden_size).

        Raises:
            RegroupError: the shapes are inconsistent.
        """
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[2] != self.hidden_size:
            raise RegroupError(
                "the states do not match the layer",
                expected=f"(batch, length, {self.hidden_size})",
                got=tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__,
            )
        query = self._split(self.q_proj(states))
        crossed = memory is not None
        if memory is not None and cache is not None and cache.get_seq_length():
            key, value = cache.keys, cache.values
            assert key is not None
            assert value is not None
        else:
            source = states if memory is None else memory
            key, value = self._split(self.k_proj(source)), self._split(self.v_proj(source))
            if not crossed and self.rotary is not None:
                if positions is None:
                    start = 0 if cache is None else cache.get_seq_length()
                    positions = torch.arange(start, start + states.shape[1], device=states.device)
                query, key = self._rotated(query, key, positions)
            if cache is not None:
                key, value = cache.update(key, value)
        output = grouped_query_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            is_causal=self.is_causal and not crossed,
            scale=self.scale,
            window=None if crossed else self.window,
            softcap=self.softcap,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        # Computed in float32, not in a buffer that is converted with the module: bfloat16 is not exact beyond 256.
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=query.device)
        angles = positions[..., None].float() * self.rotary ** -(pairs / self.rotary_dim)
        angles = angles[:, None] if positions.dim() == 2 else angles
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}, head_dim={self.head_dim}"


def _count(number: object, name: str) -> int:
    """A size as a Python number, 1 or more."""
    count = whole_number(number)
    if count is None or count < 1:
        raise RegroupError(f"{name} is not a valid size", expected="a whole number, 1 or more", got=repr(number))
    return count


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R/2) of the first R elements, where R is twice the width of cos and sin."""
    half = cos.shape[-1]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
