"""Pairs of source and target that an encoder-decoder writes itself.

Its first text answers a source that holds next to nothing: for T5 one sentinel, for others the special tokens of an
empty text. That text, with a gap in it for T5, is the source of the pair, and what the model answers is the target. So
both sides are what the model takes for text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..attention.cache import KVCache
from ..data.batches import padded
from .degenerate import not_finite

if TYPE_CHECKING:
    from .sampler import Sampler

Pair = tuple[list[int], list[int]]


def sample_pairs(sampler: Sampler, numbers: Sequence[int], length: int, progress: Callable[[int], None]) -> list[Pair]:
    """Pairs of these numbers; see ``Sampler.pairs``."""
    written = _answers(sampler, numbers, [_first_source(sampler, n) for n in numbers], length, "source", progress)
    gaps = sampler.uniform(numbers, 2, part="gap").tolist()
    sources = [_source(sampler, text, gap) for text, gap in zip(written, gaps, strict=True)]
    targets = _answers(sampler, numbers, sources, length, "target", progress)
    return list(zip(sources, targets, strict=True))


def _first_source(sampler: Sampler, number: int) -> list[int]:
    """A source that holds next to nothing."""
    words = sampler.vocabulary
    end = sorted(words.ends)[:1]
    if words.sentinels:
        return [words.sentinels[0], *end]
    if words.empty:
        return list(words.empty)
    # Without a tokenizer it is not known what surrounds a text: a token of text and the end.
    return [int(sampler.random_tokens(sampler.uniform([number], 1, part="first"))[0]), *end]


def _source(sampler: Sampler, text: list[int], gap: Sequence[float]) -> list[int]:
    """The model's own text as a source; T5 gets it with one gap, which its target fills."""
    words = sampler.vocabulary
    if not words.sentinels:
        return text
    first, second = words.sentinels
    # Sentinels and ends are its form of an answer, and no text.
    plain = set(words.plain.tolist()) - set(words.sentinels)
    body = [token for token in text if token in plain]
    begin = int(gap[0] * (len(body) + 1))
    end = begin + int(gap[1] * (len(body) + 1 - begin))
    return [*body[:begin], first, *body[end:], *([second] if end < len(body) else []), *sorted(words.ends)[:1]]


def _answers(
    sampler: Sampler,
    numbers: Sequence[int],
    sources: Sequence[Sequence[int]],
    length: int,
    part: str,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """What the model answers to sources, sampled up to its end or ``length`` tokens; never empty."""
    model, words, device = sampler.model, sampler.vocabulary, sampler.device
    random = sampler.uniform(numbers, length, part=part)
    ids, mask = (tensor.to(device) for tensor in padded(sources, 0))
    states = model.get_encoder()(input_ids=ids, attention_mask=mask)
    cache = KVCache.for_model(model, max_length=length)
    ends = torch.tensor(sorted(words.ends), dtype=torch.int64, device=device)
    token = torch.full((len(numbers), 1), words.decoder_start, dtype=torch.int64, device=device)
    finite = torch.ones(len(numbers), dtype=torch.bool, device=device)
    ended = ~finite
    made: list[torch.Tensor] = []
    for place in range(length):
        out = model(
            encoder_outputs=states,
            attention_mask=mask,
            decoder_input_ids=token,
            past_key_values=cache,
            use_cache=True,
        )
        drawn, sound = sampler.draw(out.logits[:, -1], random[:, place])
        finite &= sound
        if place == 0 and words.forced is not None:
            drawn = torch.full_like(drawn, words.forced)
        made.append(drawn.masked_fill(ended, -1))
        ended = ended | torch.isin(drawn, ends)
        token = drawn[:, None]
        progress(len(numbers))
        if bool(ended.all()):
            break
    if not bool(finite.all()):
        raise not_finite()
    rows = torch.stack(made, 1).tolist()
    return [[token for token in row if token >= 0] for row in rows]
