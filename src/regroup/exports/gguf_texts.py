"""Compare the token ids that two tokenizers give for prose, code and many scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..modeling import load_tokenizer
from . import llama_cpp
from .pretokenizers import PROBE

_TEXTS = (
    "Once upon a time there was a girl named Lily. She'll count: 1, 22, 333, 4444, 55555!\n\n  Zoë didn't  mind.\n",
    "The year 2024 had 366 days;  on 29/02 it rained 12.75 mm (0.5 in).\tWhat's next?  Nothing -- yet...",
    "def add(a, b=10):\n    '''Sum.'''\n    return a + b  # 1 + 2 == 3\n\n\nclass X(object):\n\tdone = True\n",
    '{"id": 1234567, "tags": ["a-b", "c_d"], "url": "https://example.org/?q=x&n=10#top"}\r\n',
    "   three spaces, then two  , and some at the end   ",
    " ",
    "\n",
    "0",
)
_MOST_SPECIAL = 64


def texts_for(tokenizer: Any) -> list[str]:
    """Texts to compare two tokenizers on: prose, code, numbers, many scripts, and the special tokens among words."""
    texts = [*_TEXTS, PROBE, *(line for line in PROBE.split("\n") if line)]
    added = tokenizer.added_tokens_decoder
    plain = [token.content for token in added.values() if not (token.lstrip or token.rstrip or token.single_word)]
    for token in plain[:_MOST_SPECIAL]:
        texts += [f"Hello{token} world 12", f"{token}\nA  b{token}{token}c"]
    return list(dict.fromkeys(texts))


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with what the tokenizer puts around it."""
    return [tokenizer(text)["input_ids"] for text in texts]


def check_same(texts: Sequence[str], wanted: Sequence[list[int]], found: Sequence[list[int]], other: str) -> str:
    """Compare token ids.

    Raises:
        RegroupError: they differ for a text.
    """
    # Where several differ, the shortest says the most.
    differing = [(len(text), text, a, b) for text, a, b in zip(texts, wanted, found, strict=True) if list(a) != list(b)]
    if differing:
        _, text, a, b = min(differing)
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        raise RegroupError(
            f"the result's tokenizer gives other ids than its source's, for {len(differing)} of {len(texts)} texts; "
            "nothing was written",
            expected=f"{a[at : at + 8]} from token {at} of {text[:80]!r}",
            got=f"{b[at : at + 8]}, with {other}",
            remedy="please report it with the tokenizer's files, or the file's metadata",
        )
    return f"the same token ids for {len(texts)} texts"


def check_reloaded(folder: Path, tokenizer: Any) -> None:
    """What was saved must come back as it was, whatever class transformers chooses for the model.

    Raises:
        RegroupError: it gives other ids.
    """
    texts = texts_for(tokenizer)
    found = ids_of(load_tokenizer(folder), texts)
    check_same(texts, ids_of(tokenizer, texts), found, "the tokenizer that transformers loads from the folder")


def check_against_llama_cpp(file: Path, tokenizer: Any) -> str:
    """Compare a tokenizer's ids with those that llama.cpp gives for a GGUF file, which it opens without its weights.

    Raises:
        RegroupError: they differ, or llama.cpp does not load the file.
    """
    texts = texts_for(tokenizer)
    found = llama_cpp.ask(file, {"texts": texts})["ids"]
    return check_same(texts, ids_of(tokenizer, texts), found, llama_cpp.version())
