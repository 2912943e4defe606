"""Names, values and commands as text that is safe on a terminal, in a shell and in Markdown."""

from __future__ import annotations

import re
import shlex

# Control characters, marks that reverse the reading order, other line ends, and bytes of file names that are not UTF-8
# (which Python represents as lone surrogates).
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def visible(text: object) -> str:
    r"""Text with control characters escaped: ``\n``, ``\x1b``, ``\u202e``."""
    return _UNSAFE.sub(lambda found: _NAMED.get(found[0]) or _spelt(ord(found[0])), str(text))


def _spelt(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: a byte that could not be decoded
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def command(*words: object, **options: object) -> str:
    """A ``regroup`` command that can be pasted into a shell.

    Args:
        words: the command and its arguments: paths, hub ids, or placeholders such as ``"DST"``.
        options: by name, with underscores for hyphens. True stands for a flag; None and False omit one.

    Returns:
        One line, quoted for the shell; a name that begins with a hyphen is written ``./-name``.
    """
    parts = ["regroup", *map(_quoted, words)]
    for name, value in options.items():
        if value is not None and value is not False:
            parts.append(f"--{name.replace('_', '-')}")
            parts += [] if value is True else [_quoted(value)]
    return " ".join(parts)


def _quoted(word: object) -> str:
    text = str(word)
    text = f"./{text}" if text.startswith("-") else text
    if not _UNSAFE.search(text):
        return shlex.quote(text)
    # $'…' escapes bytes (POSIX 2024, section 2.2.4; bash, zsh and ksh).
    plain = text.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + _UNSAFE.sub(lambda found: _octal(found[0]), plain) + "'"


def _octal(character: str) -> str:
    raw = character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in raw)


def code_span(text: str) -> str:
    """A Markdown code span, between more backticks than the text has in a row."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    # Markdown strips one space at either end.
    padding = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{padding}{text}{padding}{fence}"
