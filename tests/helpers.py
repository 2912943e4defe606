"""Checkpoint folders made, read, compared and broken without the package's own reader and writer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import regroup
import tiny
from regroup.checkpoint import open_checkpoint
from regroup.cli import app
from regroup.conversion.convert import Conversion, carry_out
from regroup.layout import Layout, detect
from regroup.opening import Source
from regroup.plans import CalibrationText, LayerPlan, Plan
from regroup.writer.preview import prepare

INDEX = "model.safetensors.index.json"
KINDS = ["all", "some", "one", "mixed"]


def head_map(name: str, kind: str) -> dict[str, int]:
    """The KV heads of each attention module: as many as now, some, one, or another number in each module."""
    family = tiny.FAMILIES[name]
    choices = [g for g in range(family.num_key_value_heads, 0, -1) if family.num_key_value_heads % g == 0]
    modules = family.attention_modules
    if kind == "mixed":
        return {path: choices[(i + 1) % len(choices)] for i, path in enumerate(modules)}
    return dict.fromkeys(modules, {"all": choices[0], "some": choices[len(choices) // 2], "one": 1}[kind])


def layout_of(folder: Path) -> Layout:
    checkpoint = open_checkpoint(folder)
    return detect(checkpoint.config, checkpoint.tensors)


def plan_for(
    layout: Layout,
    heads: Mapping[str, int],
    *,
    orders: Mapping[str, Sequence[int]] | None = None,
    method: str = "mean",
) -> Plan:
    """A plan that gives each module (path below the base model) its KV heads and its order of query heads."""
    return Plan(
        layout.family,
        layout.fingerprint(),
        tuple(
            LayerPlan(
                layer.name,
                layer.num_attention_heads,
                layer.num_key_value_heads,
                heads[layer.module],
                method,
                method,
                tuple(orders[layer.module]) if orders else None,
            )
            for layer in layout.layers
        ),
    )


def convert_heads(
    source: Path,
    destination: Path,
    heads: Mapping[str, int],
    *,
    orders: Mapping[str, Sequence[int]] | None = None,
    method: str = "mean",
    workers: int = 2,
) -> Conversion:
    """Read, plan and write with KV heads and query orders given module by module."""
    plan = plan_for(layout_of(source), heads, orders=orders, method=method)
    return carried_out(source, plan, destination, workers=workers)


def on_text(plan: Plan, *, choose: bool = True, search: bool = True) -> Plan:
    """The plan as a request to calibrate on batches that a test makes, with every method open or those of the plan."""
    layers = (replace(want, key_method="auto", value_method="auto") if choose else want for want in plan.layers)
    return replace(
        plan,
        layers=tuple(layers),
        calibration=CalibrationText("made by the test"),
        repair="output",
        grouping="search" if search else None,
    )


def carried_out(
    folder: Path, plan: Plan, destination: Path, batches: Sequence[dict[str, Tensor]] = (), **options: Any
) -> Conversion:
    """Carry out a plan on a folder, on batches that a test makes if it asks for calibration."""
    opened = Source(folder.name, folder, open_checkpoint(folder), layout_of(folder))
    return carry_out(opened, prepare(opened.checkpoint, opened.layout, plan), destination, batches, **options)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys(), f"{path.name} holds a tensor of another shard"
        found |= part
    return found


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def write(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    shards: Mapping[str, Sequence[str]] | None = None,
    note: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder with the safetensors library: one file, or shards (file name to tensor names)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    files = shards or {"model.safetensors": list(state)}
    for file, names in files.items():
        part = {name: state[name].contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt", **(note or {})})
    if shards:
        index = {
            "metadata": {
                "total_size": sum(t.nbytes for t in state.values()),
                "total_parameters": sum(t.numel() for t in state.values()),
                "made_by": "hand",
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


def scattered(names: Sequence[str], count: int = 4) -> dict[str, list[str]]:
    """Shards that take tensors in turn, so that the keys and values of a layer lie in different files."""
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    return {file: [name for i, name in enumerate(names) if i % count == number] for number, file in enumerate(files)}


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk; None removes a key."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(actual[name]), bits(tensor)), f"{name} differs"


def steps_apart(left: Tensor, right: Tensor) -> int:
    """The largest distance between two tensors in units in the last place."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    lowest = torch.iinfo(integers).min

    def ordered(tensor: Tensor) -> Tensor:
        raw = tensor.contiguous().view(integers).long()
        return torch.where(raw < 0, lowest - raw, raw)

    return int((ordered(left) - ordered(right)).abs().max())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def everything(folder: Path) -> list[str]:
    """Every path below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def run(*arguments: object) -> tuple[int, str, str]:
    """The command line in process: exit status, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object) -> str:
    """Run the command line, which has to refuse with status 2 and a message alone; return the message."""
    status, out, message = run(*arguments)
    assert status == 2, f"status {status}: {message}"
    assert "Traceback" not in out + message
    assert message.startswith("error: ") or "\nerror: " in message
    return message


@torch.no_grad()
def logits(model: Any, name: str, *, length: int = 7) -> Tensor:
    return model(**tiny.inputs(name, 2, length)).logits


def load_recipe(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A recipe as a module; recipes are programs in a folder, not a package, and import one another from there."""
    patch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"recipes/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def divergence(parent: Path, child: Path, batches: list[dict[str, Tensor]]) -> float:
    """Σ p (log p - log q) of whole models in float64, a mean over the tokens that are text."""
    total, count = 0.0, 0
    both: list[Any] = [
        regroup.load(folder, dtype=torch.float32, attn_implementation="eager", progress=False).eval()
        for folder in (parent, child)
    ]
    for inputs in batches:
        p, q = (model(**inputs, use_cache=False).logits.double().log_softmax(-1) for model in both)
        mask = inputs.get("decoder_attention_mask")
        for row in range(p.shape[0]):
            for place in range(p.shape[1]):
                if mask is None or mask[row, place]:
                    total += float((p[row, place].exp() * (p[row, place] - q[row, place])).sum())
                    count += 1
    return total / count


def assembled(folder: Path, destination: Path, heads: Mapping[str, int], state: dict[str, Tensor]) -> Path:
    """A converted model with these KV heads by layer, and weights that come from elsewhere."""
    regroup.convert(folder, destination, layers=heads, method="first")
    save_file(state, destination / "model.safetensors", {"format": "pt"})
    return destination
