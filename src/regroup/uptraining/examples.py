"""What objectives share: the form of examples, and how rows of them become tensors."""

from __future__ import annotations

import base64
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data import IGNORED
from ..data.text import pieces_of
from ..errors import RegroupError

Example = dict[str, np.ndarray]
"""Named int32 arrays of one dimension."""

Carry = dict[str, Any]
"""What is left over between two chunks, as plain JSON; empty at the start."""


@dataclass(frozen=True)
class Tokens:
    """A chunk of tokenised documents.

    Attributes:
        documents: token ids of each; of pairs, (source, target).
        begins: whether the first is the beginning of a document (a long text comes in several chunks).
        ends: whether the last is the end of one.
    """

    documents: list[Any]
    begins: bool = True
    ends: bool = True


class Objective(Protocol):
    """What a stream needs of an objective.

    ``encode`` tokenises documents; it is called from several threads, each with its own tokenizer. ``pack`` makes
    examples of a chunk and of what the chunk before left over. ``corrupt`` adds noise to an example when it is
    delivered. ``count_tokens`` counts the tokens of a batch that carry loss.
    """

    @property
    def name(self) -> str: ...
    @property
    def pairs(self) -> bool: ...
    def encode(self, tokenizer: Any, documents: Sequence[Any]) -> list[Any]: ...
    def pack(self, tokens: Tokens, carry: Carry) -> tuple[list[Example], Carry]: ...
    def corrupt(self, example: Example, rng: random.Random) -> Example: ...
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]: ...
    def count_tokens(self, batch: Mapping[str, Tensor]) -> int: ...


class RunningText:
    """Shared by the objectives on running text."""

    pairs = False

    def encode(self, tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
        # Book-sized documents go in pieces: tokenizing one at once takes memory out of all proportion.
        pieces = [[text[start:end] for start, end in pieces_of(text)] for text in documents]
        flat = [piece for document in pieces for piece in document]
        if not flat:
            return [[] for _ in documents]
        ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        return [[token for _ in document for token in next(ids)] for document in pieces]

    def count_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of a batch that carry loss."""
        return int((batch["labels"] != IGNORED).sum())


def stacked(examples: Sequence[Example], key: str) -> Tensor:
    """One array of each example, all of one length: (examples, length), int64."""
    return torch.from_numpy(np.stack([example[key] for example in examples]).astype(np.int64))


def shifted(labels: Tensor, start_token: int) -> Tensor:
    """What the decoder has seen before each label, (examples, length) as the labels are."""
    before = torch.empty_like(labels)
    before[:, 0] = start_token
    before[:, 1:] = labels[:, :-1]
    return before


def lacking(what: str, why: str) -> RegroupError:
    """The error of a tokenizer without a token that an objective needs."""
    return RegroupError(
        f"the tokenizer lacks {what}",
        expected=why,
        remedy="use the tokenizer of the original model, or another objective",
    )


def packed(example: Example) -> dict[str, str]:
    """An example as text, for a state that is saved as JSON."""
    return {
        key: base64.b64encode(zlib.compress(value.astype("<i4").tobytes(), 1)).decode()
        for key, value in example.items()
    }


def unpacked(state: dict[str, str]) -> Example:
    """What ``packed`` made text of."""
    return {
        key: np.frombuffer(zlib.decompress(base64.b64decode(value)), "<i4").astype(np.int32)
        for key, value in state.items()
    }
