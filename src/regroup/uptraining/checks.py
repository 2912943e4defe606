"""What can be told to be wrong with a run from its settings, its folders and the disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, fetch
from ..checkpoint.reader import read_json, refuse_pickles
from ..checkpoint.writer import existing_parent
from ..errors import RegroupError, two_sizes
from ..modeling import load_tokenizer
from ..processes import world
from . import states
from .reading import check_same_tokenizer
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
# And how they name the number of (decoder) layers, and the width of their outputs.
_LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTHS = ("d_model", "hidden_size", "n_embd")


def state_of(recipe: Recipe, digest: str, run: dict[str, Any] | None) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete state of this very run, if there is one.

    Raises:
        RegroupError: the folder holds another run, or is not to be continued.
    """
    if run is None:
        return None
    if run.get("digest") != digest:
        changes = states.changed_settings(recipe.to_json(), run.get("recipe", {}))
        raise RegroupError(
            "the output folder holds a run with other settings",
            file=recipe.output,
            expected=f"the recipe {run.get('digest')}",
            got="; ".join(changes)[:400] or digest,
            remedy="give the same settings to go on with it, or choose another --output",
        )
    if not recipe.resume:
        raise RegroupError(
            "the output folder holds a run already",
            file=recipe.output,
            remedy="leave --no-resume out to go on with it, or choose another --output",
        )
    found = states.complete(recipe.output)
    if not found:
        return None
    folder = found[-1][1]
    state = states.read_state(folder)
    if state.get("digest") != digest or state.get("format") != 1:
        raise RegroupError("a saved state belongs to another run", file=folder, remedy="remove it")
    if bool(state["sharded"]) != recipe.fsdp:
        raise RegroupError(
            "a sharded state and a whole one are not read alike",
            file=folder,
            expected="a run with --fsdp" if state["sharded"] else "a run without --fsdp",
            remedy="go on as the run began; the number of processes may change",
        )
    return folder, state


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


def check_window(config: Any, window: int) -> None:
    """Refuse windows longer than the positions of a decoder-only model.

    Raises:
        RegroupError: they are, in tokens.
    """
    limit = next(
        (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions") if hasattr(config, n)), 0
    )
    if isinstance(limit, int) and 0 < limit < window and not getattr(config, "is_encoder_decoder", False):
        raise RegroupError(
            "the windows are longer than the model's positions",
            expected=f"at most {limit} tokens",
            got=window,
            remedy=f"pass --window {limit}",
        )


def checked_teacher(recipe: Recipe, folder: Path, tokenizer: Any, student: Any) -> Path | None:
    """The teacher's folder, downloaded where it is a hub id; None where the recipe has none.

    Args:
        recipe: names it.
        folder, tokenizer, student: of the model that is trained.

    Raises:
        RegroupError: another vocabulary, another tokenizer, or hidden states that cannot be matched.
    """
    if recipe.teacher is None:
        return None
    parent = fetch(recipe.teacher)
    refuse_pickles(parent)  # a copy is made once, not by every process and every resumed run
    vocab_size = student.get_input_embeddings().weight.shape[0]
    config = read_json(parent / "config.json")
    size = config.get("vocab_size")
    if size != vocab_size:
        raise RegroupError(
            "the teacher has another vocabulary",
            file=parent,
            expected=f"{vocab_size} tokens, as {folder} has",
            got=size,
            remedy="the teacher is the checkpoint that the model was converted from",
        )
    check_same_tokenizer(tokenizer, load_tokenizer(parent))
    own, other = (_shape_of(found) for found in (read_json(folder / "config.json"), config))
    if recipe.hidden_weight and own != other:
        raise RegroupError(
            "the teacher's hidden states are of another shape, and cannot be matched",
            file=parent,
            expected=_shape_said(own),
            got=_shape_said(other),
            remedy="pass --hidden-weight 0, or the checkpoint that the model was converted from as --teacher",
        )
    return parent


def _shape_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """Layers whose outputs are compared, and their width, by whichever names a family has for them."""
    layers = next((config[name] for name in _LAYERS if name in config), None)
    return layers, next((config[name] for name in _WIDTHS if name in config), None)


def _shape_said(shape: tuple[Any, Any]) -> str:
    return f"{shape[0]} layers of {shape[1]}"


def check_room(recipe: Recipe, checkpoint: Checkpoint, student: Any) -> None:
    """Refuse a disk that cannot hold the states and the result."""
    parameters = sum(p.numel() for p in student.parameters())
    # Weights in float32; AdamW's two moments beside them.
    state = parameters * (12 if recipe.optimizer == "adamw" else 5)
    needed = state * (recipe.keep + 1) + checkpoint.nbytes
    there = sum(states.folder_bytes(folder) for _, folder in states.complete(recipe.output))
    parent = recipe.output if recipe.output.is_dir() else existing_parent(recipe.output)
    free = shutil.disk_usage(parent).free
    if free + there < needed:
        wanted, there_is = two_sizes(needed, free)
        raise RegroupError(
            "the disk has too little room for the run",
            file=parent,
            expected=f"{wanted} for {recipe.keep} states, one more while it is written, and the result",
            got=f"{there_is} free",
            remedy="free some space, choose another --output, or set keep to 1 in the recipe",
        )
