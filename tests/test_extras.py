"""What works with the packages of the core alone, and what a command says when its extra is not installed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import regroup
import runs
from regroup.errors import RegroupError
from regroup.extras import EXTRAS, require

ROOT = Path(__file__).parents[1]
PACKAGE = Path(regroup.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "typer", "rich"}
# Requirements of core packages that the source imports itself, triton where it is installed.
WITH_THE_CORE = {"tokenizers", "yaml", "triton"}

# Removes packages from a process: imports fail and `importlib.util.find_spec` finds nothing.
WITHOUT = """
import importlib.machinery, json, sys
blocked = set(json.loads(sys.argv[1]))

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
COMMANDS = """
from typer.testing import CliRunner
from regroup.cli import app

results = []
for command in json.loads(sys.argv[2]):
    result = CliRunner().invoke(app, command)
    results.append([result.exit_code, result.output, repr(result.exception)])
"""
FUNCTIONS = """
import torch, regroup
folder, token = sys.argv[3], torch.ones(1, 4, 1, 8)
model = regroup.load(folder)
assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()
assert regroup.grouped_query_attention(token, token[:, :2], token[:, :2]).shape == token.shape
try:
    import matplotlib
except ModuleNotFoundError:
    print(json.dumps(results))
"""


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def core_distributions() -> set[str]:
    """The core's packages and everything that they require themselves."""
    found: set[str] = set()
    queue = [_name(text) for text in PROJECT["dependencies"]]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(_name(text))
    return found


def other_modules() -> set[str]:
    """Top-level modules of all other packages that are installed here."""
    core = core_distributions()
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {_name(owner) for owner in owners} & {*core, "regroup-gqa"}
    }


def run_without(blocked: set[str], *commands: list[str], program: str, folder: Path) -> list[Any]:
    arguments = [json.dumps(sorted(blocked)), json.dumps(commands), str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + COMMANDS + program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_core_needs_no_other_package(tmp_path: Path) -> None:
    blocked = other_modules()
    needed_by_core = {"jinja2", "yaml"}
    assert {module for modules in EXTRAS.values() for module in modules} <= blocked | needed_by_core
    original, _ = runs.pair(tmp_path)
    train, _ = runs.text(tmp_path)
    mean, solved = tmp_path / "mean", tmp_path / "solved"
    text = ["--calibration", train, "--calibration-tokens", 256, "--calibration-window", 32]
    data_set = ["--calibration", "hf:name", "--calibration-window", 32]
    task, record = tmp_path / "task.yaml", tmp_path / "record.json"
    task.write_text('data: rows.jsonl\nprompt: "{source}"\nmetrics: [bleu]\nmax-new-tokens: 2\n')
    (tmp_path / "rows.jsonl").write_text('{"source": "a", "target": "b"}\n')
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    record.write_text("{}")
    works: list[list[object]] = [
        ["inspect", original],
        ["plan", original, "--kv-heads", 2, "-o", tmp_path / "plan.json"],
        ["convert", original, mean, "--kv-heads", 2, "--method", "mean"],
        ["convert", original, solved, "--kv-heads", 2, *text],
        ["verify", original, mean],
        ["verify", original, solved],
        ["evaluate", mean, "--data", train, "--window", 16, "--windows", 2, "--teacher", original],
        ["export", mean, tmp_path / "exported", "--to", "hf"],
    ]
    refused: list[tuple[str, str, list[object]]] = [
        ("train", "accelerate", ["uptrain", mean, "--data", train, "--steps", 1, "-o", tmp_path / "run"]),
        ("train", "accelerate", ["demo", "-o", tmp_path / "demo"]),
        ("train", "pyarrow", ["evaluate", mean, "--data", tmp_path / "train.parquet", "--window", 16]),
        ("train", "datasets", ["convert", original, tmp_path / "x", "--kv-heads", 2, *data_set]),
        ("evaluate", "sacrebleu", ["evaluate", mean, "--task", task]),
        ("report", "altair", ["report", record, "-o", tmp_path / "page.html"]),
        ("report", "matplotlib", ["inspect", original, "--similarity", "-o", tmp_path / "plots"]),
        ("gguf", "gguf", ["export", mean, tmp_path / "new.gguf", "--to", "gguf"]),
        ("lm-eval", "lm-eval", ["evaluate", mean, "--tasks", "piqa"]),
    ]
    commands = [list(map(str, command)) for command in [*works, *(command for _, _, command in refused)]]
    results = run_without(blocked, *commands, program=FUNCTIONS, folder=mean)
    for command, (status, output, exception) in zip(works, results[: len(works)], strict=True):
        assert status == 0, (command, output, exception)
    for (extra, package, command), (status, output, exception) in zip(refused, results[len(works) :], strict=True):
        shown = " ".join(output.split())
        assert (status, f"expected: {package} " in shown) == (2, True), (command, output, exception)
        assert f"remedy: pip install 'regroup-gqa[{extra}]'" in shown, (command, output)
    made = {path.name for path in tmp_path.iterdir()}
    assert not made & {"run", "demo", "x", "page.html", "plots", "new.gguf"}


def test_an_installed_extra_is_not_refused() -> None:
    for extra, modules in EXTRAS.items():
        require(extra, *modules)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS["report"], "no_such_module", "no-such-package")
    with pytest.raises(RegroupError, match=r"(?s)expected: no-such-package.*regroup-gqa\[report\]"):
        require("report", "altair", "no_such_module")


def test_the_project_file_declares_the_extras() -> None:
    declared = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert {_name(package) for package in packages.values()} <= set(map(_name, declared[extra]))
    everything = set(Requirement(declared["all"][0]).extras)
    assert everything == EXTRAS.keys() - {"lm-eval"}
    assert {_name(text) for text in PROJECT["dependencies"]} == {name.replace("_", "-") for name in CORE}
    assert "regroup-gqa[all]" in declared["dev"]


def foreign_imports(source: str) -> set[str]:
    """Top-level modules that are neither Python's nor ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found - sys.stdlib_module_names - {"regroup"}


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    known = CORE | WITH_THE_CORE | {module for modules in EXTRAS.values() for module in modules}
    assert foreign_imports("import os, scipy\nfrom . import x\nfrom pandas.core import y") == {"scipy", "pandas"}
    for path in PACKAGE.rglob("*.py"):
        assert foreign_imports(path.read_text(encoding="utf-8")) <= known, path
