"""Batches of model inputs with targets: windows of text, or source and target pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RegroupError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Model inputs, and for each position of the logits the token that should come next.

    Attributes:
        inputs: keyword arguments of the model's forward.
        targets: (batch, length) int64: what the logits at each position should predict; ``IGNORED`` where nothing is
            asked.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor


def causal_batches(windows: torch.Tensor, batch_size: int) -> Iterator[Batch]:
    """Windows (n, length) of token ids, ``batch_size`` at a time; every token but the first is predicted."""
    for part in windows.split(batch_size):
        targets = torch.full_like(part, IGNORED)
        targets[:, :-1] = part[:, 1:]
        yield Batch({"input_ids": part, "attention_mask": torch.ones_like(part)}, targets)


def pair_batches(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, batch_size: int, start_token: int, max_length: int = 512
) -> Iterator[Batch]:
    """Source and target pairs for an encoder-decoder; every target token is predicted, the end included.

    Args:
        pairs: (source, target) texts.
        tokenizer: a transformers tokenizer.
        batch_size: pairs per batch; pairs of like length share one.
        start_token: the model's ``decoder_start_token_id``.
        max_length: tokens of a source or target at most; the rest is cut off.
    """
    rows = [
        (
            tokenizer(source, truncation=True, max_length=max_length)["input_ids"],
            tokenizer(text_target=target, truncation=True, max_length=max_length)["input_ids"],
        )
        for source, target in pairs
    ]
    if not all(source and target for source, target in rows):
        raise RegroupError("a pair has an empty side after tokenisation", remedy="remove empty lines from the data")
    yield from id_batches(rows, batch_size=batch_size, start_token=start_token)


def id_batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int, start_token: int
) -> Iterator[Batch]:
    """The same for pairs of token ids, each side at least one token long."""
    rows = sorted(pairs, key=lambda row: (len(row[0]), len(row[1])))
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        source, mask = padded([row[0] for row in part], 0)
        targets, target_mask = padded([row[1] for row in part], IGNORED)
        before, _ = padded([[start_token, *row[1][:-1]] for row in part], 0)
        yield Batch(
            {
                "input_ids": source,
                "attention_mask": mask,
                "decoder_input_ids": before,
                "decoder_attention_mask": target_mask,
            },
            targets,
        )


def padded(rows: Sequence[Any], fill: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of rows, filled up to the longest one, and their mask: both (rows, longest), int64."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for number, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, columns] = torch.as_tensor(row, dtype=torch.int64)
        mask[number, columns] = 1
    return ids, mask


def check_vocabulary(largest: int, size: int, file: object = None) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        largest: of the ids.
        size: of the model's vocabulary.
        file: where the text comes from, for the message.

    Raises:
        RegroupError: ``largest`` is not below ``size``.
    """
    if largest >= size:
        raise RegroupError(
            "a token is outside the model's vocabulary",
            file=file,
            expected=f"ids below {size}",
            got=largest,
            remedy="the tokenizer belongs to another model: use the one of the original model",
        )
