"""How answers are judged.

A metric turns each row into some numbers, and sums of them over rows into its value, so that a resampled set of rows
needs no answer to be judged again: a mean is (sum, count), an error rate (errors, length), BLEU its n-gram counts.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..extras import require

Answers = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    """One way to judge.

    Attributes:
        rows: answers and their references to numbers, (rows, k) float64.
        value: sums of those numbers over rows, (k,), to the metric.
        lower_is_better: error rates.
        source: where it is defined.
    """

    rows: Callable[[Answers, References], np.ndarray]
    value: Callable[[np.ndarray], float]
    source: str
    lower_is_better: bool = False


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def _mean_of(best: Callable[[str, Sequence[str]], float]) -> Callable[[Answers, References], np.ndarray]:
    def rows(answers: Answers, references: References) -> np.ndarray:
        values = [(best(answer, right), 1.0) for answer, right in zip(answers, references, strict=True)]
        return np.array(values, dtype=np.float64)

    return rows


def normalized(text: str) -> str:
    """SQuAD's form of an answer (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, in SQuAD's form."""
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the words' precision and recall, in SQuAD's form, with the best reference."""

    def one(reference: str) -> float:
        said, wanted = normalized(answer).split(), normalized(reference).split()
        if not said or not wanted:
            return float(said == wanted)
        common = sum((Counter(said) & Counter(wanted)).values())
        return 2 * common / (len(said) + len(wanted))

    return max(map(one, references))


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The least number of symbols inserted, left out or replaced that makes one sequence the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, symbol in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != wanted))
    return row[-1]


def _error_rate(split: Callable[[str], Sequence[str]]) -> Callable[[Answers, References], np.ndarray]:
    """(errors, symbols of the reference), of the reference with the fewest errors per symbol."""

    def rows(answers: Answers, references: References) -> np.ndarray:
        found = []
        for answer, several in zip(answers, references, strict=True):
            said = split(unicodedata.normalize("NFC", answer))
            counted = []
            for reference in several:
                wanted = split(unicodedata.normalize("NFC", reference))
                counted.append((edit_distance(said, wanted), len(wanted)))
            found.append(min(counted, key=lambda pair: (pair[0] / max(1, pair[1]), pair[0])))
        return np.array(found, dtype=np.float64)

    return rows


def check_installed(names: Iterable[str]) -> None:
    """Refuse metrics of libraries that are not installed, before anything is generated.

    Raises:
        RegroupError: naming the extra.
    """
    for name in names:
        if name.startswith("rouge"):
            require("evaluate", "rouge_score")
        elif name in ("bleu", "chrf"):
            require("evaluate", "sacrebleu")


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _rouge_rows(kind: str) -> Callable[[Answers, References], np.ndarray]:
    def best(answer: str, references: Sequence[str]) -> float:
        return max(_rouge(kind).score(reference, answer)[kind].fmeasure for reference in references)

    return _mean_of(best)


@cache
def _sacrebleu(kind: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU() if kind == "bleu" else CHRF()


def _corpus_rows(kind: str) -> Callable[[Answers, References], np.ndarray]:
    """The library's own statistics of each row; a test holds their sum against its ``corpus_score``."""

    def rows(answers: Answers, references: References) -> np.ndarray:
        most = max(map(len, references))
        streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
        return np.array(_sacrebleu(kind)._extract_corpus_statistics(list(answers), streams), dtype=np.float64)

    return rows


def _corpus_value(kind: str) -> Callable[[np.ndarray], float]:
    def value(sums: np.ndarray) -> float:
        return float(_sacrebleu(kind)._compute_score_from_stats([int(number) for number in sums]).score)

    return value


_SQUAD = "Rajpurkar et al. 2016, arXiv:1606.05250"
_ROUGE = "Lin 2004; rouge-score with stemming, F-measure"
GENERATING: dict[str, Metric] = {
    "exact_match": Metric(_mean_of(exact_match), _ratio, _SQUAD),
    "f1": Metric(_mean_of(f1), _ratio, _SQUAD),
    "rouge1": Metric(_rouge_rows("rouge1"), _ratio, _ROUGE),
    "rouge2": Metric(_rouge_rows("rouge2"), _ratio, _ROUGE),
    "rougeL": Metric(_rouge_rows("rougeL"), _ratio, _ROUGE),
    "bleu": Metric(
        _corpus_rows("bleu"), _corpus_value("bleu"), "Papineni et al. 2002; sacrebleu (Post 2018), 0 to 100"
    ),
    "chrf": Metric(_corpus_rows("chrf"), _corpus_value("chrf"), "Popović 2015; sacrebleu, 0 to 100"),
    "character_error_rate": Metric(_error_rate(list), _ratio, "edit distance over characters (NFC)", True),
    "symbol_error_rate": Metric(
        _error_rate(str.split), _ratio, "edit distance over what spaces part: phonemes, or words", True
    ),
}
CHOOSING: dict[str, str] = {
    "accuracy": "the choice with the highest log-likelihood",
    "accuracy_by_length": "the choice with the highest log-likelihood per character",
}
