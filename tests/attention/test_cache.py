"""The KV cache: written in place, ordered, reordered, cropped, and as large as predicted, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import regroup
import tiny
from helpers import layout_of
from regroup.attention.cache import EncoderDecoderKVCache, KVCache, KVLayer, SlidingKVLayer
from regroup.errors import RegroupError
from regroup.layout.kv_cache import kv_cache_bytes

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


def states(batch: int, tokens: int, seed: int = 0, heads: int = 3) -> tuple[Tensor, Tensor]:
    """Keys (B, 3, T, 5) and values (B, 3, T, 7), strided as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, tokens, heads, width, generator=generator) for width in (5, 7))
    return key.transpose(1, 2), value.transpose(1, 2)


def pieces(total: int, sizes: list[int], batch: int = 2) -> list[tuple[Tensor, Tensor]]:
    key, value = states(batch, total)
    assert sum(sizes) == total
    return list(zip(key.split(sizes, 2), value.split(sizes, 2), strict=True))


@pytest.mark.parametrize("max_length", [None, 23])
@pytest.mark.parametrize("sizes", [[9, *[1] * 14], [1, 4, 1, 17], [23]])
def test_a_layer_gives_what_the_stock_layer_gives(max_length: int | None, sizes: list[int]) -> None:
    ours, stock = KVLayer(max_length, spare=3), DynamicLayer()
    for key, value in pieces(23, sizes):
        assert ours.get_mask_sizes(key.shape[2]) == stock.get_mask_sizes(key.shape[2])
        for found, wanted in zip(ours.update(key, value), stock.update(key, value), strict=True):
            assert torch.equal(found, wanted)
        assert ours.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize("window", [2, 5, 6, 40])
@pytest.mark.parametrize("max_length", [None, 23])
@pytest.mark.parametrize("sizes", [[9, *[1] * 14], [3, *[1] * 20], [1, 4, 1, 2, 5, 1, 1, 8], [23], [5, 6, 12]])
def test_a_window_gives_what_the_stock_layer_gives(window: int, max_length: int | None, sizes: list[int]) -> None:
    ours, stock = SlidingKVLayer(window, max_length, spare=3), DynamicSlidingWindowLayer(window)
    for key, value in pieces(23, sizes):
        assert ours.get_mask_sizes(key.shape[2]) == stock.get_mask_sizes(key.shape[2])
        for found, wanted in zip(ours.update(key, value), stock.update(key, value), strict=True):
            assert torch.equal(found, wanted)
        assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.blocks[0].shape[2] <= window


def test_a_window_of_one_token() -> None:
    layer = SlidingKVLayer(1)  # the stock layer keeps the last −0 of them: all
    for step in range(3):
        found, _ = layer.update(*states(1, 1, step))
        assert torch.equal(found, states(1, 1, step)[0])


def test_a_token_is_written_where_it_stays() -> None:
    """Neither buffer moves, and what attention gets is a view of it; the tokens of a head lie one after another."""
    for layer in (KVLayer(40), SlidingKVLayer(8, 40)):
        layer.update(*states(2, 9))
        places = [block.data_ptr() for block in layer.blocks]
        for step in range(31):
            if isinstance(layer, SlidingKVLayer):
                layer.order.position = layer.length  # the mask function's consent to the order of slots
            found = layer.update(*states(2, 1, step))
            assert [tensor.data_ptr() for tensor in found] == places
            assert [block.data_ptr() for block in layer.blocks] == places
            assert found[0].stride()[2:] == (5, 1)


def test_slots_are_given_as_they_lie_only_by_consent() -> None:
    layer = SlidingKVLayer(4)
    for step in range(6):
        layer.update(*states(1, 1, step))
    _, offset = layer.get_mask_sizes(1)
    assert offset == 3  # the window of position 6 is 3, 4, 5, 6
    ordered, _ = layer.update(*states(1, 1, 6))
    wanted = torch.cat([states(1, 1, step)[0] for step in (3, 4, 5, 6)], 2)
    assert torch.equal(ordered, wanted)
    assert not torch.equal(layer.blocks[0], wanted)
    layer.order.position = 7
    slots, _ = layer.update(*states(1, 1, 7))
    assert slots is layer.blocks[0]
    assert torch.equal(slots.roll(-(8 % 4), 2), torch.cat([states(1, 1, step)[0] for step in (4, 5, 6, 7)], 2))


def test_growth_doubles_and_keeps_what_was_there() -> None:
    layer = KVLayer(spare=2)
    key, value = states(2, 200)
    places, found = set(), key[:, :, :0]
    for token in range(200):
        found, _ = layer.update(key[:, :, token : token + 1], value[:, :, token : token + 1])
        places.add(layer.blocks[0].data_ptr())
    assert torch.equal(found, key)
    assert layer.blocks[0].shape[2] == 3 * 2**7
    assert len(places) <= 8


@pytest.mark.parametrize("make", [lambda: KVLayer(30), lambda: KVLayer(spare=2), lambda: SlidingKVLayer(4)])
def test_batch_operations_are_those_of_the_stock_layer(make: Callable[[], KVLayer]) -> None:
    ours = make()
    stock: Any = DynamicSlidingWindowLayer(4) if isinstance(ours, SlidingKVLayer) else DynamicLayer()

    def step(batch: int, tokens: int, seed: int) -> None:
        both = [layer.update(*states(batch, tokens, seed)) for layer in (ours, stock)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    step(3, 5, 0)
    for layer in (ours, stock):
        layer.reorder_cache(torch.tensor([2, 2, 0]))
    step(3, 1, 1)
    for layer in (ours, stock):
        layer.batch_repeat_interleave(2)
    step(6, 1, 2)
    for layer in (ours, stock):
        layer.batch_select_indices(torch.tensor([5, 0, 1]))
    step(3, 2, 3)
    for layer in (ours, stock):
        layer.batch_select_indices(torch.tensor([True, False, True]))
    step(2, 1, 4)
    stock.reorder_cache(torch.tensor([1, 0]))  # negative control: the order of the batch shows
    assert not torch.equal(ours.update(*states(2, 1, 5))[0], stock.update(*states(2, 1, 5))[0])


def test_crop_and_reset() -> None:
    layer = KVLayer(12)
    key, value = states(2, 9)
    layer.update(key, value)
    place = layer.blocks[0].data_ptr()
    layer.crop(-4)
    assert layer.keys is not None
    assert torch.equal(layer.keys, key[:, :, :5])
    found, _ = layer.update(*states(2, 1, 7))
    assert torch.equal(found, torch.cat((key[:, :, :5], states(2, 1, 7)[0]), 2))
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(key, value)
    assert layer.blocks[0].data_ptr() == place
    layer.reset()
    layer.update(*states(5, 2))  # another batch takes other memory
    assert layer.batch_size == 5
    for wrong in (1, -3):
        with pytest.raises(RegroupError):
            layer.crop(wrong)


def test_a_window_is_cropped_as_far_as_it_goes_back() -> None:
    layer = SlidingKVLayer(4)
    key, value = states(1, 9)
    layer.update(key, value)
    layer.crop(-1)
    found, _ = layer.update(key[:, :, 8:], value[:, :, 8:])
    assert torch.equal(found, key[:, :, 5:])
    with pytest.raises(RegroupError, match="no longer stored"):
        layer.crop(-2)


def test_a_recording_cache_can_be_cropped_anywhere() -> None:
    ours, stock = KVCache([SlidingKVLayer(4), KVLayer()]), DynamicCache()
    stock.layers = [DynamicSlidingWindowLayer(4), DynamicLayer()]
    stock.layer_class_to_replicate = None

    def step(tokens: int, seed: int) -> None:
        for index in (0, 1):
            both = [cache.update(*states(1, tokens, seed), index) for cache in (ours, stock)]
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    step(7, 0)
    step(1, 1)
    for cache in (ours, stock):
        cache.activate_past_recording()
    for seed in (2, 3, 4):
        step(1, seed)
    for cache in (ours, stock):
        cache.crop(-2)
    step(2, 5)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda layer: layer.update(*states(2, 9)), "full"),
        (lambda layer: layer.update(*states(3, 1)), "batch 3"),
        (lambda layer: layer.update(*states(2, 1, heads=1)), "1 KV heads"),
        (lambda layer: layer.update(states(2, 1)[0].requires_grad_(), states(2, 1)[1]), "no gradients"),
        (lambda layer: layer.update(states(2, 1)[0], states(2, 1)[1].requires_grad_()), "no gradients"),
        (lambda layer: layer.update(*(each.bfloat16() for each in states(2, 1))), "bfloat16"),
        (lambda layer: layer.update(*(each[..., :4] for each in states(2, 1))), "KV heads of 4"),
        (lambda layer: layer.update(states(2, 1)[0][0], states(2, 1)[1][0]), "four dimensions"),
        (lambda layer: layer.update(None, None), "four dimensions"),
        (lambda layer: layer.update(states(2, 1)[0], states(2, 2)[1]), "differ in batch, KV heads or tokens"),
        (lambda layer: layer.crop(-5), "at most 4"),
        (lambda layer: layer.crop(1), "must not be positive"),
        (lambda layer: layer.crop("1"), "must not be positive"),
        (lambda layer: layer.crop(-1.0), "must not be positive"),
        (lambda layer: layer.crop(True), "must not be positive"),
        (lambda layer: layer.crop(None), "must not be positive"),
        (lambda layer: layer.offload(), "offloaded"),
    ],
)
def test_what_does_not_fit_is_refused(update: Callable[[KVLayer], Any], message: str) -> None:
    layer = KVLayer(10)
    before, _ = layer.update(*states(2, 4))
    with pytest.raises(RegroupError, match=message):
        update(layer)
    assert layer.get_seq_length() == 4
    assert torch.equal(before, states(2, 4)[0])


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "8", True])
def test_a_length_that_is_none_is_refused(wrong: Any) -> None:
    for make in (KVLayer, lambda length: KVCache(max_length=length), lambda length: SlidingKVLayer(4, length)):
        with pytest.raises(RegroupError, match="max_length of 1 or more"):
            make(wrong)
    with pytest.raises(RegroupError, match="window"):
        SlidingKVLayer(wrong)
    assert KVLayer(np.int64(8)).max_length == 8  # pyright: ignore[reportArgumentType]


def test_all_layers_are_cropped_or_none() -> None:
    cache = KVCache([KVLayer(12), SlidingKVLayer(4)])
    for layer in range(2):
        cache.update(*states(1, 9), layer)
    with pytest.raises(RegroupError, match="no longer stored"):
        cache.crop(-2)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [9, 9]
    cache.crop(np.int64(-1))  # pyright: ignore[reportArgumentType]
    assert [cache.get_seq_length(layer) for layer in range(2)] == [8, 8]
    # As in transformers, what was never used has nothing to lose.
    unused, stock = KVCache([KVLayer(12)]), DynamicCache()
    unused.crop(-3)
    stock.crop(-3)
    assert unused.get_seq_length() == stock.get_seq_length() == 0


def test_it_can_be_written_in_and_out_of_inference_mode() -> None:
    layer = KVLayer(4)
    with torch.inference_mode():
        layer.update(*states(1, 1))
    layer.update(*states(1, 1, 1))
    assert layer.get_seq_length() == 2


@pytest.mark.parametrize("make", [lambda: KVLayer(9), lambda: KVLayer(), lambda: SlidingKVLayer(3)])
def test_rows_chosen_in_inference_mode_can_be_written_outside_of_it(make: Callable[[], KVLayer]) -> None:
    layer = make()
    with torch.inference_mode():
        layer.update(*states(1, 2))
        layer.batch_repeat_interleave(2)
    found, _ = layer.update(*states(2, 1, 1))
    assert torch.equal(found[1, :, -1], states(2, 1, 1)[0][1, :, 0])


@pytest.mark.parametrize("make", [lambda: KVLayer(9), lambda: KVLayer(), lambda: SlidingKVLayer(3)])
def test_after_a_reset_states_may_be_of_another_form(make: Callable[[], KVLayer]) -> None:
    layer = make()
    layer.update(*states(2, 4))
    place = layer.blocks[0].data_ptr()
    layer.reset()
    layer.update(*states(2, 4))
    assert layer.blocks[0].data_ptr() == place
    for key, value in (
        [each.bfloat16() for each in states(2, 2)],
        [each[..., :4] for each in states(2, 2)],
        states(3, 2),
    ):
        layer.reset()
        found = layer.update(key, value)
        assert torch.equal(found[0], key)
        assert torch.equal(found[1], value)
        assert found[0].dtype == key.dtype


def test_parameters_are_taken_where_no_gradients_are_kept() -> None:
    key, value = (torch.nn.Parameter(each) for each in states(2, 2))
    with torch.no_grad():
        found = KVLayer().update(key, value)
    assert not any(each.requires_grad for each in found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", "mixed"), ("llama", "one"), ("qwen2", "some"), ("mistral", "some"), ("gemma2", "mixed")),
        *(("t5", "mixed"), ("bart", "one"), ("whisper", "mixed"), ("gpt2", "one"), ("bloom", "mixed")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_inspect_predicts(converted: Converted, name: str, kind: str, dtype: torch.dtype) -> None:
    """Each layer its own number of KV heads, windows and encoders included: equal to the byte."""
    folder = converted(name, kind)
    model = regroup.load(folder, progress=False, dtype=dtype)
    batch, prompt, context = 3, 7, 11
    cache = KVCache.for_model(model, max_length=context)
    inputs = tiny.inputs(name, batch, prompt)
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].to(dtype)
    model.eval()(**inputs, past_key_values=cache, use_cache=True)
    encoder = tiny.SPEECH_FRAMES // 2 if "input_features" in inputs else inputs["input_ids"].shape[1]
    layers = [layer for layer in layout_of(folder).layers if layer.kind != "encoder"]
    word = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    predicted = kv_cache_bytes(layers, context=context, batch=batch, encoder_context=encoder, dtype=word)
    assert cache.nbytes == predicted
    assert predicted != kv_cache_bytes(layers, context=4, batch=batch, encoder_context=encoder, dtype=word)


def test_a_cache_is_made_from_a_model_or_its_config() -> None:
    model = tiny.build("gemma2")
    for source in (model, model.config):
        cache = KVCache.for_model(source, max_length=9)
        assert [type(layer) for layer in cache.layers] == [SlidingKVLayer, KVLayer]
        assert cache.get_max_length() == 9
        assert cache.nbytes == 0
    crossed = KVCache.for_model(tiny.build("t5"))
    assert isinstance(crossed, EncoderDecoderKVCache)
    with pytest.raises(RegroupError, match="max_length of 1"):
        KVCache.for_model(model, max_length=0)
    config = tiny.build("llama").config
    config.layer_types = ["linear_attention"] * 3
    with pytest.raises(RegroupError, match="linear_attention"):
        KVCache.for_model(config)


@torch.no_grad()
@pytest.mark.parametrize("forget", [False, True])
def test_a_cache_that_forgets_a_token_shows(forget: bool) -> None:
    """Tokens one by one through the cache give the logits of one pass; without one of them they do not."""
    model = tiny.build("llama", attn_implementation="eager")
    ids = tiny.inputs("llama", 2, 12)["input_ids"]
    cache = KVCache.for_model(model, max_length=12)
    whole = last = model(ids).logits
    for token in range(12):
        positions = torch.full((2, 1), token)
        last = model(ids[:, token : token + 1], past_key_values=cache, position_ids=positions).logits
        if forget and token == 5:
            cache.crop(-1)
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-4) is not forget
