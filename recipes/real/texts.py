"""The texts of a run, divided so that no two uses of them overlap.

Evaluation is on other files than calibration and training. The given text is cut into passages, shuffled and divided:
first what the learning rate of the paper's recipe is chosen on, then calibration, then training. A passage that shares
a long paragraph with evaluation text or with an earlier part is left out, so that files with common content do not
count twice.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regroup.data import read_texts
from regroup.errors import RegroupError
from regroup.files import sha256_of

PASSAGE = 4000  # characters; documents of up to twice as many stay whole
LONG = 80  # characters of a paragraph that does not stand in two texts by chance
CountTokens = Callable[[str], int]
MOST = {"given": 64_000_000, "held_out": 4_000_000}  # characters that are read of a source


@dataclass(frozen=True)
class Texts:
    """Files of the texts, by use; ``held_out`` by name."""

    tuning: Path
    calibration: Path
    train: Path
    held_out: dict[str, Path]
    facts: dict[str, Any]


def prepare(given: str, held_out: Sequence[str], folder: Path, sizes: Mapping[str, int], count: CountTokens) -> Texts:
    """Read, divide and write the texts; those that an earlier run wrote are used again.

    Args:
        given: a file or data set (see ``regroup.data.read_texts``) to calibrate and to train on.
        held_out: the same, to evaluate on.
        folder: of the files.
        sizes: tokens of each part of the given text, in the order in which parts are taken.
        count: tokens of a text.

    Raises:
        RegroupError: too little text, or two held-out texts of one name.
    """
    facts_file = folder / "texts.json"
    asked = {"given": given, "held_out": list(held_out), "sizes": dict(sizes)}
    names = [name_of(source) for source in held_out]
    if len(set(names)) < len(names):
        raise RegroupError("two held-out texts have the same name", got=", ".join(names), remedy="rename a file")
    parts = {part: folder / f"{part}.jsonl" for part in sizes}
    evaluated = {name: folder / f"held-out-{name}.jsonl" for name in names}
    if not facts_file.exists() or json.loads(facts_file.read_text(encoding="utf-8"))["asked"] != asked:
        folder.mkdir(parents=True, exist_ok=True)
        held = {name: list(_first(source, "held_out")) for name, source in zip(names, held_out, strict=True)}
        cut = [passage for document in _first(given, "given") for passage in passages(document)]
        random.Random(0).shuffle(cut)
        seen = {key for documents in held.values() for text in documents for key in paragraphs(text)}
        divided, dropped = divide(cut, sizes, seen, count)
        for path, documents in [
            *((evaluated[name], texts) for name, texts in held.items()),
            *((parts[part], texts) for part, texts in divided.items()),
        ]:
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
            path.write_text("".join(lines), encoding="utf-8")
        facts = {
            "asked": asked,
            "given": describe(given),
            "held_out": {name: describe(source) for name, source in zip(names, held_out, strict=True)},
            "passages": {part: len(texts) for part, texts in divided.items()},
            "passages_left_out": dropped,
            "sha256": {path.name: sha256_of(path) for path in (*parts.values(), *evaluated.values())},
        }
        facts_file.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    return Texts(
        parts["tuning"],
        parts["calibration"],
        parts["train"],
        evaluated,
        {name: value for name, value in facts.items() if name != "asked"},
    )


def passages(document: str) -> Iterator[str]:
    """A document, or, of a long one, pieces of at least ``PASSAGE`` characters that end where paragraphs do."""
    if len(document) <= 2 * PASSAGE:
        yield document
        return
    piece = ""
    for paragraph in re.split(r"(?<=\n)\s*\n", document):
        piece += paragraph.strip("\n") + "\n\n"
        if len(piece) >= PASSAGE:
            yield piece
            piece = ""


def paragraphs(text: str) -> set[str]:
    """Long paragraphs, so that equal ones are equal whatever their line breaks and capitals."""
    plain = (" ".join(part.split()).casefold() for part in re.split(r"\n\s*\n", text))
    return {part for part in plain if len(part) >= LONG}


def divide(
    cut: Iterable[str], sizes: Mapping[str, int], seen: Iterable[str], count: CountTokens
) -> tuple[dict[str, list[str]], int]:
    """Give each part passages until it has its tokens.

    Args:
        cut: passages, in the order in which they are given away.
        sizes: tokens of each part.
        seen: paragraphs of text that no part may share.
        count: tokens of a passage.

    Returns:
        The parts, and the number of passages that were left out because an earlier text has a paragraph of them.

    Raises:
        RegroupError: there is too little text.
    """
    divided: dict[str, list[str]] = {part: [] for part in sizes}
    known, dropped, passages = set(seen), 0, iter(cut)
    for part, wanted in sizes.items():
        tokens, own = 0, set[str]()
        while tokens < wanted:
            passage = next(passages, None)
            if passage is None:
                raise RegroupError(
                    "there is too little given text",
                    expected=f"{sum(sizes.values()):,} tokens that no other text has",
                    got=f"{tokens:,} of {wanted:,} for {part}",
                    remedy="give more text by --text, or ask for fewer --tokens",
                )
            keys = paragraphs(passage)
            if keys & known:
                dropped += 1
                continue
            own |= keys
            divided[part].append(passage)
            tokens += count(passage)
        known |= own
    return divided, dropped


def name_of(source: str) -> str:
    """The last part of a source's name, without what says of which kind it is."""
    plain = re.sub(r"(\.txt|\.jsonl?|\.parquet)?(\.gz)?$", "", source.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^\w.-]+", "-", plain)


def describe(source: str) -> dict[str, str]:
    """A source by name, and a file by its content as well."""
    path = Path(source)
    return {"name": path.name, "sha256": sha256_of(path)} if path.is_file() else {"name": source}


def _first(source: str, use: str) -> Iterator[str]:
    taken = 0
    for text in read_texts(source):
        yield text
        taken += len(text)
        if taken >= MOST[use]:
            return
