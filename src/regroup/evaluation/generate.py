"""Greedy answers, one batch at a time; they do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.batches import padded
from ..errors import RegroupError
from .task import Task


def settings(model: Any, tokenizer: Any, task: Task) -> Any:
    """Greedy decoding: of the checkpoint's own settings only what says where a text begins and ends."""
    from transformers import GenerationConfig

    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = next((token for token in (tokenizer.pad_token_id, own.pad_token_id) if token is not None), None)
    start = own.decoder_start_token_id
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    forced = getattr(own, "forced_bos_token_id", None)
    if task.target_language is not None:
        forced = tokenizer.convert_tokens_to_ids(task.target_language)
        if forced is None or forced == tokenizer.unk_token_id:
            raise RegroupError(
                "the tokenizer does not know the task's target language",
                expected="a token such as deu_Latn",
                got=task.target_language,
            )
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=task.max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad if pad is not None else end[0] if isinstance(end, list) else end if end is not None else 0,
        decoder_start_token_id=start,
        forced_bos_token_id=forced,
        stop_strings=list(task.stop) or None,
    )


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], task: Task, how: Any) -> list[list[int]]:
    """Token ids of the answers to a batch of prompts, ends and paddings left out.

    Decoders are padded on the left, so that every answer follows its prompt; padding is masked and counts no position.
    """
    from transformers import GenerationMixin

    seq2seq = bool(model.config.is_encoder_decoder)
    ids, mask = padded(prompts, how.pad_token_id, left=not seq2seq)
    device = next(model.parameters()).device
    model.generation_config = how  # generate would fill what is left open here from the checkpoint's own
    more = {"tokenizer": tokenizer} if task.stop else {}
    # Some families have a generate of their own, for audio.
    generate: Any = GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]
    made = generate(model, ids.to(device), attention_mask=mask.to(device), generation_config=how, **more)
    ends = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
    first = 1 if seq2seq else ids.shape[1]
    answers = []
    for row in made[:, first:].tolist():
        if how.forced_bos_token_id is not None and row[:1] == [how.forced_bos_token_id]:
            row = row[1:]
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        # What a stop ended is filled up with padding while others of its batch continue.
        while task.stop and end and row[end - 1] == how.pad_token_id:
            end -= 1
        answers.append(row[:end])
    return answers


def text_of(ids: Sequence[int], tokenizer: Any, task: Task) -> str:
    """An answer's text, before the first stop, without spaces around it."""
    # A token that the tokenizer does not know is an error, and one symbol.
    unknown = tokenizer.unk_token_id
    pieces: list[str] = []
    part: list[int] = []
    for token in [*ids, None]:
        if token is not None and token != unknown:
            part.append(token)
            continue
        if part:
            pieces.append(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        pieces += ["\N{REPLACEMENT CHARACTER}"] if token is not None else []
        part = []
    text = "".join(pieces)
    for stop in task.stop:
        text = text.partition(stop)[0]
    return text.strip()
