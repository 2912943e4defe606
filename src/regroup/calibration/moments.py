"""Second moments of what one attention layer computes on text, summed over batches."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..layout.types import AttentionLayer
from ..processes import ProcessGroup
from ..solver.heads import HeadWeights, group_owners
from ..solver.statistics import Moments
from .decoder_layer import AttentionTrace


class MomentSums:
    """Accumulates the moments of one original attention layer over batches, in float64.

    Args:
        layer, weights: of the original model.
        order, groups: how heads are grouped.
        attended: whether to sum what each head's attention mixes, which needs its attention weights.
    """

    def __init__(
        self, layer: AttentionLayer, weights: HeadWeights, order: tuple[int, ...], groups: int, *, attended: bool = True
    ) -> None:
        self.weights, self.attended = weights, attended
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = {"query": 0, "memory": 0}
        self._groups = group_owners(order, layer.num_key_value_heads, groups)

    def add(self, trace: AttentionTrace, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Count one batch; the masks (B, T) and (B, S) say which positions hold text, None that all do."""
        if "heads" not in trace.derived:
            # The same for every way to group them.
            trace.derived["heads"] = (
                _project(trace.query_input, self.weights.query, self.weights.query_bias),
                _project(trace.memory, self.weights.key, self.weights.key_bias),
                _project(trace.memory, self.weights.value, self.weights.value_bias),
            )
        query, key, value = trace.derived["heads"]
        rows, columns = _selected(query_mask, trace.query_input), _selected(memory_mask, trace.memory)
        q = query.flatten(0, 1)[rows].double()
        self._count("query", torch.einsum("thd,the->hde", q, q))
        for number, (members, distinct, _) in enumerate(self._groups):
            for name, states in (("key", key), ("value", value)):
                flat = states[:, :, distinct].flatten(0, 1)[columns].flatten(1).double()
                self._count(f"{name}.{number}", flat.T @ flat)
            if not self.attended:
                continue
            assert trace.weights is not None
            stacked = value[:, :, distinct].flatten(2)
            moments = []
            for head in members:
                mixed = _mixed(trace, head, stacked).flatten(0, 1)[rows].double()
                moments.append(mixed.T @ mixed)
            self._count(f"attended.{number}", torch.stack(moments))
        self._rows["query"] += int(rows.sum())
        self._rows["memory"] += int(columns.sum())

    def merge(self, processes: ProcessGroup) -> None:
        """Count what the other processes counted, so that all have the sums of all batches."""
        if processes.size > 1:
            rows = {f"rows.{name}": torch.tensor(count) for name, count in self._rows.items()}
            found = processes.sum_tensors(self._sums | rows)
            self._rows = {name: int(found.pop(f"rows.{name}")) for name in self._rows}
            self._sums = found

    def moments(self) -> Moments:
        """Means over the rows counted."""
        sums, rows, numbers = self._sums, self._rows, range(len(self._groups))
        return Moments(
            query=sums["query"] / rows["query"],
            key=[sums[f"key.{number}"] / rows["memory"] for number in numbers],
            value=[sums[f"value.{number}"] / rows["memory"] for number in numbers],
            attended=[sums[f"attended.{number}"] / rows["query"] for number in numbers] if self.attended else None,
        )

    def _count(self, name: str, value: torch.Tensor) -> None:
        wide = value.double().cpu()
        self._sums[name] = self._sums[name] + wide if name in self._sums else wide


def _project(states: torch.Tensor, heads: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, T, E) and (H, D, E) to (B, T, H, D)."""
    out = torch.einsum("bte,hde->bthd", states, heads.to(states))
    return out if bias is None else out + bias.to(states)


def _mixed(trace: AttentionTrace, head: int, values: torch.Tensor) -> torch.Tensor:
    """What a head's attention makes of values (B, S, F): (B, T, F). Leaves out what attention never reaches."""
    assert trace.weights is not None
    if "reach" not in trace.derived:
        trace.derived["reach"] = _reach(trace.weights)
    parts = [
        trace.weights[:, head, rows, columns].float() @ values[:, columns] for rows, columns in trace.derived["reach"]
    ]
    return torch.cat(parts, dim=1)


def _reach(weights: torch.Tensor, parts: int = 4) -> list[tuple[slice, slice]]:
    """Runs of queries, and for each the run of positions outside of which no head gives any weight: causal, windows."""
    T, S = weights.shape[-2:]
    size, found = -(-T // parts), []
    edges = [S * part // parts for part in range(parts + 1)]
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        # Weights are not negative, and a sum takes a fraction of the time of any().
        used = [bool(weights[:, :, rows, a:b].sum()) for a, b in pairwise(edges)]
        first = used.index(True) if True in used else 0
        last = parts - used[::-1].index(True) if True in used else 0
        found.append((rows, slice(edges[first], edges[last])))
    return found


def _selected(mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Which of the B·T positions count, (B·T,) bool."""
    if mask is None or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[0] * states.shape[1], dtype=torch.bool)
    return mask.flatten().bool()
