"""Whether what a model wrote is text at all: a model that writes nothing but ends or repeats teaches nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import DegenerateTextError

# Texts have far more distinct n-grams than that, whatever their alphabet: 16 characters hardly ever come twice.
_DISTINCT = 0.25
_NGRAM = 16
_ENDS = 0.5


def degenerate(texts: Sequence[Sequence[int]], ends: Collection[int]) -> str | None:
    """What is wrong with sampled texts, or None.

    Args:
        texts: the tokens that were drawn; those that were given, such as beginnings, are left out.
        ends: ids that end a text.

    Returns:
        A phrase for a message, such as ``"93% of the tokens end a text"``.
    """
    drawn = sum(map(len, texts))
    if drawn == 0:
        return "nothing was written"
    ended = sum(token in ends for text in texts for token in text) / drawn
    if ended > _ENDS:
        return f"{ended:.0%} of the tokens end a text"
    grams = [tuple(text[i : i + size]) for text in texts for size in [_size(text)] for i in range(len(text) - size + 1)]
    distinct = len(set(grams)) / len(grams)
    if distinct < _DISTINCT:
        return f"it repeats itself: {distinct:.1%} of the sequences of up to {_NGRAM} tokens are distinct"
    return None


def _size(text: Sequence[int]) -> int:
    """Tokens of the sequences that are compared; all of a short text, which may well be written twice."""
    return max(1, min(_NGRAM, len(text) // 2))


def refuse_degenerate(texts: Sequence[Sequence[int]], ends: Collection[int]) -> None:
    """Raise ``DegenerateTextError`` where ``degenerate`` finds something."""
    seen = degenerate(texts, ends)
    if seen is not None:
        raise DegenerateTextError(
            "the text that the model writes itself is degenerate",
            expected="text",
            got=seen,
            remedy="give text by --calibration FILE, or pass --calibration none",
        )


def not_finite() -> DegenerateTextError:
    """The error for logits that make no distribution."""
    return DegenerateTextError(
        "the text that the model writes itself is degenerate",
        expected="finite logits",
        got="NaN or infinity in the model's logits",
        remedy="download the checkpoint again, or look for the training step that broke it",
    )
