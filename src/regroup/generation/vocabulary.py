"""Which tokens a model may draw, and with which ones its texts start and end: from its tokenizer, or its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DegenerateTextError

# "text" is what the tokenizer puts before a text, as it did in pre-training: BOS if it does so, else what separates
# documents (SmolLM2-Instruct after its own <|im_start|> writes empty turns of a chat), else BOS.
STARTS = ("text", "bos", "document", "random", "mixed")
# What separates documents in pre-training, where it is not the end-of-sequence token (chat models end turns with that).
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
_SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a model.

    Attributes:
        size: rows of the model's output embedding.
        allowed: (size,) bool: what may be drawn. Ids that the tokenizer does not know, and padding, may not.
        bos: the beginning of a sequence; None where there is none.
        separator: what stands between documents; None where nothing does.
        text: how texts begin; None where neither of these is there.
        ends: ids that end a text.
        plain: ids that stand for text, for a random start.
        sentinels: T5's ``<extra_id_0>`` and ``<extra_id_1>``; empty elsewhere.
        empty: what the tokenizer makes of an empty text, for an encoder.
        decoder_start, forced: first and second token of an encoder-decoder's targets; the second may be None.
    """

    size: int
    allowed: torch.Tensor
    bos: int | None
    separator: int | None
    text: int | None
    ends: frozenset[int]
    plain: torch.Tensor
    sentinels: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    decoder_start: int = 0
    forced: int | None = None

    @classmethod
    def of(
        cls,
        size: int,
        config: Mapping[str, Any],
        *,
        generation: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> Vocabulary:
        """The vocabulary of a model.

        Args:
            size: rows of its output embedding. Ids beyond it are never used.
            config, generation: its config.json and generation_config.json.
            tokenizer: of transformers; without one, all ids of the embedding count as text but the special ones.

        Raises:
            DegenerateTextError: nothing is left that could be drawn.
        """
        told = [dict(generation or {}), dict(config)]
        special = _ids(getattr(tokenizer, "all_special_ids", None))
        # The tokenizer prepares what the model is given, so its word comes first.
        bos = _first(size, getattr(tokenizer, "bos_token_id", None), *(each.get("bos_token_id") for each in told))
        ends = {end for each in told for end in _ids(each.get("eos_token_id"))}
        ends |= _ids(getattr(tokenizer, "eos_token_id", None))
        pads = _ids(getattr(tokenizer, "pad_token_id", None)) | {
            p for each in told for p in _ids(each.get("pad_token_id"))
        }
        named = _named(tokenizer, _SEPARATORS)
        eos = _first(size, getattr(tokenizer, "eos_token_id", None), *(each.get("eos_token_id") for each in told))
        separator = _first(size, *named, eos)
        allowed = torch.ones(size, dtype=torch.bool) if tokenizer is None else _known(tokenizer, size)
        starts_and_ends = {i for i in (bos, separator, *ends) if i is not None and i < size}
        for pad in pads - starts_and_ends:
            if pad < size:
                allowed[pad] = False
        plain = allowed.clone()
        for token in special | pads | starts_and_ends:
            if 0 <= token < size:
                plain[token] = False
        if not bool(plain.any()):
            raise DegenerateTextError(
                "the model's vocabulary holds no text",
                expected="token ids that stand for text",
                got=f"{size} ids in the embedding, of which the tokenizer knows special ones alone",
                remedy="use the tokenizer of this model",
            )
        start = _first(size, *(each.get("decoder_start_token_id") for each in told))
        sentinels = tuple(i for i in _named(tokenizer, [_SENTINEL.format(n) for n in range(2)]) if i < size)
        return cls(
            size,
            allowed,
            bos,
            separator,
            _text_start(tokenizer, bos, named, separator),
            frozenset(end for end in ends if 0 <= end < size),
            plain.nonzero()[:, 0],
            sentinels if len(sentinels) == 2 else (),
            () if tokenizer is None else tuple(i for i in tokenizer("")["input_ids"] if i < size),
            start or 0,
            _first(size, *(each.get("forced_bos_token_id") for each in told)),
        )

    @classmethod
    def of_folder(cls, folder: str | Path, size: int, tokenizer: Any = None) -> Vocabulary:
        """The vocabulary of a checkpoint folder; see ``of``."""
        read = {}
        for name in ("config.json", "generation_config.json"):
            path = Path(folder) / name
            read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls.of(size, read["config.json"], generation=read["generation_config.json"], tokenizer=tokenizer)

    def start(self, kind: str) -> int | None:
        """The token that windows start with; None for a random one.

        Args:
            kind: one of ``STARTS`` but ``"mixed"``, which is several. Where the model has no such token, the other one
                is taken.
        """
        order = {
            "text": (self.text,),
            "bos": (self.bos, self.separator),
            "document": (self.separator, self.bos),
            "random": (),
        }[kind]
        return next((token for token in order if token is not None), None)


def _text_start(tokenizer: Any, bos: int | None, named: list[int], separator: int | None) -> int | None:
    """The token that texts begin with: see ``STARTS``. ``named`` are separators that the tokenizer has by name."""
    if tokenizer is not None and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return bos
    if named and separator is not None:
        return separator
    return separator if bos is None else bos


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list | tuple | set) else [value]
    return {each for each in values if isinstance(each, int) and not isinstance(each, bool)}


def _first(size: int, *values: Any) -> int | None:
    """The first id that is within the embedding; of a list its first one."""
    for value in values:
        one = value[0] if isinstance(value, list) and value else value
        if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < size:
            return one
    return None


def _named(tokenizer: Any, tokens: Any) -> list[int]:
    """Ids of those of the tokens that the tokenizer knows."""
    if tokenizer is None:
        return []
    known = tokenizer.get_vocab()
    return [known[token] for token in tokens if token in known]


def _known(tokenizer: Any, size: int) -> torch.Tensor:
    """(size,) bool: the ids that the tokenizer has a token for; an embedding is often padded beyond them."""
    known = torch.zeros(size, dtype=torch.bool)
    known[torch.tensor([i for i in tokenizer.get_vocab().values() if 0 <= i < size], dtype=torch.int64)] = True
    return known
