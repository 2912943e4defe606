"""Who may import whom: read from the source with ``ast``, imports inside functions included."""

from __future__ import annotations

import ast
import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import regroup

PACKAGE = Path(regroup.__file__).parent

# Torch and what pulls it in.
TORCH = {"torch", "transformers", "safetensors", "triton"}
# What reaches the disk or the network.
DISK = {"os", "io", "shutil", "tempfile", "mmap", "glob", "safetensors", "huggingface_hub", "gguf"}

NETWORK = {"huggingface_hub", "urllib", "http", "socket"}
# Helpers without knowledge of models.
COMMON = ["devices", "errors", "extras", "files", "progress", "record", "safe_text"]
BELOW_CONVERSION = [
    *("checkpoint*", "families*", "layout*", "plans*", "merge*", "solver*", "calibration*", "writer*"),
    *("data*", "modeling*", "generation*", "processes", *COMMON),
]

# What the files of each package may import of ours (patterns of module names), and what they may not from outside.
RULES: dict[str, tuple[list[str], set[str]]] = {
    # Data and arithmetic: no tensors and no files.
    "families/*": (["errors", "families*"], TORCH | DISK | {"pathlib"}),
    "layout/*": (["errors", "families", "families*", "layout*"], TORCH | DISK | {"pathlib"}),
    # A plan reads and writes its own JSON file, given the path.
    "plans/*": (["errors", "files", "layout*", "merge.registry*", "plans*"], TORCH | DISK),
    "bench/roofline.py": (["layout", "layout.kv_cache"], TORCH | DISK | {"pathlib"}),
    "advice/hardware.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "advice/predict.py": (["bench", "bench.roofline*", "layout", "layout.kv_cache"], TORCH | DISK | {"pathlib"}),
    "advice/choose.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "uptraining/budget.py": (["errors"], TORCH | DISK | {"pathlib"}),
    # Tensors without files.
    "merge/*": (["errors", "merge*"], {"transformers", "numpy"} | DISK | {"pathlib"}),
    "merge/registry.py": ([], TORCH),
    "attention/*": (["errors", "attention", "attention*"], DISK | {"pathlib"}),
    # Files without models.
    "checkpoint/*": (["errors", "extras", "files", "safe_text", "checkpoint*"], {"transformers"}),
    "data/*": (["errors", "extras", "files", "data*"], {"transformers"}),
    "report/*": (["errors", "extras", "files", "record", "report*"], TORCH),
    # The steps of a conversion; each may use those before it.
    "solver/*": (
        ["checkpoint*", "errors", "layout*", "merge*", "plans*", "processes", "solver*"],
        {"transformers"} | NETWORK,
    ),
    "calibration/*": (BELOW_CONVERSION, NETWORK),
    "writer/*": (BELOW_CONVERSION, NETWORK - {"huggingface_hub"}),  # its model cards
    "conversion/*": ([*BELOW_CONVERSION, "conversion*", "devices", "listener", "opening"], NETWORK),
    # What works on whole models.
    "modeling/*": (["errors", "checkpoint*", "families*", "layout*", "attention*", "modeling*"], NETWORK),
    "generation/*": (
        ["attention*", "checkpoint*", "data*", "families*", "modeling*", "generation*", *COMMON],
        NETWORK,
    ),
    "evaluation/*": (["checkpoint*", "data*", "families*", "modeling*", "evaluation*", "opening", *COMMON], NETWORK),
    "exports/*": (
        [
            *("checkpoint*", "families*", "layout*", "plans*", "solver*", "writer*", "modeling*", "exports*"),
            *("listener", "opening", *COMMON),
        ],
        NETWORK,
    ),
    "uptraining/*": (
        [
            *("checkpoint*", "families*", "layout*", "plans*", "calibration*", "conversion*", "data*"),
            *(
                "generation*",
                "modeling*",
                "evaluation*",
                "uptraining*",
                "writer*",
                "listener",
                "opening",
                "processes",
                "screen",
            ),
            *COMMON,
        ],
        NETWORK,
    ),
    # They are copied next to a checkpoint, or run in a process of their own.
    "exports/configuration_nemotron_nas.py": ([], {"torch"} | DISK | {"pathlib"}),
    "exports/llama_cpp_process.py": ([], TORCH),
    "processes.py": (["errors"], {"transformers", "safetensors"}),
    "files.py": ([], TORCH),
    "errors.py": (["safe_text"], TORCH | DISK | {"pathlib"}),
    "extras.py": (["errors"], TORCH | DISK | {"pathlib"}),
    "progress.py": (["errors", "screen"], TORCH | DISK - {"os"}),
    "safe_text.py": ([], TORCH | DISK | {"pathlib"}),
    "screen.py": (["safe_text"], TORCH | DISK | {"pathlib"}),
    # The command line uses the public functions, and whatever shows their results.
    "api.py": (
        ["advice*", "conversion*", "evaluation*", "exports*", "inspection", "uptraining*", "verification"],
        TORCH,
    ),
}
# Exceptions: a compiler writes what it builds.
MAY_REACH_DISK = {"attention/cpu/build.py"}
# Modules on top, and the files that may import them.
TOP = {"cli": ["cli/*"], "api": ["__init__.py", "cli/*"], "console": ["cli/*", "demo/*"]}


def statements(source: str, module: str) -> Iterator[tuple[str, list[str]]]:
    """The imports of a module's source, except those for type checkers: a full name, and names from it."""
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
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            yield base, [alias.name for alias in node.names]


def imports(source: str, module: str) -> set[str]:
    """Full names of everything that a module's source imports; in ``from x import y``, y may be a module of x."""
    return {name for base, names in statements(source, module) for name in (base, *(f"{base}.{n}" for n in names))}


def ours(names: set[str]) -> set[str]:
    """Names of our own modules, below the package; the package itself says nothing."""
    return {name.removeprefix("regroup.") for name in names if name.startswith("regroup.")}


def broken(file: str, source: str) -> list[str]:
    """The rules that a file breaks, as text."""
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
            if not any(name == rule.rstrip("*") or name.startswith(rule.rstrip("*") + ".") for rule in allowed):
                complaints.append(f"{file} imports regroup.{name}")
        complaints += [f"{file} imports {name}" for name in sorted(outside & forbidden)]
    for top, users in TOP.items():
        allowed = file == f"{top}.py" or any(fnmatch.fnmatch(file, pattern) for pattern in users)
        if not allowed and any(name == top or name.startswith(top + ".") for name in ours(names)):
            complaints.append(f"{file} imports {top}")
    return complaints


def joins_reader_and_layout(source: str, module: str) -> bool:
    names = ours(imports(source, module))
    heads = {name for name in names if name.split(".")[0] == "layout"}
    disk = {name for name in names if name.split(".")[0] == "checkpoint"}
    return bool(heads and disk)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_rules(file: str) -> None:
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
        ("generation/sampler.py", "from ..calibration.text import calibration_batches"),
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
    """Files and heads meet in the steps of a conversion, in exports, and where a source is opened for a user."""
    joined = [
        file
        for file in FILES
        if joins_reader_and_layout(
            (PACKAGE / file).read_text(encoding="utf-8"), "regroup." + file[:-3].replace("/", ".")
        )
    ]
    assert "writer/preview.py" in joined
    steps = ("solver/", "calibration/", "writer/", "conversion/", "exports/")
    assert [file for file in joined if not file.startswith(steps)] == ["inspection.py", "opening.py", "verification.py"]


def graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Each module, by its name below the package, and the modules that it imports, also within functions.

    Args:
        files: paths below the package to sources.
    """
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files}
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        # A package's own imports are relative to itself.
        name = f"regroup.{module}.__init__" if file.endswith("__init__.py") else f"regroup.{module}"
        found[module] = set()
        for base, names in statements(files[file], name):
            # ``from x import y``: y is a module of x, or a name in it.
            inner = base.removeprefix("regroup.")
            targets = {f"{inner}.{n}" if f"{inner}.{n}" in modules else inner for n in names} or {inner}
            found[module] |= (targets & modules.keys()) - {module}
    return found


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return sorted(found)


def sources(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}


def test_no_files_import_each_other() -> None:
    assert cycles(graph(sources(PACKAGE))) == []


def test_no_files_of_the_recipes_import_each_other() -> None:
    files = {f"recipes/{name}": source for name, source in sources(PACKAGE.parents[1] / "recipes").items()}
    absolute = {
        name: re.sub(r"^(\s*from )recipes\b", r"\1regroup.recipes", text, flags=re.M) for name, text in files.items()
    }
    assert cycles(graph(absolute)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/x.py": "from .y import f", "a/y.py": "def g():\n    from . import x"}, [["a.x", "a.y"]]),
        ({"a/x.py": "from ..b import f", "b/__init__.py": "from .z import f", "b/z.py": "import regroup.a.x"},
         [["a.x", "b", "b.z"]]),
        ({"a/x.py": "from .y import f", "a/y.py": "from .z import g", "a/z.py": "from .x import h"},
         [["a.x", "a.y", "a.z"]]),
        ({"a/x.py": "from .y import f", "a/y.py": "if TYPE_CHECKING:\n    from .x import h"}, []),
        ({"a/__init__.py": "from .x import f", "a/x.py": "from . import y", "a/y.py": "import os"}, []),
        ({"a/__init__.py": "from .x import f", "a/x.py": "from . import g"}, [["a", "a.x"]]),
        ({"a/__init__.py": "from .x import f", "a/x.py": "from .y import f", "a/y.py": "import os"}, []),
    ],
)  # fmt: skip
def test_a_cycle_is_found(files: dict[str, str], expected: list[list[str]]) -> None:
    assert cycles(graph(files)) == expected


COMMANDS = "inspect|advise|plan|convert|verify|export|evaluate|uptrain|report|demo|bench"
COMMAND = re.compile(rf"\bregroup ({COMMANDS})( [^`]*)?$")
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
