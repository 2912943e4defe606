"""What a model with certain KV heads takes and how long it takes: arithmetic on plain numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..bench.roofline import Cost, DecodingLayer
from ..layout.kv_cache import DTYPE_BYTES, kv_cache_bytes


@dataclass(frozen=True)
class Heads:
    """An attention layer, as far as its cache and its arithmetic depend on it."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kind: str
    window: int | None

    @classmethod
    def of(cls, layer: DecodingLayer, devices: int = 1) -> Heads:
        """One device's part of a layer: heads are divided, and a KV head that is alone is on all devices.

        With fewer KV heads than devices some of them are copied (paper, section 2.2), so that a device never has less
        than one.
        """
        return cls(
            math.ceil(layer.num_attention_heads / devices),
            math.ceil(layer.num_key_value_heads / devices),
            layer.head_dim,
            layer.kind,
            layer.window,
        )


@dataclass(frozen=True)
class Shape:
    """What a prediction needs to know of a model.

    Attributes:
        parameters: all that are held in memory, an encoder's too.
        attention: the layers with a KV cache.
        hidden, intermediate, vocabulary: sizes.
        encoder_decoder: whether the context is an encoder's.
    """

    parameters: int
    attention: tuple[DecodingLayer, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    encoder_decoder: bool = False


@dataclass(frozen=True)
class Setting:
    """How a model is served.

    Attributes:
        batch: sequences at once.
        context: tokens of each when the last one is made; of an encoder-decoder, of its input.
        new: tokens that an encoder-decoder's decoder has made by then.
        dtype: of weights and cache.
        devices: that share every layer (tensor parallelism).
    """

    batch: int
    context: int
    new: int
    dtype: str
    devices: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        weights, cache: exact, up to what a device's share of the weights is rounded to.
        working: an estimate of what a step needs beside them.
    """

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def memory(shape: Shape, setting: Setting) -> Memory:
    """What a device holds while a step runs."""
    size = DTYPE_BYTES[setting.dtype]
    own = setting.new if shape.encoder_decoder else setting.context
    cache = kv_cache_bytes(
        [Heads.of(layer, setting.devices) for layer in shape.attention],
        context=own,
        encoder_context=setting.context,
        batch=setting.batch,
        dtype=setting.dtype,
    )
    # Hidden states and the widest layer of one token a sequence; logits once as computed and once in float32.
    working = setting.batch * (6 * shape.hidden + 3 * shape.intermediate) * size
    working += setting.batch * shape.vocabulary * (size + 4)
    return Memory(math.ceil(shape.parameters / setting.devices) * size, cache, working)


def largest_batch(shape: Shape, setting: Setting, available: int) -> int:
    """Sequences that fit into so many bytes of a device; 0 where the weights alone do not."""
    none = memory(shape, replace(setting, batch=0)).total
    one = memory(shape, replace(setting, batch=1)).total
    return max(0, (available - none) // (one - none))


@dataclass(frozen=True)
class Efficiency:
    """How many times the floor a step really takes, of its two parts: what a bench record says, or 1.

    Attributes:
        weights, attention: factors of the floors.
        measured: whether they were.
    """

    weights: float = 1.0
    attention: float = 1.0
    measured: bool = False


def fit(floors: Sequence[tuple[float, float]], seconds: Sequence[float]) -> Efficiency:
    """The efficiency under which floors of weights and attention come to measured times.

    Least squares in relative terms with neither factor below 1: nothing is faster than its floor. With one measurement,
    or floors that all have one proportion, both parts get the same factor.
    """
    rows = [(w / t, a / t) for (w, a), t in zip(floors, seconds, strict=True)]
    ww, wa, aa = (sum(x * y for x, y in pairs) for pairs in _products(rows))
    bw, ba = sum(w for w, _ in rows), sum(a for _, a in rows)
    determinant = ww * aa - wa * wa
    if len(rows) > 1 and determinant > 1e-6 * ww * aa:
        weights, attention = (bw * aa - ba * wa) / determinant, (ba * ww - bw * wa) / determinant
        if weights < 1:
            weights, attention = 1.0, max(1.0, (ba - wa) / aa)
        elif attention < 1:
            weights, attention = max(1.0, (bw - wa) / ww), 1.0
        return Efficiency(weights, attention, True)
    both = sum(w + a for w, a in rows) / sum((w + a) ** 2 for w, a in rows)
    return Efficiency(max(1.0, both), max(1.0, both), True)


def _products(rows: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(w, w) for w, _ in rows], [(w, a) for w, a in rows], [(a, a) for _, a in rows]


def between(measured: Mapping[int, Efficiency], batch: int) -> Efficiency:
    """The efficiency at a batch from those measured at others: few rows come nearer to their floor than many.

    Between two of them factors are interpolated linearly in logarithms; beyond them the nearest holds. Without any they
    are 1.
    """
    if not measured:
        return Efficiency()
    low = max((size for size in measured if size <= batch), default=min(measured))
    high = min((size for size in measured if size >= batch), default=max(measured))
    share = math.log(batch / low) / math.log(high / low) if high > low else 0.0

    def mixed(first: float, second: float) -> float:
        return first ** (1 - share) * second**share

    one, other = measured[low], measured[high]
    return Efficiency(mixed(one.weights, other.weights), mixed(one.attention, other.attention), True)


@dataclass(frozen=True)
class Rates:
    """Of a device: bytes a second, and operations a second of products as weights and as attention have them."""

    bandwidth: float
    weights: float
    attention: float


def step_floors(weights: Cost, attention: Cost, rates: Rates) -> tuple[float, float]:
    """Least seconds of a step's two parts."""
    return weights.floor(rates.bandwidth, rates.weights), attention.floor(rates.bandwidth, rates.attention)


def step_seconds(weights: Cost, attention: Cost, rates: Rates, efficiency: Efficiency) -> float:
    """Seconds of a step, of which every sequence gets one token."""
    first, second = step_floors(weights, attention, rates)
    return efficiency.weights * first + efficiency.attention * second


def first_token_seconds(prompt: Cost, rate: float, bandwidth: float) -> float:
    """Least seconds to the first token: the prompt's arithmetic, or reading the weights once."""
    return prompt.floor(bandwidth, rate)
