"""Decoding speed of the attention operator, compared with PyTorch's alternatives and with its least possible time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import BACKENDS, explain, grouped_query_attention
from ..errors import RegroupError, human_bytes
from .build import DTYPES
from .machine import OtherProcesses, Rate, product_rate, quantiles, read_bandwidth, timed
from .roofline import Cost, operator_cost

# Bytes of different keys and values, used in turn so that none are in the processor's cache.
_COLD_BYTES = 128 << 20
_RUN_SECONDS = 0.004
_SHAPE_SECONDS = 1.5
_ROUNDS = 7
_FAR, _FAR_ROUNDS = 8, 2
# The largest copy with repeated KV heads: more could exceed the memory of a shared machine.
_REPEATED_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shape:
    """One decoding step of one layer: B sequences, H query heads to G KV heads of D, S tokens in the cache."""

    batch: int
    context: int
    kv_heads: int
    dtype: str = "float32"
    heads: int = 32
    head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("batch", "context", "kv_heads", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise RegroupError(f"the {name} must be at least 1", got=getattr(self, name))
        if self.heads % self.kv_heads:
            raise RegroupError(
                "the query heads cannot be divided into that many groups",
                expected=f"a divisor of {self.heads}",
                got=self.kv_heads,
                remedy="choose --kv-heads that divide --heads",
            )
        if self.dtype not in DTYPES:
            raise RegroupError("unknown dtype", expected=" or ".join(DTYPES), got=self.dtype)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def cost(self) -> Cost:
        """Bytes of keys and values, and floating-point operations."""
        return operator_cost(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            context=self.context,
            dtype=self.dtype,
        )


def grid(
    *,
    batches: Iterable[int],
    contexts: Iterable[int],
    kv_heads: Iterable[int],
    dtypes: Iterable[str],
    heads: int = 32,
    head_dim: int = 128,
) -> list[Shape]:
    """All combinations, with KV heads varying fastest.

    Raises:
        RegroupError: impossible numbers.
    """
    return [
        Shape(batch, context, count, dtype, heads, head_dim)
        for dtype in dtypes
        for batch in batches
        for context in contexts
        for count in kv_heads
    ]


class OperatorRoofs:
    """Rates of this machine for this operator, each measured when it is first used."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.bandwidth = read_bandwidth(device)
        self.products: dict[tuple[int, int, str], Rate] = {}

    def product(self, shape: Shape) -> Rate:
        """FLOP/s of a product of this shape: (H / G, D) queries with keys."""
        key = (shape.group, shape.head_dim, shape.dtype)
        if key not in self.products:
            self.products[key] = product_rate(*key[:2], dtype=getattr(torch, key[2]), device=self.device)
        return self.products[key]


def measure(shape: Shape, roofs: OperatorRoofs, *, flex: bool = False) -> dict[str, Any]:
    """Time every way of computing a shape, with reads and products of the machine in turns.

    Args:
        flex: also FlexAttention, which compiles for each shape, up to a minute.

    Returns:
        The shape; its floor, from the medians of reads and of products of (H / G, D) with keys; and for each way its
        time in milliseconds (20, 50 and 80% quantiles of runs of a few calls) with its largest difference from
        ``enable_gqa``, or why it was not run.
    """
    device = torch.device(roofs.device)
    product = roofs.product(shape).probe
    reads, products = [], []
    query, pairs = _tensors(shape, device)
    actions, reasons = _ways(shape, query, pairs)
    if not flex:
        del actions["regroup flex"]
        reasons["regroup flex"] = "compiles for each shape: it is measured only on request"
    with torch.inference_mode():
        outputs = {}
        for name, action in list(actions.items()):
            try:
                outputs[name] = action(0)
            except RegroupError as error:
                reasons[name] = error.what if error.details["got"] is None else f"{error.what} {error.details['got']}"
                del actions[name]
        expected = outputs["enable_gqa"].float()
        times: dict[str, list[float]] = {name: [] for name in actions}
        once = {
            name: min(timed(lambda action=action: action(0), device) for _ in range(2))
            for name, action in actions.items()
        }
        counts = {name: max(1, min(1000, round(_RUN_SECONDS / max(seconds, 1e-7)))) for name, seconds in once.items()}
        # The slowest ways need no precision, and would take most of the time.
        far = {name for name, seconds in once.items() if seconds > _FAR * min(once.values())}
        order, end = list(actions), time.perf_counter() + _SHAPE_SECONDS
        shuffle = random.Random(0)
        with OtherProcesses() as others:
            while len(reads) < _ROUNDS or time.perf_counter() < end:
                shuffle.shuffle(order)
                reads.append(roofs.bandwidth.probe.run())
                products.append(product.run())
                for name in order:
                    if name in far and len(times[name]) >= _FAR_ROUNDS:
                        continue
                    times[name].append(_run(actions[name], counts[name], len(pairs), device))
                if time.perf_counter() > end + 4 * _SHAPE_SECONDS:
                    break
    bandwidth, rate = statistics.median(reads), statistics.median(products)
    ways: dict[str, Any] = {name: {"not_run": reason} for name, reason in reasons.items()}
    for name, values in times.items():
        found = {key: 1e3 * value for key, value in quantiles(values).items()}
        difference = float((outputs[name].float() - expected).abs().max())
        ways[name] = {"ms": found, "runs": len(values), "largest_difference": difference}
    choice = explain(query, *pairs[0])
    return {
        **asdict(shape),
        "kv_bytes": shape.cost.nbytes,
        "flops": shape.cost.flops,
        "bandwidth_bytes_per_second": bandwidth,
        "product_flops_per_second": rate,
        "floor_ms": 1e3 * shape.cost.floor(bandwidth, rate),
        "auto_takes": choice.backend,
        "other_processes_share_of_cpu": others.share,
        "ways": ways,
    }


def _tensors(shape: Shape, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The queries, and pairs of keys and values: views of slightly larger blocks, as in a cache."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, generator=generator).to(device, dtype)
    count = max(1, min(64, _COLD_BYTES // shape.cost.nbytes))
    noise = torch.randn(1 << 20, generator=generator).to(device, dtype)
    pairs = []
    for _ in range(count):
        blocks = []
        for _ in range(2):
            block = torch.empty(
                shape.batch, shape.kv_heads, shape.context + 64, shape.head_dim, dtype=dtype, device=device
            )
            flat = block.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                piece = flat[start : start + noise.numel()]
                piece.copy_(noise[: piece.numel()])
            blocks.append(block[:, :, : shape.context])
        pairs.append((blocks[0], blocks[1]))
    return query, pairs


def _ways(
    shape: Shape, query: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Callable[[int], Tensor]], dict[str, str]]:
    """The ways that are compared, by name, as functions of a pair's index; and the reasons why others are not."""

    def enable_gqa(index: int) -> Tensor:
        return functional.scaled_dot_product_attention(query, *pairs[index], enable_gqa=True)

    def repeat(index: int) -> Tensor:
        key, value = (states.repeat_interleave(shape.group, dim=1) for states in pairs[index])
        return functional.scaled_dot_product_attention(query, key, value)

    def packed_sdpa(index: int) -> Tensor:
        folded = query.view(shape.batch, shape.kv_heads, shape.group, shape.head_dim)
        return functional.scaled_dot_product_attention(folded, *pairs[index]).view(query.shape)

    def ours(backend: str) -> Callable[[int], Tensor]:
        return lambda index: grouped_query_attention(query, *pairs[index], backend=backend)

    ways: dict[str, Callable[[int], Tensor]] = {"enable_gqa": enable_gqa}
    reasons: dict[str, str] = {}
    repeated = shape.cost.nbytes * shape.group
    if shape.group == 1:
        reasons["repeat"] = reasons["packed_sdpa"] = "the same as enable_gqa: each query head has a KV head"
    else:
        ways["packed_sdpa"] = packed_sdpa
        if repeated > _REPEATED_BYTES:
            reasons["repeat"] = f"repeated keys and values would take {human_bytes(repeated)}"
        else:
            ways["repeat"] = repeat
    ways["regroup"] = ours("auto")
    ways |= {f"regroup {name}": ours(name) for name in BACKENDS if name not in ("auto", "reference")}
    return ways, reasons


def _run(action: Callable[[int], Tensor], count: int, pairs: int, device: torch.device) -> float:
    """Seconds per call, over ``count`` calls that take the pairs in turn, from where the last run ended."""

    def calls() -> None:
        for index in range(count):
            action(index % pairs)

    return timed(calls, device) / count


def unsupported_reason(shape: Shape, limit: int) -> str | None:
    """The reason why a shape is omitted from a grid, or None."""
    if shape.cost.nbytes > limit:
        return f"{shape.cost.nbytes / 1e9:.3g} GB of keys and values, more than the limit of {limit / 1e9:.3g} GB"
    return None
