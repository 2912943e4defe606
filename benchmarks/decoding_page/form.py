"""Rows, goals and figures as the page has them."""

from __future__ import annotations

from typing import Any

# Noise of two medians of one run: what is slower by less counts as level.
LEVEL = 1.05

Record = dict[str, Any]


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heading: tuple[str, ...], rows: list[str]) -> list[str]:
    return [row(*heading), row(*("---" for _ in heading)), *rows, ""]


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def conditions(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    instructions = f" with {machine['instructions']}" if "instructions" in machine else ""
    return (
        f"{machine['processor']}{instructions}, {machine['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {record['date'][:10]}"
    )


def goal(what: str, found: str, reached: bool | None) -> str:
    return row(what, found, {True: "reached", False: "**not reached**", None: "not decided"}[reached])
