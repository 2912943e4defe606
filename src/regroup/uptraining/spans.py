"""T5's span corruption."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RegroupError
from .examples import Carry, Example, RunningText, Tokens, lacking, shifted, stacked


@dataclass(frozen=True)
class SpanCorruption(RunningText):
    """T5's span corruption (Raffel et al. 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4).

    Documents are joined without a separator, as in T5's pre-training, and cut into pieces of ``raw_length`` tokens. A
    share ``density`` of a piece is noise, in spans of ``mean_span`` on average, whose lengths and places are random
    partitions. The input has a sentinel in the place of each span, the target each sentinel followed by its span; both
    end with the end-of-sequence token. All pieces have the same number of spans, so that nothing is padded.

    Collated: ``input_ids``, ``attention_mask`` (batch, window), ``labels``, ``decoder_input_ids`` (batch,
    target_length), int64. A window that no whole number of tokens fills is shorter by a token.

    Attributes:
        window: tokens of the input.
        eos: end-of-sequence token id.
        sentinels: token ids of ``<extra_id_0>``, ``<extra_id_1>``, …
        start_token: with which the decoder begins.
        density: share of the tokens that are noise.
        mean_span: tokens a span of noise.
    """

    window: int
    eos: int
    sentinels: tuple[int, ...]
    start_token: int
    density: float = 0.15
    mean_span: float = 3.0

    name = "span-corruption"

    def __post_init__(self) -> None:
        length, (noise, spans) = self.raw_length, self.noise
        if length < 2 or spans > min(len(self.sentinels), length - noise):
            raise RegroupError(
                "the window is too short or too long for span corruption",
                expected=f"at least 2 tokens, and at most {len(self.sentinels)} spans (the tokenizer's sentinels)",
                got=f"{length} tokens, {spans} spans",
                remedy="use another --window (T5 was trained with 512), or the tokenizer of the original model",
            )

    @property
    def raw_length(self) -> int:
        """Tokens of text that make an input of ``window`` tokens."""
        length = self.window - 1
        while self._input_length(length + 1) <= self.window:
            length += 1
        return length

    @property
    def noise(self) -> tuple[int, int]:
        """Tokens and spans of noise in a piece."""
        return self._noise(self.raw_length)

    @property
    def target_length(self) -> int:
        """Tokens of a target: noise, sentinels and the end."""
        return sum(self.noise) + 1

    def _noise(self, length: int) -> tuple[int, int]:
        tokens = min(max(round(length * self.density), 1), length - 1)
        return tokens, max(round(tokens / self.mean_span), 1)

    def _input_length(self, length: int) -> int:
        tokens, spans = self._noise(length)
        return length - tokens + spans + 1

    def pack(self, tokens: Tokens, carry: Carry) -> tuple[list[Example], Carry]:
        """Pieces: ``ids`` (raw_length,)."""
        flat = [*carry.get("ids", []), *(token for document in tokens.documents for token in document)]
        size = self.raw_length
        whole = len(flat) // size * size
        pieces = [{"ids": np.array(flat[start : start + size], np.int32)} for start in range(0, whole, size)]
        return pieces, {"ids": flat[whole:]}

    def corrupt(self, example: Example, rng: random.Random) -> Example:
        """``ids`` to ``input`` (window,) and ``target`` (target_length,)."""
        ids = example["ids"].tolist()
        noise, spans = self.noise
        source: list[int] = []
        target: list[int] = []
        place = 0
        kept_lengths = _partition(len(ids) - noise, spans, rng)
        for sentinel, kept, lost in zip(self.sentinels, kept_lengths, _partition(noise, spans, rng), strict=False):
            source += [*ids[place : place + kept], sentinel]
            target += [sentinel, *ids[place + kept : place + kept + lost]]
            place += kept + lost
        return {"input": np.array([*source, self.eos], np.int32), "target": np.array([*target, self.eos], np.int32)}

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        source, labels = stacked(examples, "input"), stacked(examples, "target")
        return {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "labels": labels,
            "decoder_input_ids": shifted(labels, self.start_token),
        }


def sentinel_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, … as far as the tokenizer has them, at least one.

    Raises:
        RegroupError: it has none.
    """
    vocabulary = tokenizer.get_vocab()
    # mT5's SentencePiece model holds them as ordinary pieces, with the mark of a word's beginning.
    for form in ("<extra_id_{}>", "▁<extra_id_{}>"):
        found: list[int] = []
        for number in count():
            if form.format(number) not in vocabulary:
                break
            found.append(vocabulary[form.format(number)])
        if found:
            return tuple(found)
    raise lacking("sentinels", "span corruption marks what is missing by <extra_id_0>, <extra_id_1>, …")


def _partition(items: int, parts: int, rng: random.Random) -> list[int]:
    """``items`` into ``parts`` lengths of at least 1; every such partition is equally likely."""
    borders = sorted(rng.sample(range(1, items), parts - 1))
    return [end - start for start, end in zip([0, *borders], [*borders, items], strict=True)]
