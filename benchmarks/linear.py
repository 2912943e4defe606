"""Time one linear layer with few rows on the CPU: ``F.linear``, PyTorch's packings, and regroup's two layers.

    python benchmarks/linear.py -o benchmarks/records/linear.json

Each time is the median over rounds in which the alternatives take turns; several copies of a weight are read in turn,
so that none is found in a processor's cache. Nothing else should run at the same time: with two cores, a competing
process shows as times of 8, 16 or 24 ms. What a processor cannot do is left out (oneDNN packs bfloat16 on some alone).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.mkldnn import to_mkldnn

from regroup.attention.cpu import build as cpu_build
from regroup.attention.cpu.linear_layers import DirectLinear, PackedLinear, fast_layer, packed_unsupported_reason
from regroup.record import record, write_record

SHAPES = [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048)]
COPIES_BYTES = 200_000_000


def _public(weight: Tensor) -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return to_mkldnn(layer, weight.dtype)


def alternatives(weights: list[Tensor], states: Tensor) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "linear": [lambda x, w=weight: linear(x, w) for weight in weights],
    }
    if packed_unsupported_reason(weights[0].dtype) is None:
        found["to_mkldnn"] = [_public(weight) for weight in weights]
        found["packed"] = [PackedLinear(weight, None) for weight in weights]
    if cpu_build.unsupported_reason() is None:
        found["direct"] = [DirectLinear(weight, None) for weight in weights]
    if weights[0].dtype == torch.float32:  # what torch.compile with freezing takes
        ops, rows = torch.ops.mkl, states.shape[0]
        packs = [(ops._mkl_reorder_linear_weight(weight, rows), weight) for weight in weights]
        found["mkl"] = [lambda x, p=pack: ops._mkl_linear(x, *p, None, rows) for pack in packs]
    return found


@torch.no_grad()
def measure(dtype: torch.dtype, rows: int, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    size = shape[0] * shape[1] * dtype.itemsize
    weights = [torch.randn(shape).mul_(0.02).to(dtype) for _ in range(max(2, COPIES_BYTES // size))]
    states = torch.randn(rows, shape[1]).to(dtype)
    candidates = alternatives(weights, states)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, layers in candidates.items():
            start = time.perf_counter()
            for layer in layers:
                layer(states)
            if turn:  # the first is warm-up
                times[name].append((time.perf_counter() - start) / len(layers))
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rows": rows, "out": shape[0], "in": shape[1]}
    for name, taken in times.items():
        median = statistics.median(taken)
        low, *_, high = statistics.quantiles(taken, n=5)
        found[name] = {
            "milliseconds": round(median * 1e3, 4),
            "fastest_milliseconds": round(min(taken) * 1e3, 4),
            "quantiles_20_80": [round(low * 1e3, 4), round(high * 1e3, 4)],
            "weight_gigabytes_a_second": round(size / median / 1e9, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    results = [
        measure(dtype, count, shape, arguments.rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for count in rows
        for shape in SHAPES
    ]
    for result in results:
        print(
            result["dtype"],
            f"{result['rows']} × {result['in']} → {result['out']}:",
            ", ".join(
                f"{name} {result[name]['milliseconds']} ms ({result[name]['weight_gigabytes_a_second']} GB/s)"
                for name in ("linear", "to_mkldnn", "mkl", "packed", "direct")
                if name in result
            ),
        )
    taken = {str(dtype).removeprefix("torch."): fast_layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
    settings = {
        "rows": rows,
        "rounds": arguments.rounds,
        "copies_bytes": COPIES_BYTES,
        "prepare_for_inference": {dtype: layer and layer.__name__ for dtype, (layer, _) in taken.items()},
    }
    write_record(arguments.output, record("benchmarks/linear", settings, {"layers": results}))


if __name__ == "__main__":
    main()
