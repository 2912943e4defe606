"""Solved layers on the disk: each is kept when it is solved, so that a conversion that is killed resumes after it.

A file has its name once it is complete and flushed. The owner of the folder ensures that it belongs to the plan at
hand (``writer.journal``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..checkpoint import ShardFile
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.stage import sync
from ..plans import LayerPlan
from .solve import LayerOutcome, LayerSolution

_STATES = "states"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class SolutionStore:
    """The solutions of one conversion, in a folder of their own.

    Args:
        folder: exists; it may hold the solutions of a run that was killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """The attention layers that are solved."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors") if path.stem != _STATES)

    def path(self, name: str) -> Path:
        """The safetensors file with the tensors of a layer."""
        return self.folder / f"{name}.safetensors"

    def keep(self, name: str, solution: LayerSolution) -> None:
        """Write a solution, or write it anew.

        Raises:
            RegroupError, OSError: the system refuses to write it.
        """
        said = {"want": asdict(solution.want), "outcome": solution.outcome and asdict(solution.outcome)}
        self._write(name, solution.tensors, said)

    def load(self, name: str) -> LayerSolution:
        """The solution of a layer that is solved."""
        return replace(self.facts(name), tensors=load_file(self.path(name)))

    def facts(self, name: str) -> LayerSolution:
        """The solution of a layer without its tensors."""
        with safe_open(self.path(name), "pt") as file:
            said = json.loads(file.metadata()["regroup"])
        want, outcome = said["want"], said["outcome"]
        if want["query_order"] is not None:
            want["query_order"] = tuple(want["query_order"])
        return LayerSolution(LayerPlan(**want), {}, outcome and LayerOutcome(**outcome))

    def keep_states(self, done: int, original: list[torch.Tensor], converted: list[torch.Tensor]) -> None:
        """Write the hidden states of both models after ``done`` decoder layers, in the place of earlier ones."""
        tensors = {f"original.{batch}": states for batch, states in enumerate(original)}
        tensors |= {f"converted.{batch}": states for batch, states in enumerate(converted)}
        self._write(_STATES, tensors, {"done": done})

    def load_states(self, batches: int) -> tuple[int, list[torch.Tensor], list[torch.Tensor]] | None:
        """The hidden states that were kept last: after how many decoder layers, original and converted."""
        if not self.path(_STATES).exists():
            return None
        with safe_open(self.path(_STATES), "pt") as file:
            done = json.loads(file.metadata()["regroup"])["done"]
            original, converted = (
                [file.get_tensor(f"{model}.{batch}") for batch in range(batches)] for model in ("original", "converted")
            )
        return done, original, converted

    def _write(self, name: str, tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
        part = self.folder / f"{name}.part"
        part.unlink(missing_ok=True)
        specs = {key: (_NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
        # Tensor by tensor: safetensors' own function would copy all of them first.
        file = ShardFile(part, specs, {"format": "pt", "regroup": json.dumps(said)})
        try:
            for key, value in tensors.items():
                file.write(key, value)
        finally:
            file.close()
        part.replace(self.path(name))
        sync(self.folder)
