"""Words of the glossary in CONTRIBUTING.md: those that it replaces are kept out of help, messages and documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import regroup
from regroup.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = Path(regroup.__file__).parent
# What was written for earlier releases stays as it was.
PAGES = sorted(page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
CALLS = {"RegroupError", "notice", "label", "print"}

_MEASURES = "nats?|bits?|bytes?|ms|milliseconds|seconds|FLOPs|KiB|MiB|numbers|images?|sequences|tokens"
_UNITS = "token|byte|layer|second|head|sample|step|sequence|window|character|device"
# Each pattern, and what to write.
REPLACED = {
    r"child(ren)?": "converted model",
    r"parents?": "original model, or teacher",
    r"pupils?": "student",
    r"lessons?": "layer regression",
    r"foretell|foretold|foretells": "estimate",
    r"verbs?": "command",
    r"house|rooms": "architecture, packages",
    r"onlookers?": "tracing",
    r"alikeness": "similarity",
    r"beside": "next to, with",
    r"(go|goes|going|gone) on( with)?": "continue, resume",
    r"of now": "relative to current",
    r"hears?": "speech model",
    r"promises?|promised": "check",
    r"half-written": "incomplete",
    rf"({_MEASURES}) an? ({_UNITS})": "per",
    r"Of (it|them|the|both|shuffling)": "start with what the option does",
}
# Of formulas, which pages may hold.
SYMBOL = re.compile(r"\bG =")
# The same words in other meanings: of processes, of torch's modules, of folders.
ALLOWED = re.compile(r"(child|parent) (process|processes|module|modules|folder|directory)")


def replaced(text: str) -> list[str]:
    """The words in a text that have a better one, with that one."""
    text = ALLOWED.sub("", text)
    found = []
    for pattern, better in REPLACED.items():
        flags = re.IGNORECASE if not pattern.startswith("Of") else re.NOFLAG
        start = r"^" if pattern.startswith("Of") else r"(?<![\w/.-])"
        found += [f"{match[0]!r}: {better}" for match in re.finditer(rf"{start}({pattern})(?![\w/-])", text, flags)]
    return found


def prose(page: str) -> str:
    """A page without its code, its comments, its links' targets, and the glossary, which names these words."""
    page = re.sub(r"^## Glossary\n.*?(?=^## |\Z)", "", page, flags=re.M | re.S)
    page = re.sub(r"^```.*?^```|<!--.*?-->", "", page, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", page)


def help_texts(command: Any, name: str = "regroup") -> Iterator[tuple[str, str]]:
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for inner, other in getattr(command, "commands", {}).items():
        yield from help_texts(other, f"{name} {inner}")


def messages(source: str) -> list[str]:
    """The texts of errors and notices: every string within the calls that make them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in CALLS:
            found += [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
    return found


HELP = dict(help_texts(typer.main.get_command(app)))


@pytest.mark.parametrize("option", HELP)
def test_help_is_in_the_words_of_the_glossary(option: str) -> None:
    assert replaced(HELP[option]) == []


@pytest.mark.parametrize("file", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_messages_are_in_the_words_of_the_glossary(file: str) -> None:
    found = [word for text in messages((PACKAGE / file).read_text(encoding="utf-8")) for word in replaced(text)]
    assert found == []


def test_help_and_messages_say_kv_heads_rather_than_g() -> None:
    said = [text for path in PACKAGE.rglob("*.py") for text in messages(path.read_text(encoding="utf-8"))]
    assert [text for text in [*HELP.values(), *said] if SYMBOL.search(text)] == []
    assert SYMBOL.search("the plan for G = 8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_the_words_of_the_glossary(page: Path) -> None:
    assert replaced(prose(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "the child is not a folder",
        "Loss over the parent, nats a token",
        "Of it, at most so many tokens.",
        "what a conversion takes is foretold",
        "all promises are kept",
        "one that was killed goes on",
        "the file beside it",
        "which room holds what: rooms",
        "3 ms a token",
        "A verb a module.",
    ],
)
def test_other_words_are_found(text: str) -> None:
    assert replaced(text)


@pytest.mark.parametrize(
    "text",
    [
        "the converted model is not a folder",
        "bars in child processes, and the parent folder",
        "nats per token; besides, one token a day",
        "a token of a sequence",
        "too little room on the disk",
        "the number of heads of the layer",
    ],
)
def test_ordinary_english_is_not_found(text: str) -> None:
    assert replaced(text) == []


def test_only_prose_and_messages_count() -> None:
    page = "Text `child` [x](child.md)\n```sh\nregroup child\n```\n<!-- child -->\n## Glossary\nchild\n"
    assert replaced(prose(page)) == []
    assert replaced(prose(page + "## Rules\nchild\n"))
    source = "child = 1\nraise RegroupError(f'{x} of the child', got='y')\ntold.notice('a verb')\nf('parent')"
    assert [word for text in messages(source) for word in replaced(text)] == [
        "'child': converted model",
        "'verb': command",
    ]
