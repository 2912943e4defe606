"""What is learned from text: the next token, T5's missing spans, or the target of a pair.

An objective turns tokenised documents into examples (``encode``, ``pack``, ``corrupt``) and examples into a batch
(``collate``). It keeps no state: what is left of a document at the end of a chunk is handed back, so that a stream can
be resumed in the middle.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import IGNORED
from ..data.batches import padded
from ..errors import RegroupError
from .examples import Carry, Example, Objective, RunningText, Tokens, lacking, shifted, stacked
from .spans import SpanCorruption, sentinel_ids

__all__ = [
    "IGNORED",
    "Causal",
    "Example",
    "Objective",
    "Pairs",
    "SpanCorruption",
    "Tokens",
    "keeps_documents_apart",
    "make_objective",
]


@dataclass(frozen=True)
class Causal(RunningText):
    """Causal language modelling on packed documents.

    Documents are joined, each with the end-of-sequence token after it, and cut into windows that do not overlap. A
    window begins with the beginning-of-sequence token where there is one, as in ``regroup.data.token_windows``; a
    document that begins inside a window does so too where ``document_bos`` says that the tokenizer puts it there. What
    is left over at the end of the data is dropped.

    With ``documents`` a window holds one document alone: each document is cut on its own, what is left over at its end
    is dropped, and no end-of-sequence token is added. All windows then begin as the model's inputs do when it is used.

    Collated: ``input_ids`` and ``labels`` (batch, window) int64, labels in transformers' sense (the model shifts them),
    ``IGNORED`` at the first token of a window and of a document: that would be predicted from another document. With
    ``isolate`` also ``position_ids``, which begin again with each document and by which transformers keeps attention
    within it. There is no attention mask: nothing is padded, and a mask would switch that off.

    Attributes:
        window: tokens.
        bos, eos: token ids, or None.
        document_bos, isolate: see above.
        cross_documents: carry loss at the first tokens of documents too.
        documents: see above.
    """

    window: int
    bos: int | None
    eos: int | None
    document_bos: bool = False
    cross_documents: bool = False
    isolate: bool = False
    documents: bool = False

    name = "causal"

    def pack(self, tokens: Tokens, carry: Carry) -> tuple[list[Example], Carry]:
        """Windows: ``ids`` (window,) and ``starts``, the positions at which documents begin."""
        first = [] if self.bos is None else [self.bos]
        if self.documents:
            return self._cut(tokens, first, carry)
        ids: list[int] = carry.get("ids", list(first))[:]
        starts: list[int] = carry.get("starts", [])[:]
        examples: list[Example] = []

        def add(part: Sequence[int]) -> None:
            done = 0
            while done < len(part):
                taken = part[done : done + self.window - len(ids)]
                ids.extend(taken)
                done += len(taken)
                if len(ids) == self.window:
                    examples.append({"ids": np.array(ids, np.int32), "starts": np.array(starts, np.int32)})
                    ids[:], starts[:] = first, []

        last = len(tokens.documents) - 1
        for number, document in enumerate(tokens.documents):
            if (number > 0 or tokens.begins) and len(ids) > len(first):
                starts.append(len(ids))
                add(first if self.document_bos else [])
            add(document)
            if self.eos is not None and (number < last or tokens.ends):
                add([self.eos])
        return examples, {"ids": ids, "starts": starts}

    def _cut(self, tokens: Tokens, first: list[int], carry: Carry) -> tuple[list[Example], Carry]:
        """Windows of one document each."""
        body = self.window - len(first)
        rest: list[int] = []
        examples: list[Example] = []
        for number, document in enumerate(tokens.documents):
            begun = number == 0 and not tokens.begins
            rest = [*(carry.get("ids", []) if begun else []), *document]
            for start in range(0, len(rest) - body + 1, body):
                ids = np.array(first + rest[start : start + body], np.int32)
                examples.append({"ids": ids, "starts": np.array([], np.int32)})
            rest = rest[len(rest) // body * body :]
        return examples, {} if tokens.ends else {"ids": rest}

    def corrupt(self, example: Example, rng: random.Random) -> Example:
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = stacked(examples, "ids")
        labels = ids.clone()
        labels[:, 0] = IGNORED
        positions = torch.arange(self.window).repeat(len(examples), 1)
        for row, example in enumerate(examples):
            for start in example["starts"].tolist():
                if not self.cross_documents:
                    labels[row, start] = IGNORED
                positions[row, start:] = torch.arange(self.window - start)
        return {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if self.isolate else {})


@dataclass(frozen=True)
class Pairs:
    """Source and target pairs for an encoder-decoder, tokenised as its tokenizer does it, special tokens included.

    Collated: ``input_ids``, ``attention_mask`` (batch, longest source), ``labels`` (``IGNORED`` on padding),
    ``decoder_input_ids``, ``decoder_attention_mask`` (batch, longest target), int64.

    Attributes:
        max_source, max_target: tokens; the rest is cut off.
        start_token: with which the decoder begins.
        pad: token id that fills up inputs.
    """

    max_source: int
    max_target: int
    start_token: int
    pad: int = 0

    name = "pairs"
    pairs = True

    def encode(self, tokenizer: Any, documents: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        sources, targets = zip(*documents, strict=True)
        source_ids = tokenizer(list(sources), truncation=True, max_length=self.max_source)["input_ids"]
        target_ids = tokenizer(text_target=list(targets), truncation=True, max_length=self.max_target)["input_ids"]
        return list(zip(source_ids, target_ids, strict=True))

    def pack(self, tokens: Tokens, carry: Carry) -> tuple[list[Example], Carry]:
        """One example a pair: ``input`` and ``target``."""
        examples = []
        for source, target in tokens.documents:
            if not source or not target:
                raise RegroupError(
                    "a pair has an empty side after tokenisation", remedy="remove empty lines from the data"
                )
            examples.append({"input": np.array(source, np.int32), "target": np.array(target, np.int32)})
        return examples, {}

    def corrupt(self, example: Example, rng: random.Random) -> Example:
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        source, mask = padded([example["input"] for example in examples], self.pad)
        labels, target_mask = padded([example["target"] for example in examples], IGNORED)
        before = shifted(labels, self.start_token)
        return {
            "input_ids": source,
            "attention_mask": mask,
            "labels": labels,
            "decoder_input_ids": before.masked_fill(before == IGNORED, self.pad),
            "decoder_attention_mask": target_mask,
        }

    def count_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of a batch that carry loss."""
        return int((batch["labels"] != IGNORED).sum())


def make_objective(
    name: str,
    tokenizer: Any,
    *,
    window: int,
    start_token: int | None = None,
    max_target: int | None = None,
    cross_documents: bool = False,
    isolate: bool = False,
    documents: bool = False,
) -> Objective:
    """The objective of a name, with the ids that a tokenizer gives it.

    Args:
        name: ``"causal"``, ``"span-corruption"`` or ``"pairs"``.
        tokenizer: a transformers tokenizer.
        window: tokens of a sequence; of an encoder-decoder, of its input.
        start_token: the model's ``decoder_start_token_id``, for the latter two.
        max_target: tokens of a target of a pair; ``window`` by default.
        cross_documents: let loss cross the borders of documents (causal); ``isolate`` is then left out.
        isolate: keep attention within documents (causal); see ``keeps_documents_apart``.
        documents: one document to a window (causal); the three before are then of no effect.

    Raises:
        RegroupError: the tokenizer lacks an end-of-sequence token or sentinels, or the window is too short.
    """
    if window < 2:
        raise RegroupError("the window is too short", expected="at least 2 tokens", got=window)
    if name == "causal":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if eos is None and bos is None and not documents:
            raise lacking("an end-of-sequence token", "without one, documents run into each other")
        alone = tokenizer("a")["input_ids"]
        adds = bos is not None and bool(alone) and alone[0] == bos
        # A tokenizer that marks no ends must mark beginnings, or nothing would part documents.
        document_bos = adds or eos is None
        if documents:
            return Causal(window, bos, eos, documents=True)
        return Causal(window, bos, eos, document_bos, cross_documents, isolate and not cross_documents)
    if name not in ("span-corruption", "pairs"):
        raise RegroupError("the objective is not known", expected="causal, span-corruption or pairs", got=name)
    if start_token is None:
        raise RegroupError(
            "the model does not say with which token its decoder begins",
            expected="decoder_start_token_id in config.json or generation_config.json",
        )
    if name == "pairs":
        pad = tokenizer.pad_token_id
        return Pairs(window, max_target or window, start_token, 0 if pad is None else pad)
    if tokenizer.eos_token_id is None:
        raise lacking("an end-of-sequence token", "inputs and targets of span corruption end with it")
    return SpanCorruption(window, tokenizer.eos_token_id, sentinel_ids(tokenizer), start_token)


@torch.no_grad()
def keeps_documents_apart(model: Any) -> bool:
    """Whether a causal model, given ``position_ids`` that begin again, attends within documents only.

    transformers sees packed documents by their positions (``find_packed_sequence_indices``), but not in every family
    and attention implementation; learned or ALiBi positions are counted otherwise. This runs the model on windows of
    six tokens, of two documents each, and looks whether the second one notices changes in the first. Sharded models
    must run it on all processes alike.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # From all over the vocabulary: the first tokens are often bytes that were never trained, which hardly differ, so
    # that rounding would decide.
    size = model.config.get_text_config().vocab_size
    second, *firsts = (torch.arange(1, 16, device=device) * max(1, size // 16) % size).split(3)

    def noticed(positions: list[int]) -> float:
        place = torch.tensor([positions], device=device)
        # One at a time: rows of a batch may be rounded differently.
        rows = [torch.cat((first, second))[None] for first in firsts]
        logits = [model(input_ids=row, position_ids=place, use_cache=False).logits[0, 3:].float() for row in rows]
        return max(float((other - logits[0]).abs().max()) for other in logits[1:])

    try:
        return noticed([0, 1, 2, 0, 1, 2]) <= 1e-3 * noticed([0, 1, 2, 3, 4, 5])
    except TypeError:
        # Its forward takes no positions.
        return False
    finally:
        model.train(was_training)
