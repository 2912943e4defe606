"""Groups of heads with weights and inputs, and what sharing them costs, measured head by head without the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from regroup.merge.lowrank import low_rank
from regroup.merge.procrustes import procrustes
from regroup.merge.rotary import rotary_low_rank, rotary_procrustes
from regroup.merge.sharing import Sharing, owners

Pairs = Literal["half", "interleaved"]
Rule = Callable[[Tensor, Tensor, Sequence[int]], Sharing]
PAIRS: list[Pairs] = ["half", "interleaved"]
OWNERS = [[0, 1], [0, 0, 1], [0, 1, 2], [0, 0, 1, 1], [0, 1, 0, 2], [0, 1, 2, 3]]


@dataclass(frozen=True)
class Group:
    """Query heads that are to share one key or value head.

    weight (m·D, hidden) of the parent's KV heads; inputs (samples, hidden); outputs (n, rows, D), through which each
    query head reads its own; mass (n, samples) if each query head weighs the inputs in its own way.
    """

    owner: list[int]
    weight: Tensor
    inputs: Tensor
    outputs: Tensor
    mass: Tensor | None = None

    @property
    def grams(self) -> Tensor:
        return self.outputs.mT @ self.outputs

    @property
    def moments(self) -> Tensor:
        heads = self.inputs @ self.weight.T
        if self.mass is None:
            return heads.T @ heads / len(heads)
        return torch.stack([(heads * mass[:, None]).T @ heads / len(heads) for mass in self.mass])

    @property
    def own(self) -> Tensor:
        """Each query head's own projection, (n, D, hidden)."""
        return self.weight.view(-1, self.outputs.shape[-1], self.weight.shape[-1])[self.owner]

    def measure(self, reduce: Tensor, restore: Tensor) -> Tensor:
        """The mean over the inputs of Σ_h mass_h ‖W_o^h (B_h - N_h R B) x‖²."""
        lost = self.outputs @ (self.own - restore @ (reduce @ self.weight)) @ self.inputs.T
        powers = lost.square().sum(1)
        return (powers if self.mass is None else powers * self.mass).mean(-1).sum()

    def energy(self) -> float:
        """What the heads put out: the error of sharing nothing."""
        n, D = len(self.owner), self.outputs.shape[-1]
        return float(self.measure(self.weight.new_zeros(D, len(self.weight)), self.weight.new_zeros(n, D, D)))


def normal(seed: int) -> Callable[..., Tensor]:
    """Standard normal numbers of any shape."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(owner: list[int], D: int, hidden: int, seed: int, *, own_metrics: bool = False) -> Group:
    """A group of unrelated heads on correlated inputs."""
    new = normal(seed)
    weight, outputs = new((max(owner) + 1) * D, hidden), new(len(owner), D + 2, D)
    inputs = new(40, hidden) @ new(hidden, hidden) / hidden**0.5
    # Like attention: most of a query head's mass is on a few inputs.
    mass = (1.5 * new(len(owner), 40)).exp() if own_metrics else None
    return Group(owner, weight, inputs, outputs, mass)


def related(maps: Tensor, seed: int, owner: list[int] | None = None) -> Group:
    """A group whose KV heads are one hidden head behind the maps (m, D, D)."""
    m, D, _ = maps.shape
    owner = owner or list(range(m))
    other = draw(owner, D, 3 * D, seed)
    return Group(owner, (maps @ normal(seed + 1)(D, 3 * D)).reshape(m * D, -1), other.inputs, other.outputs)


def orthogonal(count: int, D: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(seed)(count, D, D)).Q


def pairs_of(pairs: Pairs, dim: int) -> list[tuple[int, int]]:
    """The dimensions that RoPE rotates into each other."""
    return [(i, i + dim // 2) if pairs == "half" else (2 * i, 2 * i + 1) for i in range(dim // 2)]


def multiplications(numbers: Tensor, rest: Tensor, pairs: Pairs) -> Tensor:
    """Real matrices (m, D, D) that multiply pair f by numbers (m, F) and apply rest (m, r, r) to what follows."""
    m, count = numbers.shape
    D = 2 * count + rest.shape[-1]
    out = torch.zeros(m, D, D, dtype=torch.float64)
    for f, (i, j) in enumerate(pairs_of(pairs, 2 * count)):
        out[:, i, i] = out[:, j, j] = numbers[:, f].real
        out[:, j, i], out[:, i, j] = numbers[:, f].imag, -numbers[:, f].imag
    out[:, 2 * count :, 2 * count :] = rest
    return out


def circular(grams: Tensor, pairs: Pairs, dim: int) -> Tensor:
    """Second moments of queries at all positions alike: nothing in common between pairs, nor within one."""
    out = torch.zeros_like(grams)
    out[:, dim:, dim:] = grams[:, dim:, dim:]
    for i, j in pairs_of(pairs, dim):
        out[:, i, i] = out[:, j, j] = (grams[:, i, i] + grams[:, j, j]) / 2
    return out


def descend(loss: Callable[..., Tensor], *start: Tensor, steps: int = 150) -> float:
    """The least loss that L-BFGS reaches from a start."""
    parameters = [tensor.detach().clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    with torch.no_grad():
        return float(loss(*parameters))


@st.composite
def awkward(pick: st.DrawFn) -> Group:
    """Heads that are zero, equal, tiny, huge, of low rank or unread, grouped in any way."""
    sizes = st.sampled_from([0.0, 1e-12, 1e-6, 1.0, 1.0, 1e6, 1e12])
    owner = owners(pick(st.lists(st.integers(0, 3), min_size=1, max_size=5)))[1]
    n, m, D, hidden = len(owner), max(owner) + 1, pick(st.integers(2, 5)), pick(st.integers(1, 8))
    new = normal(pick(st.integers(0, 2**32 - 1)))
    heads = new(m, D, hidden)
    if pick(st.booleans()):
        heads = heads[:1].expand(m, D, hidden)
    heads = heads * torch.tensor([pick(sizes) for _ in range(m)], dtype=torch.float64)[:, None, None]
    outputs = new(n, pick(st.integers(1, D)), D)
    outputs = outputs * torch.tensor([pick(sizes) for _ in range(n)], dtype=torch.float64)[:, None, None]
    return Group(owner, heads.reshape(m * D, hidden), new(pick(st.integers(1, 9)), hidden), outputs)


def _rotary(rule: Callable[..., Sharing], pairs: Pairs, unrotated: int) -> Rule:
    """With an even number of rotated dimensions, at least two, that leaves unrotated ones where it can."""

    def apply(grams: Tensor, moments: Tensor, owner: Sequence[int]) -> Sharing:
        return rule(grams, moments, owner, pairs=pairs, dim=max(2, (grams.shape[-1] - unrotated) // 2 * 2))

    return apply


RULES: dict[str, Rule] = {"low_rank": low_rank, "procrustes": procrustes} | {
    f"{rule.__name__}-{pairs}-{name}": _rotary(rule, pairs, unrotated)
    for rule in (rotary_low_rank, rotary_procrustes)
    for pairs in PAIRS
    for name, unrotated in (("all", 0), ("partial", 2))
}
