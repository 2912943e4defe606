"""One layer of a KV cache, with all tokens or with those of a window.

Keys and values of a layer lie in one block (B, G, capacity, D): the tokens of a KV head one after another, as decoding
reads them. A token is written where it stays; nothing is copied for it, and nothing but filled slots is attended to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ..errors import RegroupError
from .autocast import autocast_dtype
from .cache_memory import checked_length, common_dtype, form_of, kinds_of, longer, new_block, taken, widened
from .checks import whole_number

BLOCK = 256


class KVLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    Under ``torch.autocast`` they are kept in its dtype, which is what attention casts them to. Wider states that follow
    make the cache wider. Narrower ones are taken under autocast alone: elsewhere attention could not read both.

    Args:
        max_length: tokens to hold, allocated once, with the first token; None grows by doubling.
        spare: tokens to leave room for, beyond the first ones, where there is no ``max_length``.

    Attributes:
        keys, values: (B, G, S, D) and (B, G, S, Dv), the S tokens so far: views of the block; None before the first.
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
            raise AttributeError("batch_size: nothing is cached yet")  # as transformers asks: hasattr
        return self.key_block.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, filled or not."""
        return sum(block.nbytes for block in (self.key_block, self.value_block) if block is not None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states (B, G, T, D) of T more tokens; return those of all tokens so far, as views."""
        key_states, value_states = taken(key_states, value_states)
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
        """All of the memory, filled or not: (B, G, capacity, D) and (B, G, capacity, Dv)."""
        assert self.key_block is not None
        assert self.value_block is not None
        return self.key_block, self.value_block

    def _capacity(self, tokens: int) -> int:
        """Room to make for so many tokens."""
        return tokens

    def _make_room(self, states: Tensor, value_states: Tensor, stop: int) -> None:
        """See that ``stop`` tokens fit, or refuse."""
        given = states, value_states
        fits = self.key_block is not None and kinds_of(given, dtypes=True) == kinds_of(self.blocks, dtypes=True)
        if self.key_block is None or (self.length == 0 and not fits):
            self.lazy_initialization(states, value_states)
        if torch.is_grad_enabled() and (states.requires_grad or value_states.requires_grad):
            raise RegroupError(
                "a cache that is written in place keeps no gradients",
                remedy="run under torch.no_grad(), as generate does, or train with use_cache=False",
            )
        narrower = any(common_dtype(*pair) != pair[0].dtype for pair in zip(given, self.blocks, strict=True))
        if kinds_of(given) != kinds_of(self.blocks) or (narrower and autocast_dtype(states.device) is None):
            raise RegroupError(
                "the new keys and values are not of the form that the cache holds",
                expected=form_of(self.blocks),
                got=form_of(given),
                remedy="use a new cache for each batch, or cache.reset()",
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
                remedy="make it with a larger max_length (prompt and new tokens), or without one, to let it grow",
            )
        if self._capacity(stop) > capacity:
            larger = self._capacity(max(stop, 2 * capacity))
            key_block, value_block = self.blocks
            self.key_block = longer(key_block, larger, self.length)
            self.value_block = longer(value_block, larger, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next ``query_length`` tokens will see, and the position of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit; -1 if it grows."""
        return -1 if self.max_length is None else self.max_length

    def _show(self, length: int) -> None:
        """Let ``keys`` and ``values`` be the first tokens."""
        self.length = length
        if self.key_block is not None and self.value_block is not None:
            self.keys, self.values = self.key_block[:, :, :length], self.value_block[:, :, :length]

    def reset(self) -> None:
        """Forget the tokens and keep the memory, unless the next batch is of another size."""
        self._show(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; as in transformers they are given as a negative number."""
        self._show(self.length_after(tokens_to_remove))

    def length_after(self, tokens_to_remove: int) -> int:
        """Tokens that :meth:`crop` leaves; refuses what it cannot do. A layer that was never used has none to lose."""
        removed = whole_number(tokens_to_remove)
        if removed is None or removed > 0:
            raise RegroupError(
                "tokens to remove are given as a negative number",
                expected="a whole number, 0 or less",
                got=repr(tokens_to_remove),
            )
        if self.key_block is None:
            return 0
        if -removed > self.length:
            raise RegroupError(
                "the cache does not hold as many tokens as should be removed",
                expected=f"at most {self.length}",
                got=-removed,
            )
        return self.length + removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was (beam search). Rows that stay are not touched."""
        if self.keys is None or self.values is None or self.length == 0:
            return
        source = beam_idx.to(self.keys.device)
        moved = (source != torch.arange(source.shape[0], device=source.device)).nonzero().flatten()
        if moved.numel():
            for states in (self.keys, self.values):
                states[moved] = states[source[moved]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row."""
        if self.key_block is not None:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences: indices or a mask of bool."""
        for name in ("key_block", "value_block"):
            old = getattr(self, name)
            if old is None:
                return
            chosen = indices.to(old.device)
            count = int(chosen.sum()) if chosen.dtype == torch.bool else chosen.numel()
            new = new_block(old[:1].expand(count, -1, -1, -1), old.shape[2])
            new[:, :, : self.length] = old[:, :, : self.length][chosen]
            setattr(self, name, new)
        self._show(self.length)

    def offload(self) -> None:
        raise RegroupError("this cache stays on its device", remedy="use transformers' offloaded cache")

    prefetch = offload


class SlotOrder:
    """What the mask function says to the sliding layers: at this position they may give keys in the order of slots."""

    def __init__(self) -> None:
        self.position: int | None = None


class SlotOffset(int):
    """The position of the first key that a full window gives; ``order`` and ``window`` say that slots are a ring."""

    order: SlotOrder
    window: int


class SlidingKVLayer(KVLayer):
    """A layer that keeps its last W = ``window`` tokens, as many as a new one may see, itself among them.

    The token of position p lies in slot p mod W and takes the place of the one that no later token sees. When the
    window is full, attention gets the slots as they are if the mask function has agreed to that (``SlotOrder``: it has
    no mask, or has put it into the same order), else a copy in the order of positions, as any mask expects.
    """

    is_sliding = True

    def __init__(
        self, window: int, max_length: int | None = None, spare: int = BLOCK, order: SlotOrder | None = None
    ) -> None:
        super().__init__(max_length, spare)
        self.window, self.order = whole_number(window) or 0, order or SlotOrder()
        if self.window < 1:
            raise RegroupError("the window is no whole number of tokens", expected="1 or more", got=repr(window))

    def _capacity(self, tokens: int) -> int:
        return min(tokens, self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of T more tokens; return those that the T may see, the last W − 1 + T at most."""
        key_states, value_states = taken(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        stop = start + new
        if stop <= self.window:
            return super().update(key_states, value_states)
        self._make_room(key_states, value_states, stop)
        if new == 1:
            slot = start % self.window
            for block, states in zip(self.blocks, (key_states, value_states), strict=True):
                block[:, :, slot : slot + 1] = states
            self._show(stop)
            return self.blocks if self.order.position == start else self._in_order(self.window)
        seen = key_states, value_states
        if start:
            before = self._in_order(min(start, self.window - 1))
            seen = torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)
        first = max(start, stop - self.window)
        turn = stop % self.window  # the slot of the next token
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            tail = states[:, :, first - start :]
            ends = min(turn, tail.shape[2])  # of the new tokens, those from slot 0 on
            block[:, :, turn - ends : turn] = tail[:, :, tail.shape[2] - ends :]
            rest = tail.shape[2] - ends
            if rest:
                block[:, :, self.window - rest :] = tail[:, :, :rest]
        self._show(stop)
        return seen

    def _in_order(self, count: int) -> tuple[Tensor, Tensor]:
        """The last ``count`` tokens in the order of positions."""
        last = self.length % self.window if self.length > self.window else self.length
        return _last(self.blocks[0], last, count), _last(self.blocks[1], last, count)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next ``query_length`` tokens will see, and the position of the first."""
        past = min(self.length, self.window - 1)
        offset = self.length - past
        if query_length == 1 and self.length >= self.window and not torch.compiler.is_compiling():
            offset = SlotOffset(offset)
            offset.order, offset.window = self.order, self.window
        return past + query_length, offset

    def reset(self) -> None:
        """Forget the tokens and keep the memory, unless the next batch is of another size."""
        self.order.position = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as long as the window before them is still here."""
        super().crop(tokens_to_remove)
        self.order.position = None

    def length_after(self, tokens_to_remove: int) -> int:
        left = super().length_after(tokens_to_remove)
        if self.length > self.window and left < self.length - 1:
            raise RegroupError(
                "the window has moved on, and the tokens before it are gone",
                expected="-1 or 0 tokens to remove",
                got=tokens_to_remove,
                remedy="call cache.activate_past_recording() before the tokens that may be removed",
            )
        return left

    def recording(self) -> CacheLayerMixin:
        """A stock layer with the same tokens, which keeps what has left the window until it is cropped."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.window)
        layer.activate_past_recording()
        if self.is_initialized:
            layer.update(*self._in_order(min(self.length, self.window)))
            layer.cumulative_length = self.length
        return layer


def _last(block: Tensor, stop: int, count: int) -> Tensor:
    """The ``count`` slots before ``stop``, going round the end of the block."""
    if stop >= count:
        return block[:, :, stop - count : stop]
    return torch.cat((block[:, :, stop - count :], block[:, :, :stop]), 2)
