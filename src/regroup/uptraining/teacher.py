"""The parent's logits for a batch: computed without gradients, or read from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .cache import TeacherCache
from .distill import TopK, frozen, layer_outputs, top_k
from .objective import IGNORED


@dataclass(frozen=True)
class Lesson:
    """What a teacher says to a batch.

    Attributes:
        logits: (batch, length, vocabulary) in the teacher's dtype, or their ``TopK`` at the positions that carry loss.
        hidden: after each layer, (batch, length, hidden) each; empty where they were not asked for.
    """

    logits: Tensor | TopK
    hidden: tuple[Tensor, ...] = ()


class Teacher:
    """A teacher, loaded when it is first asked something that the cache does not know.

    Args:
        load: loads the model, in its own dtype, on its device.
        k: tokens that are told apart, or None for all.
        temperature: of the softmax that ``k`` is taken of.
        cache: see there; needs ``k``, and holds no hidden states.
        hidden: whether lessons have hidden states.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        k: int | None = None,
        temperature: float = 1.0,
        cache: TeacherCache | None = None,
        hidden: bool = False,
    ) -> None:
        assert cache is None or not hidden
        self._load, self.k, self.temperature, self.cache, self.hidden = load, k, temperature, cache, hidden
        self.rows_computed = self.rows_read = 0

    @cached_property
    def model(self) -> Any:
        return frozen(self._load())

    @property
    def loaded(self) -> Any:
        """The model if it was needed, or None."""
        return self.__dict__.get("model")

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], targets: Tensor, numbers: Sequence[int]) -> Lesson:
        """What the teacher says where ``targets`` ask.

        Args:
            inputs: of the model's forward, on its device.
            targets: (batch, length), see ``mixed_loss``.
            numbers: of the examples in the global order.
        """
        counts = (targets != IGNORED).sum(1).tolist() if self.cache is not None else []
        if self.cache is not None:
            found = self.cache.read(numbers, counts, targets.device)
            if found is not None:
                self.rows_read += len(targets)
                return Lesson(found)
        self.rows_computed += len(targets)
        outputs = self.model(**inputs, output_hidden_states=self.hidden)
        hidden = layer_outputs(outputs) if self.hidden else ()
        if self.k is None:
            return Lesson(outputs.logits, hidden)
        known = top_k(outputs.logits, targets, self.k, self.temperature)
        if self.cache is None:
            return Lesson(known, hidden)
        self.cache.write(numbers, counts, known)
        # What was rounded is used at once, so that a run with a full cache learns the same.
        return Lesson(self.cache.read(numbers, counts, targets.device) or known)
