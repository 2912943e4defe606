"""What the documentation says of commands, families, messages and packages, against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import regroup
from helpers import load_recipe
from regroup.cli import app
from regroup.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]
PACKAGE = Path(regroup.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
HELD = {"any": "any G", "mqa": "1 or H", "none": "H"}
# Said by transformers, not by us.
FOREIGN = {"You set `ignore_mismatched_sizes` to `False`"}

_COMMANDS: Any = typer.main.get_command(app)


def _options_of(group: Any, before: str = "") -> dict[str, set[str]]:
    """Commands, also those of two words, and the options of each."""
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= _options_of(command, f"{before}{name} ")
        else:
            options = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
            found[before + name] = {option for option in options if option.startswith("-")} | {"--help"}
    return found


OPTIONS = _options_of(_COMMANDS)


def wrong_commands(text: str) -> list[str]:
    """Commands and options in a page's running text that do not exist (blocks: test_doc_examples.py)."""
    found = []
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for code in inline:
        command = re.match(r"regroup +([a-z][\w-]*)(.*)", code)
        if command is None:
            continue
        name, rest = command[1], command[2]
        if any(known.startswith(f"{name} ") for known in OPTIONS):
            second, _, rest = rest.strip().partition(" ")
            if not second:
                continue
            name, rest = f"{name} {second}", " " + rest
        if name not in OPTIONS:
            found.append(f"regroup {name}")
            continue
        found += [f"regroup {name} {option}" for option in _options(rest) if option not in OPTIONS[name]]
    known = {"--version"}.union(*OPTIONS.values())
    # An option that is named alone: `--kv-heads 2`.
    found += [name for code in inline if code.startswith("--") for name in _options(code) if name not in known]
    return found


def _options(text: str) -> list[str]:
    return re.findall(r"(?:^|\s)(--[a-z][\w-]*|-[a-z])(?=[\s=]|$)", text)


def expected_row(family: Family) -> list[str]:
    """The cells of a family's row that are facts of the code: projections, output, RoPE pairs, what is stock."""
    projections = f"`{family.query}` `{family.key}` `{family.value}`"
    if family.fused:
        projections = f"`{family.fused}`, {family.packing}" + (", Conv1D" if family.conv1d else "")
    return [projections, f"`{family.output}`", family.pairs or "none", HELD[family.native]]


def family_rows(text: str) -> dict[str, list[str]]:
    """``model_type`` to the cells after the examples, from the first table of the page."""
    table = text.split("\n\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", table.split("| --- |")[-1], re.M)
    return {name: [cell.strip().removesuffix(" (below)") for cell in cells.split(" | ")] for name, cells in rows}


def literals() -> list[str]:
    """Every string of the package's source; of a formatted one, the parts between its values."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    return [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "Use `regroup shrink original`.",
        "Use `regroup inspect original -z x`.",
        "Use `regroup evaluate converted --original x`.",
        "Pass `--no-such-option`.",
        "Use `regroup bench convert`.",
        "Use `regroup bench decode model --context 8`.",
    ],
)
def test_commands_that_do_not_exist_are_found(text: str) -> None:
    assert wrong_commands(text)


def test_every_family_is_described_as_it_is() -> None:
    rows = family_rows((ROOT / "docs/families.md").read_text(encoding="utf-8"))
    assert rows == {name: expected_row(family) for name, family in FAMILIES.items()}


def test_a_wrong_family_row_is_found() -> None:
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    good = family_rows(text)
    assert family_rows(text.replace("| `gpt2` |", "| `gpt3` |")) != good
    assert family_rows(text.replace("stacked, Conv1D", "interleaved")) != good


def test_every_message_is_one_of_ours() -> None:
    headings = re.findall(r"^### (.+)$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M)
    known = literals()
    assert headings
    assert [h for h in headings if h not in FOREIGN and not any(h in literal for literal in known)] == []
    assert not any("the source is made of cheese" in literal for literal in known)


def test_every_package_is_described() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    packages = {f"`{path.parent.name}/`" for path in PACKAGE.glob("*/__init__.py")}
    files = {f"`{path.name}`" for path in PACKAGE.glob("*.py")}
    described = set(re.findall(r"^\| (`[\w/.]+`) \|", text, re.M))
    assert described == packages | files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_tables_are_what_their_records_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = load_recipe("doc_tables", monkeypatch)
    assert tables.stale() == []
    # A figure that is changed by hand is found.
    (tmp_path / "docs").mkdir()
    for table in tables.TABLES.values():
        text = (ROOT / table.page).read_text(encoding="utf-8")
        (tmp_path / table.page).write_text(text.replace("+1.2", "+1.3"), encoding="utf-8")
    assert "demo" in tables.stale(tmp_path)


def test_the_command_reference_is_what_the_command_line_has(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_recipe("cli_reference", monkeypatch)
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    # Neither the terminal's width nor its colours count.
    for columns, colours in (("40", "1"), ("200", "")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("FORCE_COLOR", colours)
        assert reference.page() == written
    for name, options in OPTIONS.items():
        (section,) = re.findall(rf"^#+ `regroup {name}`\n(.*?)(?=^#|\Z)", written, re.M | re.S)
        named = " ".join(re.findall(r"^\* `(-.*?)`", section, re.M))
        assert options == set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", named))


def test_a_command_that_changed_is_missed_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_recipe("cli_reference", monkeypatch)
    monkeypatch.setattr(_COMMANDS.commands["demo"], "help", "Something else.")
    monkeypatch.setattr(reference.typer.main, "get_command", lambda _: _COMMANDS)
    assert reference.page() != (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^\.\. auto\w+:: regroup\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(regroup.__all__)


def test_every_page_is_in_the_navigation() -> None:
    trees = re.findall(r"^```{toctree}\n(.*?)^```", (ROOT / "docs/index.md").read_text(encoding="utf-8"), re.M | re.S)
    named = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted([*named, "index"]) == sorted(page.stem for page in ROOT.glob("docs/*.md"))
