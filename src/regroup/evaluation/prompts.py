"""Prompts as token ids, as a model of either kind reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.batches import check_vocabulary
from ..errors import RegroupError
from ..families import family_for
from .task import Row, Task


def encode(rows: Sequence[Row], task: Task, tokenizer: Any, model: Any) -> list[list[int]]:
    """Token ids of each row's prompt.

    An encoder's input is what the tokenizer makes of it, special tokens included. A decoder's begins with the
    beginning-of-sequence token where the tokenizer puts one, and never ends with a token of the tokenizer's: the answer
    follows.

    Raises:
        RegroupError: a prompt without a token, with one that the model does not have, or longer than its positions.
    """
    if task.source_language is not None:
        if not hasattr(tokenizer, "src_lang"):
            raise RegroupError(
                "the task names a source language, and the tokenizer knows none", got=task.source_language
            )
        tokenizer.src_lang = task.source_language
    seq2seq, most = bool(model.config.is_encoder_decoder), task.max_source_tokens
    found = []
    for row in rows:
        if seq2seq:
            cut = {"truncation": True, "max_length": most} if most else {}
            ids = list(tokenizer(row.prompt, verbose=False, **cut)["input_ids"])
        else:
            ids = decoder_ids(row.prompt, tokenizer, most)
        if not ids:
            raise RegroupError(
                "a prompt has no tokens", file=task.data, expected="some text", got=repr(row.prompt), remedy="fill it"
            )
        found.append(ids)
    check_vocabulary(max(map(max, found)), model.config.get_text_config().vocab_size)
    new = 0 if seq2seq else task.max_new_tokens
    check_positions(model, task, max(map(len, found)) + new, f", {new} new ones included" if new else "")
    return found


def decoder_ids(prompt: str, tokenizer: Any, most: int | None = None) -> list[int]:
    """A decoder's prompt: its end, after the beginning-of-sequence token where the tokenizer puts one."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    return last([bos] if bos is not None and starts else [], ids, most)


def last(head: list[int], ids: list[int], most: int | None) -> list[int]:
    """``head`` and as many of the last ids as make ``most`` with it."""
    return head + (ids if most is None else ids[max(0, len(ids) - max(0, most - len(head))) :])


def check_positions(model: Any, task: Task, longest: int, what: str) -> None:
    """Refuse sequences that are longer than a model with a fixed number of positions takes.

    Raises:
        RegroupError: saying how many tokens there may be, and of what.
    """
    limit = positions(model)
    if limit is not None and longest > limit:
        raise RegroupError(
            "a prompt is longer than the model's positions",
            file=task.data,
            expected=f"at most {limit} tokens{what}",
            got=longest,
            remedy="set max-source-tokens in the task",
        )


def positions(model: Any) -> int | None:
    """The longest sequence that a model with a fixed number of positions takes, or None."""
    config = model.config.get_text_config()
    family = family_for({"model_type": config.model_type})
    if family is not None and family.positions == "relative":  # T5's n_positions is a leftover
        return None
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            return limit
    return None
