"""Checks of a run's settings, its folders and the disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.reader import read_json
from ..checkpoint.stage import allocated
from ..checkpoint.writer import existing_parent
from ..errors import RegroupError, two_sizes
from ..processes import world
from . import states
from .recipe import Recipe

# What transformers' Trainer reports to (report_to): modules of which one must be there, and the package to install.
_REPORTING = {
    "azure_ml": (("azureml.core",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
# How families name the dropout of their residual stream, and what else there is where they have none.
_DROPOUTS = ("dropout_rate", "dropout", "hidden_dropout", "resid_pdrop", "resid_dropout")
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop")


def state_of(recipe: Recipe, digest: str, run: dict[str, Any] | None) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete state of this very run, if there is one.

    Raises:
        RegroupError: the folder holds another run, or is not to be continued.
    """
    if run is None:
        return None
    if run.get("digest") != digest:
        changes = _changed(recipe.to_json(), run.get("recipe", {}))
        raise RegroupError(
            "the output folder holds a run with other settings",
            file=recipe.output,
            expected=f"the recipe {run.get('digest')}",
            got="; ".join(changes)[:400] or digest,
            remedy="give the same settings to resume it, or choose another --output",
        )
    if not recipe.resume:
        raise RegroupError(
            "the output folder holds a run already",
            file=recipe.output,
            remedy="leave --no-resume out to resume it, or choose another --output",
        )
    found = states.complete(recipe.output)
    if not found:
        return None
    folder = found[-1][1]
    state = read_json(folder / states.STATE_FILE)
    if state.get("digest") != digest or state.get("format") != 1:
        raise RegroupError("a saved state belongs to another run", file=folder, remedy="remove it")
    if bool(state["sharded"]) != recipe.fsdp:
        raise RegroupError(
            "a sharded state and a whole one are not read alike",
            file=folder,
            expected="a run with --fsdp" if state["sharded"] else "a run without --fsdp",
            remedy="continue with the setting of before; the number of processes may change",
        )
    return folder, state


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Settings that differ, as ``name: before → now``."""
    names = [name for name in now if name in before and now[name] != before[name]]
    return [f"{name}: {before[name]} → {now[name]}" for name in names]


def check_sharding(recipe: Recipe) -> None:
    """Refuse sharding where there is nothing to shard over.

    Raises:
        RegroupError: one process alone, or processes on the CPU.
    """
    if not recipe.fsdp:
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if world() == 1 or PartialState().distributed_type == DistributedType.MULTI_CPU:
        raise RegroupError(
            "there is nothing to shard over",
            expected="several processes on GPUs: accelerate does not shard on the CPU",
            got="one process" if world() == 1 else f"{world()} processes on the CPU",
            remedy="start it with torchrun or accelerate launch, or leave --fsdp out",
        )


def check_reporting(recipe: Recipe) -> None:
    """Refuse a place to report to that the Trainer does not know, or whose package is not installed.

    Raises:
        RegroupError: naming the package.
    """
    for name in recipe.report_to:
        if name in ("none", "all"):  # all: of those that are installed
            continue
        if name == "kubeflow":  # it needs no package, and is there in its pods alone
            if "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
                raise RegroupError(
                    "the recipe reports to Kubeflow, and this is no pod of its trainer",
                    expected="the environment variable KUBEFLOW_TRAINER_SERVER_URL, for report_to: kubeflow",
                    remedy="set report_to to none in the recipe",
                )
            continue
        if name not in _REPORTING:
            known = (*_REPORTING, "kubeflow")
            close = get_close_matches(name, known, n=1)
            raise RegroupError(
                "the recipe reports to something that is not known",
                expected=f"report_to: {close[0] if close else 'one of ' + ', '.join(known)}, or none",
                got=name,
            )
        modules, package = _REPORTING[name]
        if not any(_installed(module) for module in modules):
            raise RegroupError(
                "what the recipe reports to is not installed",
                expected=f"the package {package}, for report_to: {name}",
                got="no such package",
                remedy=f"pip install {package}, or set report_to to none in the recipe",
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a module within one that is not there
        return False


def dropouts(recipe: Recipe, config: dict[str, Any]) -> dict[str, float]:
    """The recipe's dropout by the names that the model's config has for it; empty where the recipe leaves it alone.

    Raises:
        RegroupError: the model has none that could be set.
    """
    if recipe.dropout is None:
        return {}
    names = [name for name in _DROPOUTS if name in config] or [name for name in _ATTENTION_DROPOUTS if name in config]
    if not names and recipe.dropout:
        raise RegroupError(
            "the model has no dropout that could be set",
            expected=f"one of {', '.join(_DROPOUTS + _ATTENTION_DROPOUTS)} in config.json",
            remedy="leave dropout out of the recipe",
        )
    return dict.fromkeys(names, recipe.dropout)


def check_room(recipe: Recipe, checkpoint: Checkpoint, student: Any) -> None:
    """Refuse a disk that cannot hold the states and the result."""
    parameters = sum(p.numel() for p in student.parameters())
    # Weights in float32, with them AdamW's two moments; Muon has one of matrices alone, Adafactor sums of rows.
    state = parameters * (5 if recipe.optimizer == "adafactor" else 12)
    needed = state * (recipe.keep + 1) + checkpoint.nbytes
    there = sum(allocated(folder) for _, folder in states.complete(recipe.output))
    place = recipe.output if recipe.output.is_dir() else existing_parent(recipe.output)
    free = shutil.disk_usage(place).free
    if free + there < needed:
        wanted, there_is = two_sizes(needed, free)
        raise RegroupError(
            "the disk has too little room for the run",
            file=place,
            expected=f"{wanted} for {recipe.keep} states, one more while it is written, and the result",
            got=f"{there_is} free",
            remedy="free some space, choose another --output, or set keep to 1 in the recipe",
        )
