"""How likely each choice is after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.batches import padded
from .prompts import decoder_ids, last


def choice_ids(
    prompt: str, choices: Sequence[str], tokenizer: Any, *, seq2seq: bool, most: int | None
) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of each choice, as token ids.

    A decoder's prompt and choice are tokenised together, for a tokenizer may join them, and spaces at the prompt's end
    belong to the choice (as lm-evaluation-harness has it). An encoder-decoder reads the prompt and is asked for the
    choice as its tokenizer writes a target, end included.
    """
    if seq2seq:
        cut = {"truncation": True, "max_length": most} if most else {}
        source = list(tokenizer(prompt, verbose=False, **cut)["input_ids"])
        return [(source, list(tokenizer(text_target=choice, verbose=False)["input_ids"])) for choice in choices]
    kept = prompt.rstrip()
    spaces = prompt[len(kept) :]
    found = []
    for choice in choices:
        context = decoder_ids(kept, tokenizer)
        whole = decoder_ids(kept + spaces + choice, tokenizer)
        continuation = whole[len(context) :]
        head = context[:1] if context[:1] == [tokenizer.bos_token_id] else []
        context = last(head, context[len(head) :], most)
        found.append((context, continuation))
    return found


@torch.inference_mode()
def log_likelihoods(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], start: int | None) -> list[float]:
    """Sum of log p of each continuation's tokens after its context, nats, in float32.

    Args:
        model: a decoder, or an encoder-decoder with
        start: the token its decoder begins with.
        pairs: contexts and continuations.
    """
    device = next(model.parameters()).device
    if model.config.is_encoder_decoder:
        ids, mask = padded([context for context, _ in pairs], 0)
        before, before_mask = padded([[start or 0, *wanted[:-1]] for _, wanted in pairs], 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {"decoder_input_ids": before, "decoder_attention_mask": before_mask}
        firsts = [0] * len(pairs)
    else:
        rows = [[*context, *wanted][:-1] for context, wanted in pairs]
        ids, mask = padded(rows, 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        firsts = [len(context) - 1 for context, _ in pairs]
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    found = []
    for row, (first, (_, wanted)) in enumerate(zip(firsts, pairs, strict=True)):
        log_p = logits[row, first : first + len(wanted)].float().log_softmax(-1)
        found.append(float(log_p.gather(-1, torch.tensor(wanted, device=device)[:, None]).double().sum()))
    return found
