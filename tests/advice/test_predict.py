"""Predictions against built models, brute force and hand-made numbers."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from helpers import run
from regroup.advice.choose import Choice, Prediction, choose, conventional, knee_distances, pareto
from regroup.advice.hardware import KNOWN, named
from regroup.advice.predict import Efficiency, Heads, Setting, Shape, between, fit, largest_batch, memory
from regroup.advice.recovery import curves_of, left_out_error
from regroup.advice.recovery import fit as fit_recovery
from regroup.attention.cache import KVCache
from regroup.bench.build import describe, parameters_of
from regroup.errors import RegroupError
from regroup.modeling import load

Converted = Callable[[str, str], Path]
Saved = Callable[[str], Path]

FAMILIES = ["llama", "llama_grouped", "qwen2", "gpt2", "opt", "gpt_neox", "mixtral", "t5", "bart"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["original", "some"])
def test_memory_is_that_of_the_model_and_its_cache(name: str, kind: str, saved: Saved, converted: Converted) -> None:
    folder = saved(name) if kind == "original" else converted(name, "some")
    config = json.loads((folder / "config.json").read_text())
    shape_of = describe(config, kv_heads=None, layers=None)
    shape = Shape(parameters_of(config), shape_of.attention, 48, 64, 96, shape_of.is_encoder_decoder)
    model: Any = load(folder, dtype=torch.float32, progress=False).eval()
    batch, length, new = 3, 12, 5
    inputs = tiny.inputs(name, batch, length)
    cache = KVCache.for_model(model, max_length=(new if shape.encoder_decoder else length))
    with torch.inference_mode():
        if shape.encoder_decoder:
            model.generate(
                **{k: v for k, v in inputs.items() if not k.startswith("decoder")},
                max_new_tokens=new,
                min_new_tokens=new,
                past_key_values=cache,
            )
        else:
            model(**inputs, past_key_values=cache, use_cache=True)
    held = {id(p): p for p in model.parameters()}.values()
    taken = memory(shape, Setting(batch, inputs["input_ids"].shape[1], new, "float32"))
    assert taken.weights == sum(p.numel() * 4 for p in held)
    assert taken.cache == cache.nbytes


def layer(kv_heads: int, *, kind: str = "self", window: int | None = None) -> Heads:
    return Heads(8, kv_heads, 16, kind, window)


SHAPE = Shape(1000, (layer(8), layer(4, window=10), layer(2, kind="cross")), 32, 64, 50, True)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    setting = Setting(1, 100, 20, "bfloat16")
    for available in (0, 1999, 2000, 50_000, 123_456, 10**7):
        count = largest_batch(SHAPE, setting, available)
        fitting = [n for n in range(200) if memory(SHAPE, replace(setting, batch=n)).total <= available]
        assert count == (max(fitting, default=0) if available < 10**7 else count)
        if available == 10**7:
            assert memory(SHAPE, replace(setting, batch=count)).total <= available
            assert memory(SHAPE, replace(setting, batch=count + 1)).total > available


@pytest.mark.parametrize(("devices", "kept"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_kv_heads_are_replicated_on_more_devices(devices: int, kept: int) -> None:
    shape = replace(SHAPE, attention=(layer(8),), encoder_decoder=False)
    one = memory(shape, Setting(1, 100, 2, "float32", 1)).cache
    assert memory(shape, Setting(1, 100, 2, "float32", devices)).cache == one * kept // 8


def test_more_kv_heads_and_more_context_never_take_less() -> None:
    for kv, more in itertools.pairwise((1, 2, 4, 8)):
        small, large = (replace(SHAPE, attention=(layer(count),)) for count in (kv, more))
        for context in (1, 7, 500):
            setting = Setting(2, context, context, "float32")
            assert memory(small, setting).cache < memory(large, setting).cache
            assert memory(small, setting).cache < memory(small, replace(setting, new=2 * context)).cache


def test_efficiency_between_two_batches() -> None:
    measured = {2: Efficiency(1.0, 4.0, True), 8: Efficiency(4.0, 1.0, True)}
    assert between({}, 3) == Efficiency()
    for batch, weights, attention in ((1, 1.0, 4.0), (2, 1.0, 4.0), (4, 2.0, 2.0), (8, 4.0, 1.0), (100, 4.0, 1.0)):
        found = between(measured, batch)
        assert (found.weights, found.attention) == pytest.approx((weights, attention))
        assert found.measured


def test_the_fit_recovers_a_known_efficiency() -> None:
    floors = [(1.0, 0.1), (1.0, 0.5), (1.0, 2.0)]
    found = fit(floors, [1.3 * w + 2.0 * a for w, a in floors])
    assert (found.weights, found.attention) == (pytest.approx(1.3), pytest.approx(2.0))
    # One record cannot tell the parts apart, and nothing is faster than its floor.
    found = fit([(1.0, 1.0)], [3.0])
    assert (found.weights, found.attention) == (pytest.approx(1.5), pytest.approx(1.5))
    found = fit(floors, [w + 0.5 * a for w, a in floors])
    assert found.attention == 1.0
    assert found.weights >= 1.0


def prediction(seconds: float, loss: float | None, *, name: str = "x", cache: int = 1, fits: int = 100) -> Prediction:
    return Prediction(name, 1, {}, 1, cache, 2, fits, seconds, 0.1, loss=loss)


def test_the_front_is_what_brute_force_finds() -> None:
    draw = random.Random(0)
    for _ in range(200):
        found = [prediction(draw.randrange(5), draw.randrange(5), cache=draw.randrange(3)) for _ in range(6)]
        wanted = []
        for one in found:
            mine = (one.token_seconds, one.cache_bytes)
            wanted.append(
                not any(
                    (other.token_seconds, other.cache_bytes) <= mine
                    and (other.loss or 0) <= (one.loss or 0)
                    and ((other.token_seconds, other.cache_bytes), other.loss) != (mine, one.loss)
                    for other in found
                )
            )
        assert pareto(found) == wanted


def test_the_fastest_within_the_limits_is_chosen() -> None:
    found = [prediction(4, 0.0, name="original"), prediction(3, 0.1), prediction(2, 0.3, fits=2), prediction(1, 0.9)]
    assert choose(found, batch=1, max_loss=0.5, max_seconds=None).prediction is found[2]
    assert choose(found, batch=8, max_loss=0.5, max_seconds=None).prediction is found[1]
    assert choose(found, batch=1, max_loss=0.0, max_seconds=None) == Choice(found[0], "limits")
    assert choose(found, batch=1, max_loss=None, max_seconds=2.5).prediction is found[2]
    assert choose(found[:1], batch=1, max_loss=None, max_seconds=None) == Choice(found[0], "nothing else")
    with pytest.raises(RegroupError, match=r"at best 0\.1 nats per token"):
        choose(found[1:], batch=1, max_loss=0.05, max_seconds=None)
    with pytest.raises(RegroupError, match="a batch of 100"):
        choose(found, batch=101, max_loss=None, max_seconds=None)


def test_the_knee_is_the_point_farthest_below_the_chord() -> None:
    """Against geometry: the distance of a point from a line, over the front alone."""
    draw = random.Random(1)
    knees = 0
    for _ in range(300):
        count = draw.randrange(3, 8)
        points = [(100, 0.0)] + [(draw.randrange(1, 100), draw.random() * draw.choice((1, 5))) for _ in range(count)]
        found = [prediction(1.0, loss, cache=cache) for cache, loss in points]
        caches, losses = zip(*points, strict=True)
        scaled = [((c - min(caches)) / (max(caches) - min(caches)), loss / max(losses)) for c, loss in points]
        front = [n for n, p in enumerate(scaled) if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in scaled)]
        # From (0, 1) to (1, 0): twice the triangle's area over its base, positive below.
        area = [(1 - 0) * (1 - scaled[n][1]) - (scaled[n][0] - 0) * (1 - 0) for n in range(len(points))]
        away = [twice / math.hypot(1, 1) for twice in area]
        assert knee_distances(found) == pytest.approx(away)
        chosen = choose(found, batch=1, max_loss=None, max_seconds=None)
        best = max((n for n in range(1, len(points))), key=lambda n: away[n])
        assert chosen.prediction is found[best]
        assert best in front or away[best] <= 0
        assert chosen.reason == ("knee" if away[best] > 0 else "no knee")
        knees += chosen.reason == "knee"
    assert 0 < knees < 300


def test_a_hand_made_knee() -> None:
    caches, losses = (32, 16, 8, 4, 2, 1), (0.0, 0.01, 0.03, 0.2, 1.0, 3.0)
    found = [prediction(c, loss, cache=c, name=str(c)) for c, loss in zip(caches, losses, strict=True)]
    # By hand: 1 - x - y is 0.51, 0.76, 0.84, 0.63 and 0.
    assert choose(found, batch=1, max_loss=None, max_seconds=None).prediction.name == "4"
    # What is lost without any gain is not chosen, and a limit takes the next best.
    worse = [*found, prediction(4, 0.5, cache=4, name="worse")]
    assert choose(worse, batch=1, max_loss=None, max_seconds=None).prediction.name == "4"
    short = [replace(one, largest_batch=100 // one.cache_bytes) for one in found]
    assert choose(short, batch=40, max_loss=None, max_seconds=None).prediction.name == "2"
    # Losses that are all alike say: the smallest cache.
    alike = [replace(one, loss=0.0) for one in found]
    assert choose(alike, batch=1, max_loss=None, max_seconds=None).prediction.name == "1"


@pytest.mark.parametrize(
    ("original", "others", "wanted"),
    [(64, (32, 16, 8, 4, 2, 1), 8), (40, (20, 10, 8, 5, 1), 8), (28, (14, 7, 4, 2, 1), 7), (8, (4, 2, 1), 4),
     (12, (6, 4, 3, 2, 1), 6), (3, (1,), 1), (71, (1,), 1)],
)  # fmt: skip
def test_the_conventional_number(original: int, others: tuple[int, ...], wanted: int) -> None:
    def one(heads: int) -> Prediction:
        return replace(prediction(heads, None, cache=heads), kv_heads=heads, heads={"0": heads})

    found = [one(original), *(one(heads) for heads in others)]
    chosen = choose(found, batch=1, max_loss=None, max_seconds=None)
    assert (chosen.prediction.kv_heads, chosen.reason) == (wanted, "convention")
    assert conventional(found[1:], found[0]) is chosen.prediction


def test_recovery_is_fitted_with_its_cross_validation_error() -> None:
    def curve(scale: float, power: float) -> list[tuple[int, float]]:
        return [(tokens, (1 + tokens / scale) ** -power) for tokens in (0, 10_000, 100_000, 1_000_000)]

    scale, power = fit_recovery([curve(10**4.5, 0.3)])
    assert scale == pytest.approx(10**4.5, rel=0.06)
    assert power == pytest.approx(0.3, rel=0.05)
    assert left_out_error([[curve(10**4.5, 0.3)], [curve(10**4.5, 0.3)]]) == pytest.approx(1.0, abs=0.01)
    assert left_out_error([[curve(10**4.5, 0.3)], [curve(10**4.5, 0.6)]]) > 1.2


def test_only_our_curves_count_and_shares_begin_at_one() -> None:
    rows = [
        {"way": way, "num_key_value_heads": 2, "tokens": tokens, "excess_nats_per_token": excess}
        for way, tokens, excess in (("x (ours)", 0, 0.4), ("x (ours)", 100, 0.1), ("mean", 0, 3.0), ("mean", 100, 2.0))
    ]
    assert curves_of({"results": {"table": rows}}) == [[(0, 1.0), (100, 0.25)]]


def test_known_hardware_is_found_by_name_and_other_is_refused() -> None:
    assert named("H100") is KNOWN["h100"]
    assert named("A100_80GB").memory == 80 * 10**9
    with pytest.raises(RegroupError, match="h100"):
        named("h10")
    with pytest.raises(RegroupError, match="int8 on l4"):
        named("l4").rate("int8")


def test_a_config_alone_gets_memory_and_time(saved: Saved) -> None:
    folder = saved("llama")
    status, out, message = run(
        "advise", folder / "config.json", "--hardware", "l4", "--context", 32, "--batch", 4, "--dtype", "float32"
    )
    assert status == 0, message
    assert "times are lower bounds" in out
    assert "cannot be estimated from a config" in out
