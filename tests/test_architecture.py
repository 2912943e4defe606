"""Who may import whom: read from the source with ``ast``, imports inside functions included."""

from __future__ import annotations

import ast
import fnmatch
import itertools
import re
from pathlib import Path

import pytest

import regroup

PACKAGE = Path(regroup.__file__).parent

# Torch and what pulls it in.
TORCH = {"torch", "transformers", "safetensors", "triton"}
# What reaches the disk or the network.
DISK = {"os", "io", "shutil", "tempfile", "mmap", "glob", "safetensors", "huggingface_hub", "gguf"}

# Files of the package: what they may import of ours (patterns of module names), and what they may not from outside.
RULES: dict[str, tuple[list[str], set[str]]] = {
    "families/*": (["errors", "families*"], TORCH | DISK | {"pathlib"}),
    "layout/*": (["errors", "families", "families*", "layout*"], TORCH | DISK | {"pathlib"}),
    # The plan reads and writes its own JSON file, by a path.
    "plans/*": (["errors", "files", "layout*", "plans*"], TORCH | DISK),
    "bench/roofline.py": (["layout", "layout.kv_cache"], TORCH | DISK | {"pathlib"}),
    "advice/hardware.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "advice/predict.py": (["bench", "bench.roofline*", "layout", "layout.kv_cache"], TORCH | DISK | {"pathlib"}),
    "advice/choose.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "uptraining/budget.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "merge/*": (["errors", "merge*"], {"transformers", "numpy"} | DISK | {"pathlib"}),
    "attention/*": (["errors", "attention", "attention*"], DISK | {"pathlib"}),
    "checkpoint/*": (["errors", "files", "safe_text", "checkpoint*"], {"transformers"}),
    "data/*": (["errors", "files", "data*"], {"transformers"}),
    "report/*": (["errors", "files", "record", "report", "report*"], TORCH),
    # They run beside a checkpoint, and in a process of their own.
    "exports/configuration_nemotron_nas.py": ([], {"torch"} | DISK | {"pathlib"}),
    "exports/llama_cpp_process.py": ([], TORCH),
    "processes.py": (["errors"], {"transformers", "safetensors"}),
    "files.py": ([], TORCH),
    "errors.py": (["safe_text"], TORCH | DISK | {"pathlib"}),
    "progress.py": (["screen"], TORCH | DISK - {"os"}),
    "safe_text.py": ([], TORCH | DISK | {"pathlib"}),
    "screen.py": (["safe_text"], TORCH | DISK | {"pathlib"}),
}
# These reach the disk in rooms that keep from it: a compiler writes what it builds.
MAY_REACH_DISK = {"attention/cpu/build.py"}
# Nobody imports these, themselves apart.
LEAVES = ["cli", "console"]
MAY_IMPORT_LEAVES = {"cli": ["cli/*"], "console": ["cli/*", "demo/*"]}


def imports(source: str, module: str) -> set[str]:
    """Full names of everything that a module's source imports, wherever in it, but for type checkers alone."""
    found: set[str] = set()
    package = module.split(".")[:-1]
    tree = ast.parse(source)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            # ``from x import y``: y may be a module of x.
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def ours(names: set[str]) -> set[str]:
    """Names of our own modules, below the package; the package itself says nothing."""
    return {name.removeprefix("regroup.") for name in names if name.startswith("regroup.")}


def broken(file: str, source: str) -> list[str]:
    """The rules that a file breaks, in words."""
    module = "regroup." + file.removesuffix(".py").replace("/", ".")
    names = imports(source, module)
    outside = {name.split(".")[0] for name in names}
    complaints = []
    for pattern, (allowed, forbidden) in RULES.items():
        if not fnmatch.fnmatch(file, pattern):
            continue
        if file in MAY_REACH_DISK:
            forbidden = forbidden - DISK - {"pathlib"}
        for name in sorted(ours(names)):
            if not any(name == rule or name.startswith(rule.rstrip("*") + ".") for rule in allowed):
                complaints.append(f"{file} imports regroup.{name}")
        complaints += [f"{file} imports {name}" for name in sorted(outside & forbidden)]
    for leaf in LEAVES:
        excused = any(fnmatch.fnmatch(file, pattern) for pattern in MAY_IMPORT_LEAVES.get(leaf, []))
        if not excused and any(name == leaf or name.startswith(leaf + ".") for name in ours(names)):
            complaints.append(f"{file} imports {leaf}")
    return complaints


def joins_reader_and_layout(source: str, module: str) -> bool:
    names = ours(imports(source, module))
    heads = {name for name in names if name.split(".")[0] == "layout"}
    disk = {name for name in names if name.split(".")[0] == "checkpoint"}
    return bool(heads and disk)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_to_the_house(file: str) -> None:
    assert broken(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layout/detect.py", "import torch"),
        ("families/reading.py", "import torch"),
        ("families/known/llama.py", "from ...layout.types import Layout"),
        ("layout/detect.py", "def f():\n    from safetensors import safe_open"),
        ("layout/types.py", "from pathlib import Path"),
        ("layout/detect.py", "from ..checkpoint import Checkpoint"),
        ("layout/detect.py", "from .. import checkpoint"),
        ("plans/plan.py", "import torch.nn as nn"),
        ("plans/plan.py", "from ..merge import mean"),
        ("plans/plan.py", "import regroup.conversion"),
        ("bench/roofline.py", "import os"),
        ("merge/pool.py", "from ..layout import Layout"),
        ("merge/pool.py", "from regroup.checkpoint.reader import read_json"),
        ("checkpoint/reader.py", "from ..layout.types import HeadSlot"),
        ("checkpoint/reader.py", "from ..plans import Plan"),
        ("processes.py", "from .writer import prepare"),
        ("writer/write.py", "from ..cli import app"),
        ("bench/decode.py", "from ..cli.options import numbers"),
        ("bench/decode.py", "from ..console import out"),
        ("evaluation/run.py", "from .. import console"),
        ("attention/backends/cpu.py", "from pathlib import Path"),
        ("attention/cpu/build.py", "from ...checkpoint import Checkpoint"),
        ("report/page.py", "import torch"),
        ("exports/configuration_nemotron_nas.py", "from ..errors import RegroupError"),
        ("exports/llama_cpp_process.py", "import torch"),
        ("report/page.py", "from ..evaluation import score"),
    ],
)
def test_the_rules_can_be_broken(file: str, source: str) -> None:
    assert broken(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layout/detect.py", "from ..errors import RegroupError\nfrom .types import Layout\nimport re"),
        ("plans/plan.py", "from ..layout.types import Layout\nfrom pathlib import Path"),
        ("merge/pool.py", "import torch\nfrom ..errors import RegroupError"),
        ("checkpoint/reader.py", "import os, torch\nfrom .header import read_header"),
        ("layout/detect.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("demo/run.py", "from ..console import out"),
        ("exports/configuration_nemotron_nas.py", "from transformers import LlamaConfig"),
        ("cli/plan.py", "from .options import Source\nfrom ..console import err"),
    ],
)
def test_what_is_allowed_is_not_refused(file: str, source: str) -> None:
    assert broken(file, source) == []


def test_reader_and_layout_meet_in_few_places() -> None:
    """Disk and heads are joined in the converter's room, and by what opens a source for a person."""
    joined = [
        file
        for file in FILES
        if joins_reader_and_layout(
            (PACKAGE / file).read_text(encoding="utf-8"), "regroup." + file[:-3].replace("/", ".")
        )
    ]
    assert "writer/write.py" in joined
    assert [file for file in joined if not file.startswith("convert/")] == [
        "inspection.py",
        "opening.py",
        "verification.py",
    ]


VERBS = "inspect|advise|plan|convert|verify|export|evaluate|uptrain|report|demo|bench"
COMMAND = re.compile(rf"\bregroup ({VERBS})( [^`]*)?$")
MARKUP = re.compile(r"\[/?(bold|dim|italic|underline|red|green|yellow|blue|cyan|magenta|white|black)( \w+)*\]|\[/\]")


def careless(file: str, source: str) -> list[str]:
    """Where a module writes names into a command without quoting them, or into text that is read as markup."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr] = []
        if isinstance(node, ast.JoinedStr):
            parts = node.values
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            parts = [node.func.value, node]
        for part, after in itertools.pairwise(parts):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and COMMAND.search(part.value):
                complaints.append(f"{file}:{after.lineno} puts a value into a command: safe_text.command quotes it")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MARKUP.search(node.value):
            complaints.append(f"{file}:{node.lineno} holds markup: screen.Screen.label gives colour")
    if file != "screen.py" and {"rich.console.Console", "rich.markup"} & imports(source, "regroup.x"):
        complaints.append(f"{file} makes a console of its own: screen.Screen shows names as they are")
    return complaints


@pytest.mark.parametrize("file", FILES)
def test_names_are_written_with_care(file: str) -> None:
    assert careless(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "print(f'next: regroup evaluate {folder} --data FILE')",
        "print('regroup convert ' + folder)",
        "print('regroup plan %s' % folder)",
        "print('regroup bench decode {}'.format(folder))",
        "err.print(f'[yellow]note:[/yellow] {folder}')",
        "err.print('[bold red]no[/]')",
        "from rich.console import Console",
        "def f():\n    from rich.markup import escape",
    ],
)
def test_carelessness_is_found(source: str) -> None:
    assert careless("cli/plan.py", source)


def test_care_is_not_refused() -> None:
    source = "print(f'run `regroup convert` in {folder}', command('convert', folder), f'{x[0]} [x>=1]')"
    assert careless("cli/plan.py", source) == []


def test_transformers_classes_are_patched_in_models_alone() -> None:
    for file in FILES:
        if not file.startswith(("modeling/", "attention/")):
            source = (PACKAGE / file).read_text(encoding="utf-8")
            assert not [name for name in imports(source, "regroup.x") if name.startswith("transformers.models")], file
