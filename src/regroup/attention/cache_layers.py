"""One layer of a KV cache, which keeps all tokens or those of a window.

Keys and values of a layer are blocks (B, G, capacity, D): the tokens of each KV head are contiguous, in the order in
which decoding reads them. Each token is written once and never copied, and attention sees filled slots only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..errors import RegroupError
from .autocast import autocast_dtype
from .cache_memory import checked_length, checked_states, common_dtype, form_of, kinds_of, longer, new_block, widened
from .checks import whole_number

BLOCK = 256


class KVLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    Under ``torch.autocast`` they are stored in its dtype, to which attention would cast them. New states of a wider
    dtype widen the cache. States of a narrower dtype are accepted only under autocast: attention needs one dtype.

    Args:
        max_length: capacity, allocated once with the first token; None: grow by doubling.
        spare: additional tokens for which memory is reserved at first, without ``max_length``.

    Attributes:
        keys, values: (B, G, S, D) and (B, G, S, Dv), the S tokens so far; views of the blocks, at first None.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int | None = None, spare: int = BLOCK) -> None:
        super().__init__()
        self.max_length, self.spare = checked_length(max_length), spare
        self.length = 0
        self.key_block: Tensor | None = None
        self.value_block: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, widths, dtype and device of these states (B, G, T, D), T possibly 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = key_states.shape[2] + self.spare if self.max_length is None else self.max_length
        capacity = self._capacity(capacity)
        self.key_block, self.value_block = new_block(key_states, capacity), new_block(value_states, capacity)
        self.keys, self.values = self.key_block[:, :, :0], self.value_block[:, :, :0]
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        if self.key_block is None:
            raise AttributeError("batch_size: nothing is cached yet")  # transformers tests this with hasattr
        return self.key_block.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the blocks."""
        return sum(block.nbytes for block in (self.key_block, self.value_block) if block is not None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states (B, G, T, D) of T tokens; return the states of all tokens so far, as views."""
        key_states, value_states = checked_states(key_states, value_states)
        start, stop = self.length, self.length + key_states.shape[2]
        self._make_room(key_states, value_states, stop)
        key_block, value_block = self.blocks
        key_block[:, :, start:stop] = key_states
        value_block[:, :, start:stop] = value_states
        self.keys, self.values = key_block[:, :, :stop], value_block[:, :, :stop]
        self.length = stop
        return self.keys, self.values

    @property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """The whole allocated memory: (B, G, capacity, D) and (B, G, capacity, Dv)."""
        assert self.key_block is not None
        assert self.value_block is not None
        return self.key_block, self.value_block

    def _capacity(self, tokens: int) -> int:
        """The number of slots to allocate for this many tokens."""
        return tokens

    def _make_room(self, states: Tensor, value_states: Tensor, stop: int) -> None:
        """Allocate enough memory for ``stop`` tokens, or raise an error."""
        given = states, value_states
        fits = self.key_block is not None and kinds_of(given, dtypes=True) == kinds_of(self.blocks, dtypes=True)
        if self.key_block is None or (self.length == 0 and not fits):
            self.lazy_initialization(states, value_states)
        if torch.is_grad_enabled() and (states.requires_grad or value_states.requires_grad):
            raise RegroupError(
                "a cache that is written in place has no gradients",
                remedy="run under torch.no_grad(), as generate does, or train with use_cache=False",
            )
        narrower = any(common_dtype(*pair) != pair[0].dtype for pair in zip(given, self.blocks, strict=True))
        if kinds_of(given) != kinds_of(self.blocks) or (narrower and autocast_dtype(states.device) is None):
            raise RegroupError(
                "the new keys and values do not match the cache",
                expected=form_of(self.blocks),
                got=form_of(given),
                remedy="create a new cache for each batch, or call cache.reset()",
            )
        key_block, value_block = self.blocks
        self.key_block = widened(key_block, states, self.length)
        self.value_block = widened(value_block, value_states, self.length)
        capacity = key_block.shape[2]
        if self.max_length is not None and stop > self.max_length:
            raise RegroupError(
                "the cache is full",
                expected=f"at most {self.max_length} tokens",
                got=f"{stop} tokens",
                remedy="create it with a larger max_length (prompt and new tokens), or without one, so that it grows",
            )
        if self._capacity(stop) > capacity:
            larger = self._capacity(max(stop, 2 * capacity))
            key_block, value_block = self.blocks
            self.key_block = longer(key_block, larger, self.length)
            self.value_block = longer(value_block, larger, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that the next ``query_length`` tokens see, and the position of the first key."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """The number of tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity in tokens; -1 if it grows."""
        return -1 if self.max_length is None else self.max_length

    def _set_length(self, length: int) -> None:
        """Make ``keys`` and ``values`` views of the first ``length`` tokens."""
        self.length = length
        if self.key_block is not None and self.value_block is not None:
            self.keys, self.values = self.key_block[:, :, :length], self.value_block[:, :, :length]

    def reset(self) -> None:
        """Remove all tokens, but keep the memory for a next batch of the same size."""
        self._set_length(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number as in transformers."""
        self._set_length(self.length_after(tokens_to_remove))

    def length_after(self, tokens_to_remove: int) -> int:
        """The number of tokens after :meth:`crop`, or an error if it is impossible. An unused layer has none."""
        removed = whole_number(tokens_to_remove)
        if removed is None or removed > 0:
            raise RegroupError(
                "the number of tokens to remove must not be positive",
                expected="a whole number, 0 or less",
                got=repr(tokens_to_remove),
            )
        if self.key_block is None:
            return 0
        if -removed > self.length:
            raise RegroupError(
                "the cache holds fewer tokens than should be removed",
                expected=f"at most {self.length}",
                got=-removed,
            )
        return self.length + removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row b by the former row ``beam_idx[b]`` (beam search). Unchanged rows are not copied."""
        if self.keys is None or self.values is None or self.length == 0:
            return
        source = beam_idx.to(self.keys.device)
        moved = (source != torch.arange(source.shape[0], device=source.device)).nonzero().flatten()
        if moved.numel():
            for states in (self.keys, self.values):
                states[moved] = states[source[moved]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.key_block is not None:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, given as indices or as a bool mask."""
        for name in ("key_block", "value_block"):
            old = getattr(self, name)
            if old is None:
                return
            chosen = indices.to(old.device)
            count = int(chosen.sum()) if chosen.dtype == torch.bool else chosen.numel()
            new = new_block(old[:1].expand(count, -1, -1, -1), old.shape[2])
            new[:, :, : self.length] = old[:, :, : self.length][chosen]
            setattr(self, name, new)
        self._set_length(self.length)

    def offload(self) -> None:
        raise RegroupError("this cache cannot be offloaded", remedy="use transformers' offloaded cache")

    prefetch = offload


class SlotOrder:
    """How the mask function allows sliding layers, at one position, to return keys in the order of their slots."""

    def __init__(self) -> None:
        self.position: int | None = None


class SlotOffset(int):
    """The position of the first key of a full window, with the ``order`` and ``window`` of the ring buffer."""

    order: SlotOrder
    window: int


class SlidingKVLayer(KVLayer):
    """A layer that keeps its last W = ``window`` tokens: all that a new token sees, including itself.

    The token at position p is in slot p mod W, where it replaces the token that no later token sees. When the window is
    full, attention gets the slots in their own order if the mask function has allowed it (``SlotOrder``: there is no
    mask, or the mask has the same order); otherwise it gets a copy in the order of positions, which any mask expects.
    """

    is_sliding = True

    def __init__(
        self, window: int, max_length: int | None = None, spare: int = BLOCK, order: SlotOrder | None = None
    ) -> None:
        super().__init__(max_length, spare)
        self.window, self.order = whole_number(window) or 0, order or SlotOrder()
        if self.window < 1:
            raise RegroupError("the window is not a whole number of tokens", expected="1 or more", got=repr(window))

    def _capacity(self, tokens: int) -> int:
        return min(tokens, self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of T tokens; return the states that these T tokens see: at most the last W − 1 + T."""
        key_states, value_states = checked_states(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        stop = start + new
        if stop <= self.window:
            return super().update(key_states, value_states)
        self._make_room(key_states, value_states, stop)
        if new == 1:
            slot = start % self.window
            for block, states in zip(self.blocks, (key_states, value_states), strict=True):
                block[:, :, slot : slot + 1] = states
            self._set_length(stop)
            return self.blocks if self.order.position == start else self._in_order(self.window)
        seen = key_states, value_states
        if start:
            before = self._in_order(min(start, self.window - 1))
            seen = torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)
        first = max(start, stop - self.window)
        turn = stop % self.window  # the slot of the next token
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            tail = states[:, :, first - start :]
            ends = min(turn, tail.shape[2])  # the number of new tokens from slot 0 on
            block[:, :, turn - ends : turn] = tail[:, :, tail.shape[2] - ends :]
            rest = tail.shape[2] - ends
            if rest:
                block[:, :, self.window - rest :] = tail[:, :, :rest]
        self._set_length(stop)
        return seen

    def _in_order(self, count: int) -> tuple[Tensor, Tensor]:
        """The last ``count`` tokens in the order of positions."""
        last = self.length % self.window if self.length > self.window else self.length
        return _last(self.blocks[0], last, count), _last(self.blocks[1], last, count)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that the next ``query_length`` tokens see, and the position of the first key."""
        past = min(self.length, self.window - 1)
        offset = self.length - past
        if query_length == 1 and self.length >= self.window and not torch.compiler.is_compiling():
            offset = SlotOffset(offset)
            offset.order, offset.window = self.order, self.window
        return past + query_length, offset

    def reset(self) -> None:
        """Remove all tokens, but keep the memory for a next batch of the same size."""
        self.order.position = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, if the window before them is still stored."""
        super().crop(tokens_to_remove)
        self.order.position = None

    def length_after(self, tokens_to_remove: int) -> int:
        left = super().length_after(tokens_to_remove)
        if self.length > self.window and left < self.length - 1:
            raise RegroupError(
                "the tokens before the current window are no longer stored",
                expected="-1 or 0 tokens to remove",
                got=tokens_to_remove,
                remedy="call cache.activate_past_recording() before adding tokens that may be removed",
            )
        return left

    def recording(self) -> CacheLayerMixin:
        """A layer of transformers with the same tokens, which keeps past tokens until it is cropped."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.window)
        layer.activate_past_recording()
        if self.is_initialized:
            layer.update(*self._in_order(min(self.length, self.window)))
            layer.cumulative_length = self.length
        return layer


def _last(block: Tensor, stop: int, count: int) -> Tensor:
    """The ``count`` slots before ``stop``, wrapping around the end of the block."""
    if stop >= count:
        return block[:, :, stop - count : stop]
    return torch.cat((block[:, :, stop - count :], block[:, :, :stop]), 2)
