"""TinyStories as JSON lines, a story a line: what the other recipes take.

    python recipes/stories.py tinystories-train.txt train.jsonl

Stories end at ``<|endoftext|>``. The validation file of TinyStories lacks these marks; there a story begins after an
empty line with one of the two openings that nearly all of them have.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer

MARK = "<|endoftext|>"
OPENINGS = r"\n\s*\n(?=Once upon a time|One day,)"


def stories(text: str) -> list[str]:
    """The stories of a file, without marks, surrounding white space and empty ones."""
    parts = text.split(MARK) if MARK in text else re.split(OPENINGS, text)
    return [part.strip() for part in parts if part.strip()]


def main(source: Path, destination: Path) -> None:
    found = stories(source.read_text(encoding="utf-8"))
    lines = (json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in found)
    destination.write_text("".join(lines), encoding="utf-8")
    print(f"{len(found):,} stories")


if __name__ == "__main__":
    typer.run(main)
