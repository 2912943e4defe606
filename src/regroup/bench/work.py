"""What is decoded, whether it fits into memory, and its least possible time: everything before a model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..devices import USABLE, free_memory
from ..errors import RegroupError, human_bytes
from ..families import family_for
from ..layout.kv_cache import DTYPE_BYTES, kv_cache_bytes
from .build import DTYPES, Model, describe, read_config
from .machine import Rate, product_rate, read_bandwidth
from .roofline import Cost, attention_flops, weights_cost


@dataclass(frozen=True)
class Work:
    """The workload of a benchmark.

    Attributes:
        batch: number of sequences.
        prompt: tokens before the first new token; for an encoder-decoder, tokens of the encoder.
        new: tokens to generate per sequence, at least 2: the first is counted separately.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: a torch device.
        repeats: number of repetitions.
    """

    batch: int = 1
    prompt: int = 512
    new: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 1

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise RegroupError(
                    f"--{name} is too small",
                    expected=f"{least} or more",
                    got=getattr(self, name),
                )
        if self.dtype not in DTYPES:
            raise RegroupError("unknown dtype", expected=" or ".join(DTYPES), got=self.dtype)


@dataclass(frozen=True)
class Ceiling:
    """The upper limit of a step's speed: the costs of its two parts, and the measured rates."""

    weights: Cost
    attention: Cost
    bandwidth: float
    weights_rate: float
    attention_rate: float

    def between(self, other: Ceiling) -> Ceiling:
        """The same costs with the mean of both rates, measured before and after."""
        mine = (self.bandwidth, self.weights_rate, self.attention_rate)
        theirs = (other.bandwidth, other.weights_rate, other.attention_rate)
        return Ceiling(self.weights, self.attention, *((a + b) / 2 for a, b in zip(mine, theirs, strict=True)))

    @property
    def seconds(self) -> float:
        """The least time of a step, whose parts run one after the other."""
        return self.weights.floor(self.bandwidth, self.weights_rate) + self.attention.floor(
            self.bandwidth, self.attention_rate
        )


def models_for(source: str, kv_heads: Sequence[int] | None, work: Work, *, layers: int | None = None) -> list[Model]:
    """The models to benchmark, one per number of KV heads, which must fit the workload and memory.

    Args:
        source: a checkpoint folder, a config or a hub id (see :func:`build.read_config`).
        kv_heads: numbers of KV heads; None: that of the model.
        layers: of the decoder; None: all, or as many as fit into memory, the same for each model.

    Raises:
        RegroupError: a model cannot be built, does not fit into memory, or has too few positions.
    """
    config, folder = read_config(source)
    wanted: list[int | None] = [None] if kv_heads is None else list(dict.fromkeys(kv_heads))

    def made(count: int | None) -> list[Model]:
        return [describe(config, kv_heads=g, layers=count, folder=folder) for g in wanted]

    models = made(layers)
    check_positions(models[0], work)
    free = free_memory(work.device)
    largest = max(memory_needed(model, work) for model in models)
    if free is None or largest <= free * USABLE:
        return models
    if layers is None:
        # Every layer needs the same memory.
        one, two = (max(memory_needed(m, work) for m in made(count)) for count in (1, min(2, models[0].full_layers)))
        if two > one and one <= free * USABLE:
            return made(min(models[0].full_layers - 1, 1 + int((free * USABLE - one) // (two - one))))
        largest = one
    raise RegroupError(
        "the benchmark does not fit into memory"
        + ("" if layers is not None else ", not even with one layer of the model"),
        expected=f"at most {USABLE:.0%} of the {human_bytes(free)} that are free",
        got=f"about {human_bytes(largest)} for weights, cache and prompt",
        remedy="lower --batch or --prompt"
        + (", or omit --layers, so that as many layers are used as fit" if layers is not None else ""),
    )


def memory_needed(model: Model, work: Work) -> int:
    """Estimated bytes: weights, twice the cache (transformers copies it), and the largest activations of the prompt."""
    size = DTYPE_BYTES[work.dtype]
    tokens = work.batch * (1 if model.is_encoder_decoder else work.prompt)
    activations = tokens * (6 * model.hidden + 3 * model.intermediate) * size
    logits = work.batch * model.vocabulary * 8
    return model.parameters * size + 2 * cache_bytes(model, work) + activations + logits


def cache_bytes(model: Model, work: Work) -> int:
    """Bytes of the KV cache after the last token."""
    own = work.new if model.is_encoder_decoder else work.prompt + work.new - 1
    return kv_cache_bytes(model.attention, context=own, encoder_context=work.prompt, batch=work.batch, dtype=work.dtype)


def middle_context(model: Model, work: Work) -> int:
    """Tokens in the decoder's cache when half of the new tokens are generated."""
    return max(1, work.new // 2 if model.is_encoder_decoder else work.prompt + work.new // 2)


def step_costs(model: Model, work: Work) -> tuple[Cost, Cost]:
    """The costs of a step in the middle of the new tokens: linear layers, and attention."""
    sizes = {"context": middle_context(model, work), "batch": work.batch, "encoder_context": work.prompt}
    attention = Cost(
        kv_cache_bytes(model.attention, dtype=work.dtype, **sizes), attention_flops(model.attention, **sizes)
    )
    return weights_cost(model.weights, batch=work.batch, dtype=work.dtype), attention


class Roofs:
    """Rates of this machine, each measured when it is first used."""

    def __init__(self, work: Work, bandwidth: Rate | None = None) -> None:
        self.work = work
        self.dtype: torch.dtype = getattr(torch, work.dtype)
        self.bandwidth = bandwidth or read_bandwidth(work.device)
        self.products: dict[tuple[int, int], Rate] = {}

    def for_work(self, work: Work) -> Roofs:
        """The same machine, for another workload."""
        return Roofs(work, self.bandwidth)

    def product(self, rows: int, inner: int) -> Rate:
        """FLOP/s of a product of (rows, inner) with a matrix."""
        if (rows, inner) not in self.products:
            self.products[rows, inner] = product_rate(rows, inner, dtype=self.dtype, device=self.work.device)
        return self.products[rows, inner]

    def ceiling(self, model: Model, *, again: bool = False) -> Ceiling:
        """The ceiling of a model's step, from median rates; ``again``: measure the rates again."""
        weights, attention = step_costs(model, self.work)
        # Layers may differ; the one with most queries per KV head has the fastest product.
        layer = max(model.attention, key=lambda layer: layer.num_attention_heads // layer.num_key_value_heads)
        group = layer.num_attention_heads // layer.num_key_value_heads
        rates = (self.bandwidth, self.product(self.work.batch, model.hidden), self.product(group, layer.head_dim))
        return Ceiling(
            weights,
            attention,
            *(rate.again() if again else rate.median for rate in rates),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "read_bandwidth_bytes_per_second": self.bandwidth.median,
            "read_bandwidth_best_bytes_per_second": self.bandwidth.best,
            "matrix_rates_flops_per_second": {
                f"{rows} rows of {inner}": rate.median for (rows, inner), rate in self.products.items()
            },
        }


def check_positions(
    model: Model,
    work: Work,
    *,
    asked: str = "the prompt with the new tokens",
    options: str = "--prompt or --new",
) -> None:
    """Check that the model has enough positions.

    Args:
        model, work: the model and its workload.
        asked, options: for the message: what a decoder-only model's tokens are, and their options.
    """
    config = model.config
    family = family_for(config)
    if config.get("alibi") or (family is not None and family.positions in ("relative", "alibi")):
        return

    def check(what: str, tokens: int, keys: tuple[str, ...]) -> None:
        key = next((key for key in keys if isinstance(config.get(key), int)), None)
        if key is not None and tokens > config[key]:
            raise RegroupError(
                f"{what} needs more positions than the model has",
                expected=f"at most {config[key]} ({key})",
                got=tokens,
                remedy=f"lower {options}",
            )

    if model.is_encoder_decoder:
        check("the prompt", work.prompt, ("max_source_positions", "max_position_embeddings"))
        check("what is decoded", work.new, ("max_target_positions", "max_position_embeddings"))
    else:
        check(asked, work.prompt + work.new, ("max_position_embeddings", "n_positions"))
