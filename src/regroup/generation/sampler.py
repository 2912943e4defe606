"""Text sampled from a decoder-only model, as windows of tokens; from an encoder-decoder, as pairs (``pairs.py``).

Each text has uniform numbers of its own, made from the seed, the stream and the text's number. So text 5 is the same
text, up to the rounding of the model's products, however many are sampled together and on however many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.cache import KVCache
from ..errors import RegroupError
from .degenerate import not_finite, refuse_degenerate
from .draw import draw, uniform
from .pairs import Pair, sample_pairs
from .vocabulary import STARTS, Vocabulary

STREAMS = ("calibration", "evaluation", "uptraining")


class Sampler:
    """Samples text from a model. Text ``number`` of a stream depends on the seed, the stream and the number alone.

    Args:
        model: a model of transformers with an output head; in evaluation mode on ``device``. Where it has the
            attention implementation ``"regroup"`` and was prepared for inference (``open_sampler`` does both), sampling
            is several times faster.
        vocabulary: which tokens may be drawn, and how texts start and end.
        seed: any integer.
        stream: one of ``STREAMS``. Different streams have different texts: what is fitted is not what is judged.
        start: with which token windows start: ``"text"`` (BOS if the tokenizer puts it before a text, else what
            separates documents, else BOS), ``"bos"``, ``"document"``, ``"random"`` (any token of text) or ``"mixed"``
            (``"text"`` and ``"random"`` in turn). Where the model lacks one, the other is taken, and a random one where
            it has neither. After an end a new text starts likewise.
        temperature: 1 samples from the model's own distribution.
        batch: texts that are sampled together.
        check: refuse degenerate text.

    Raises:
        RegroupError: an unknown stream or start, or a temperature that is not positive.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        *,
        seed: int,
        stream: str,
        start: str = "text",
        temperature: float = 1.0,
        batch: int = 32,
        check: bool = True,
    ) -> None:
        for name, value, known in (("stream", stream, STREAMS), ("start", start, STARTS)):
            if value not in known:
                raise RegroupError(f"the {name} is not known", expected=", ".join(known), got=value)
        if not temperature > 0:
            raise RegroupError("the temperature is not positive", expected="more than 0", got=temperature)
        self.model, self.vocabulary = model, vocabulary
        self.seed, self.stream, self.first_token, self.temperature = seed, stream, start, temperature
        self.batch, self.check = max(1, batch), check
        self.device = next(model.parameters(), torch.empty(0)).device
        self._allowed = vocabulary.allowed.to(self.device)

    @torch.inference_mode()
    def windows(self, first: int, count: int, length: int, *, progress: Callable[[int], None] | None = None) -> Tensor:
        """Windows number ``first`` to ``first + count - 1`` of the stream.

        Args:
            first: the first window's number, from 0.
            count: how many.
            length: tokens per window; a longer window begins with the shorter one of its number.
            progress: called with the number of tokens just sampled.

        Returns:
            (count, length) int64, on the CPU.

        Raises:
            DegenerateTextError: the logits are not finite, or see ``degenerate.degenerate``.
        """
        parts, drawn = [torch.empty((0, length), dtype=torch.int64)], []
        for begin in range(first, first + count, self.batch):
            numbers = range(begin, min(begin + self.batch, first + count))
            ids, given = self._windows(numbers, length, progress or _ignore)
            parts.append(ids)
            for number, row, skip in zip(numbers, ids, given, strict=True):
                # From a random token a model takes longer to come to what it repeats for ever.
                if self.first_token != "mixed" or self._kind(number) != "random":
                    drawn.append(row[~skip].tolist())
        if self.check and drawn and length > 1:
            refuse_degenerate(drawn, self.vocabulary.ends)
        return torch.cat(parts)

    @torch.inference_mode()
    def pairs(
        self, first: int, count: int, length: int, *, progress: Callable[[int], None] | None = None
    ) -> list[Pair]:
        """Pairs of source and target ids number ``first`` to ``first + count - 1``, of an encoder-decoder.

        Args:
            first, count: as in ``windows``.
            length: tokens of a target at most.
            progress: called with the number of tokens just sampled.

        Returns:
            For each number source and target, as the model's tokenizer would make them of text: special tokens are
            included, the decoder's start token is not. Both are at least one token long.

        Raises:
            DegenerateTextError: as ``windows``.
        """
        found: list[Pair] = []
        for begin in range(first, first + count, self.batch):
            numbers = range(begin, min(begin + self.batch, first + count))
            found += sample_pairs(self, numbers, length, progress or _ignore)
        if self.check and count:
            refuse_degenerate([target for _, target in found], self.vocabulary.ends)
        return found

    def uniform(self, numbers: Sequence[int], count: int, *, part: str = "") -> Tensor:
        """(texts, count) float64 in [0, 1), each text's own; ``part`` names one of several draws for a text."""
        stream = f"{self.stream}/{part}" if part else self.stream
        return torch.stack([uniform(self.seed, stream, number, count) for number in numbers]).to(self.device)

    def draw(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) by uniform numbers (n,) from logits (n, V), and whether the logits were finite."""
        return draw(logits[:, : self.vocabulary.size], numbers, self._allowed, self.temperature)

    def random_tokens(self, numbers: Tensor) -> Tensor:
        """Tokens of text (n,), each as likely as another, by uniform numbers (n,)."""
        plain = self.vocabulary.plain.to(self.device)
        return plain[(numbers * len(plain)).long().clamp_(max=len(plain) - 1)]

    def _kind(self, number: int) -> str:
        """How a window starts."""
        return ("text", "random")[number % 2] if self.first_token == "mixed" else self.first_token

    def _windows(self, numbers: Sequence[int], length: int, progress: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """Windows (n, length) of these numbers, and which of their tokens were given and not drawn."""
        random = self.uniform(numbers, length)
        wanted = [self.vocabulary.start(self._kind(number)) for number in numbers]
        # -1: a random token.
        starts = torch.tensor([-1 if token is None else token for token in wanted], device=self.device)
        ends = torch.tensor(sorted(self.vocabulary.ends), dtype=torch.int64, device=self.device)
        ids = torch.empty((len(numbers), length), dtype=torch.int64, device=self.device)
        given = torch.zeros_like(ids, dtype=torch.bool)
        finite = torch.ones(len(numbers), dtype=torch.bool, device=self.device)
        cache = KVCache.for_model(self.model, max_length=length)
        ended = torch.ones_like(finite)
        for place in range(length):
            begin = torch.where(starts < 0, self.random_tokens(random[:, place]), starts)
            if place == 0:
                ids[:, 0] = begin
            else:
                out = self.model(input_ids=ids[:, place - 1 : place], past_key_values=cache, use_cache=True)
                drawn, sound = self.draw(out.logits[:, -1], random[:, place])
                finite &= sound
                ids[:, place] = torch.where(ended, begin, drawn)
            given[:, place] = ended
            # A token that both ends a text and starts the next one does both.
            ended = torch.isin(ids[:, place], ends) & (ids[:, place] != starts) & ~ended
            progress(len(numbers))
        if not bool(finite.all()):
            raise not_finite()
        return ids.cpu(), given.cpu()


def _ignore(count: int) -> None:
    """Progress that nobody watches."""
