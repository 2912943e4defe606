"""Names on a terminal, in a shell and in Markdown, each judged by a program that knows nothing of regroup."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from regroup.errors import RegroupError
from regroup.safe_text import code_span, command, visible
from regroup.screen import Screen

NAMES = [
    "plain", "two words", "m $(touch x)", "`id`", "$HOME", "~", "~root", "a'b", 'a"b', "a\\b", "[red]", "[/red]",
    "p[x].json", ":smile:", "-n", "--data", "&", "a;b", "*", "a\nb", "tab\there", "\x1b[31mred\x1b[0m", "\x07",
    "naïve 步", "a\u202eb", "{a,b}", "!!", "#x", "caf\udce9", "", "a=b", "(x)", "|", ">x", "x" * 300,
]  # fmt: skip


def by_bash(line: str) -> list[bytes]:
    """The words that bash makes of a line, commands in it and all."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, cwd="/")
    return done.stdout.split(b"\0")[:-1]


def wanted(names: Sequence[str]) -> list[bytes]:
    return [os.fsencode(f"./{name}" if name.startswith("-") else name) for name in names]


def test_a_shell_reads_every_name_as_it_is() -> None:
    line = command("convert", *NAMES, teacher="a b", flag=True, other_option="x", left_out=None, off=False)
    rest = [b"--teacher", b"a b", b"--flag", b"--other-option", b"x"]
    assert by_bash(line) == [b"regroup", b"convert", *wanted(NAMES), *rest]
    assert "\n" not in line


def test_without_quotes_a_shell_reads_something_else(tmp_path: object) -> None:
    naive = "regroup convert m $(echo run) a'b c'"
    assert by_bash(naive) != [b"regroup", b"convert", b"m $(echo run)", b"a'b c'"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12), max_size=40))
def test_shlex_reads_every_name_as_it_is(names: list[str]) -> None:
    names = [name for name in names if name == visible(name) and not name.startswith("-")]
    assert shlex.split(command("inspect", *names)) == ["regroup", "inspect", *names]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=60))
@example("a\udc80\ud800\u2028\u202e\x9b31m\x7f\r\n")
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(shown)
    assert visible(shown) == shown


def test_ordinary_text_stays() -> None:
    text = "naïve 步 🙂 C:\\new [red] `x` \u200d é"
    assert visible(text) == text
    assert visible("a\nb\x1b[0m\udcff") == r"a\nb\x1b[0m\xff"


@pytest.mark.parametrize("name", [n for n in NAMES if n and n == visible(n)] + ["``a`", "`", " a ", "<b>x</b>", "a`"])
def test_markdown_shows_a_code_span_as_it_is(name: str) -> None:
    inline = MarkdownIt().parseInline(f"Converted from {code_span(name)} by *us*")[0].children or []
    assert [token.content for token in inline if token.type == "code_inline"] == [name]


def test_every_name_in_an_error_is_one_safe_line() -> None:
    error = RegroupError(
        "no\x1b[2J", file="a\nerror: fine", tensor="\x1b[31m", layer="l\u202e", got="x\ry", remedy="r\n"
    )
    lines = str(error).split("\n")
    assert len(lines) == 6
    assert [c for c in "".join(lines) if ord(c) < 32] == []
    assert error.details["file"] == "a\nerror: fine"


def shown(console: type[Console], name: str, patch: pytest.MonkeyPatch) -> list[str]:
    """What comes out of a console of 80 columns: a line, a label, and a table's cell and title."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogatepass", newline="")
    patch.setattr(sys, "stdout", stream)
    patch.setenv("COLUMNS", "80")
    made = console()
    made.print(name)
    if isinstance(made, Screen):
        made.label("note:", "yellow", name)
    table = Table("what", title=name[:9])
    table.add_row(name[:9])
    made.print(table)
    stream.flush()
    raw: bytes = stream.buffer.getvalue()  # type: ignore[attr-defined]
    return raw.decode("utf-8", "surrogatepass").split("\n")


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_a_screen_shows_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(Screen, name, monkeypatch)
    assert lines[0] == visible(name)
    assert lines[1] == f"note: {visible(name)}"
    assert sum(visible(name[:9]) in line for line in lines[2:]) == 2


@pytest.mark.parametrize("name", ["[red]", "p[red].json", ":smile:", "a\nb", "\x1b[31mred", "word " * 40])
def test_another_console_would_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Console, name, monkeypatch)[0] != visible(name)


def test_a_narrow_terminal_cuts_off_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, cells = ("KV heads", "tokens/s", "path"), ("4", "408,345.6789", "transformers")

    def columns(console: type[Console]) -> list[str]:
        stream = io.StringIO()
        table = Table(*heads)
        table.add_row(*cells)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "24")
        console().print(table)
        rows = [line.split("│")[1:-1] for line in stream.getvalue().splitlines() if line.startswith("│")]
        return ["".join(part.strip() for part in column) for column in zip(*rows, strict=True)]

    assert columns(Screen) == list(cells)
    assert any("…" in cell for cell in columns(Console))  # the control: rich's own way
