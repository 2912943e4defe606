"""Solved layers on the disk: each is kept when it is solved, so that a conversion that is killed resumes after it.

A file has its name once it is complete and flushed. The owner of the folder ensures that it belongs to the plan at
hand (``writer.journal``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..checkpoint import ShardFile, read_header
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.stage import sync
from ..errors import RegroupError
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

    def discard_damaged(self, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Remove what a fault of the disk damaged, so that it is solved again.

        Args:
            specs: dtype and shape of every tensor of the converted model.
        """
        for path in self.folder.glob("*.safetensors"):
            try:
                entries, _ = read_header(path)
                same = all(specs.get(key) in (None, (entry.dtype, entry.shape)) for key, entry in entries.items())
                whole = path.stem == _STATES or (same and self.facts(path.stem).want.name == path.stem)
            except (RegroupError, SafetensorError, LookupError, TypeError, ValueError):
                whole = False
            if not whole:
                path.unlink()

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

    def load_states(self, like: Sequence[torch.Tensor]) -> tuple[int, list[torch.Tensor], list[torch.Tensor]] | None:
        """The hidden states that were kept last: after how many decoder layers, original and converted.

        Args:
            like: hidden states of each batch after another layer; None is returned where those kept are not like them.
        """
        if not self.path(_STATES).exists():
            return None
        tensors = load_file(self.path(_STATES))
        with safe_open(self.path(_STATES), "pt") as file:
            said = (file.metadata() or {}).get("regroup")
        shapes = {f"{model}.{b}": state.shape for b, state in enumerate(like) for model in ("original", "converted")}
        if said is None or {name: state.shape for name, state in tensors.items()} != shapes:
            return None
        original, converted = (
            [tensors[f"{model}.{batch}"] for batch in range(len(like))] for model in ("original", "converted")
        )
        return json.loads(said)["done"], original, converted

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
