"""The whole model with some of its layers converted, from solutions that were kept, run on held-out text.

Many variants of a model are run together, one decoder layer after the other: each layer is read and converted once for
all of them, and variants share their hidden states up to the first layer in which they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import Layout
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.solve import LayerSolution
from ..solver.store import SolutionStore
from .decoder_layer import DecoderLayer
from .divergence import divergences
from .install import install
from .layer_runner import Inputs, LayerRunner

Heads = tuple[int, ...]
# Hidden states of the variants that are run together.
_MEMORY = 2**30


class KeptSolutions:
    """Solutions of each layer for several numbers of KV heads, in a folder.

    Args:
        folder: exists; None in processes that only help another.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def keep(self, name: str, solution: LayerSolution) -> None:
        """Write the solution of a layer for its number of KV heads."""
        if self.folder is not None:
            place = self.folder / str(solution.want.num_key_value_heads)
            place.mkdir(exist_ok=True)
            SolutionStore(place).keep(name, solution)

    def load(self, name: str, heads: int) -> LayerSolution:
        """Read the solution of a layer for a number of KV heads."""
        assert self.folder is not None
        return SolutionStore(self.folder / str(heads)).load(name)


class JointModel:
    """Variants of a model: each attention layer as it is, or converted to one of the numbers of KV heads.

    Args:
        checkpoint, layout: of the original model.
        batches: model inputs of held-out text; all processes get all of them, and divide the variants.
        solution: gives a layer's solution for a number of KV heads; it is called in the first process alone.
        device: where layers run.
        processes: those that do this together; all get the same answer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        batches: Sequence[Inputs],
        solution: Callable[[str, int], LayerSolution],
        *,
        device: str = "cpu",
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.checkpoint, self.layout, self._solution, self._group = checkpoint, layout, solution, processes
        self.runner = LayerRunner(checkpoint.folder, layout, batches, device=device)
        # What ``divergences`` asks for: here all of the text is held out, and each process has all of it.
        self.held_out, self.processes = range(len(batches)), SINGLE_PROCESS
        self.original: Heads = tuple(layer.num_key_value_heads for layer in layout.layers)
        self._places = {
            index: [place for place, layer in enumerate(layout.layers) if layer.index == index]
            for index in range(len(self.runner))
        }
        self._after: list[torch.Tensor] | None = None

    @torch.no_grad()
    def divergences(self, variants: Sequence[Heads], *, progress: Callable[[int], object] | None = None) -> list[float]:
        """KL divergence of the original model's predictions from each variant's, in nats per token.

        Args:
            variants: for each of the layout's layers the number of KV heads; the layer's own leaves it as it is.
            progress: called with the number of variants just done.

        Raises:
            RegroupError: one is not a finite number.
        """
        found: dict[Heads, float] = {}
        size = sum(hidden.numel() * 4 for hidden in self.runner.hidden)
        count = max(1, _MEMORY // max(1, size)) * self._group.size
        # Neighbours in this order have the most in common.
        ordered = sorted(set(variants), key=lambda heads: [a != b for a, b in zip(heads, self.original, strict=True)])
        for start in range(0, len(ordered), count):
            part = ordered[start : start + count]
            own = part[self._group.rank :: self._group.size]
            values = self._run(own, part)
            for each in self._group.all_gather(values):
                found |= each
            if progress is not None:
                progress(len(part))
        for heads, value in found.items():
            if not math.isfinite(value):
                raise RegroupError(
                    "the predictions of a converted model are not finite numbers",
                    file=self.checkpoint.folder,
                    got=f"KL divergence {value} with KV heads {', '.join(map(str, heads))}",
                    remedy="download the checkpoint again, or look for the training step that broke it",
                )
        return [found[heads] for heads in variants]

    def _run(self, own: Sequence[Heads], everyone: Sequence[Heads]) -> dict[Heads, float]:
        """The divergences of this process's variants; ``everyone`` are those of all processes."""
        # By the numbers of KV heads so far.
        states: dict[Heads, list[torch.Tensor]] = {(): list(self.runner.hidden)}
        wanted = list(own) if self._after is not None else [*own, self.original]
        for index in range(len(self.runner)):
            ahead: dict[Heads, list[torch.Tensor]] = {}
            # Every process loads the same solutions at the same time.
            for here in sorted({self._at(heads, index) for heads in (*everyone, self.original)}):
                layer = self._layer(index, here)
                for heads in wanted:
                    after = self._until(heads, index + 1)
                    if self._at(heads, index) == here and after not in ahead:
                        before = states[self._until(heads, index)]
                        ahead[after] = [layer.forward(batch, hidden).cpu() for batch, hidden in enumerate(before)]
            states = ahead
        ends = {heads: states[self._until(heads, len(self.runner))] for heads in wanted}
        if self._after is None:
            self._after = ends[self.original]
        return divergences(self, self._after, {heads: ends[heads] for heads in own}) if own else {}

    def _at(self, heads: Heads, index: int) -> Heads:
        """The numbers of KV heads of one decoder layer: of its self-attention, then of its cross-attention."""
        return tuple(heads[place] for place in self._places[index])

    def _until(self, heads: Heads, index: int) -> Heads:
        """Those of all decoder layers before one."""
        return tuple(number for before in range(index) for number in self._at(heads, before))

    def _layer(self, index: int, numbers: Heads) -> DecoderLayer:
        """A decoder layer with these numbers of KV heads in its attention layers."""
        layer = self.runner.layer(index)
        for attention, number in zip(self.runner.attention_layers(index), numbers, strict=True):
            if number != attention.num_key_value_heads:
                solution = self._group.from_first(partial(self._solution, attention.name, number))
                install(layer, attention, solution.want, solution.tensors, self.checkpoint)
        return layer


def split_batches(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Two halves of each batch: text to choose on, and text to report on. One single row has to serve as both."""
    rows = [len(next(iter(batch.values()))) for batch in batches]
    first = [_rows(batch, slice(0, (count + 1) // 2)) for batch, count in zip(batches, rows, strict=True)]
    second = [_rows(batch, slice((n + 1) // 2, n)) for batch, n in zip(batches, rows, strict=True) if n > 1]
    if not second:
        return (first[:1], first[1:]) if len(first) > 1 else (first, first)
    return first, second


def first_tokens(batches: Sequence[Inputs], tokens: int) -> list[Inputs]:
    """The first rows of batches that hold so many tokens at most; or the beginning of a row, where it may be cut."""
    found: list[Inputs] = []
    for batch in batches:
        length = token_count([_rows(batch, slice(0, 1))])
        rows = min(len(next(iter(batch.values()))), tokens // length)
        if rows > 0:
            found.append(_rows(batch, slice(0, rows)))
        tokens -= rows * length
        if tokens < length:
            break
    if not found and batches and tokens > 0:
        first = _rows(batches[0], slice(0, 1))
        # Sources and targets belong together.
        found = [first if "decoder_input_ids" in first else {name: ids[:, :tokens] for name, ids in first.items()}]
    return found


def token_count(batches: Sequence[Inputs]) -> int:
    """Positions of the decoder in these batches."""
    return sum(
        (batch["decoder_input_ids"] if "decoder_input_ids" in batch else batch["input_ids"]).numel()
        for batch in batches
    )


def _rows(batch: Inputs, rows: slice) -> Inputs:
    return {name: value[rows] for name, value in batch.items()}
