"""Metrics against the libraries that define them, against brute force, and on answers that are empty or not ASCII."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from regroup.evaluation.bootstrap import interval, paired
from regroup.evaluation.metrics import GENERATING, edit_distance, exact_match, f1, normalized

ANSWERS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "Ein Bär läuft über die Straße",
    "日本語のテスト",
    "the cat sat on the mat and the cat ran",
    "running runs",
]
REFERENCES = [
    ["A quick brown fox jumped over the lazy dog.", "The fox jumps."],
    ["something"],
    ["Der Bär lief über die Straße"],
    ["日本語テスト", "日本語のテスト。"],
    ["the cat sat on a mat and ran"],
    ["run running"],
]


def value(name: str, answers: list[str], references: list[list[str]]) -> float:
    metric = GENERATING[name]
    return metric.value(metric.rows(answers, references).sum(0))


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_librarys_with_the_best_reference(kind: str) -> None:
    scorer = RougeScorer([kind], use_stemmer=True)
    wanted = [
        max(scorer.score(reference, answer)[kind].fmeasure for reference in several)
        for answer, several in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert value(kind, ANSWERS, REFERENCES) == pytest.approx(sum(wanted) / len(wanted), abs=1e-12)


@pytest.mark.parametrize(("name", "library"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_corpus_metrics_are_the_librarys(name: str, library: BLEU | CHRF) -> None:
    streams = [
        [several[0] for several in REFERENCES],
        [several[1] if len(several) > 1 else None for several in REFERENCES],
    ]
    assert value(name, ANSWERS, REFERENCES) == pytest.approx(library.corpus_score(ANSWERS, streams).score, abs=1e-9)
    # Negative control: other answers have another score.
    assert value(name, ANSWERS[::-1], REFERENCES) != pytest.approx(value(name, ANSWERS, REFERENCES))


def test_resampled_bleu_is_the_librarys_of_those_rows() -> None:
    metric, draw = GENERATING["bleu"], [0, 0, 2, 4, 5, 2]
    rows = metric.rows(ANSWERS, REFERENCES)
    drawn = [ANSWERS[i] for i in draw]
    streams = [[REFERENCES[i][0] for i in draw], [REFERENCES[i][1] if len(REFERENCES[i]) > 1 else None for i in draw]]
    assert metric.value(rows[draw].sum(0)) == pytest.approx(BLEU().corpus_score(drawn, streams).score, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "references", "match", "overlap"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("a cat", ["the dog"], 0.0, 0.0),
        ("red green blue", ["green", "blue green"], 0.0, 2 * 2 / 5),
        ("", ["the"], 1.0, 1.0),  # nothing is left of either
        ("", ["word"], 0.0, 0.0),
        ("Straße", ["straße"], 1.0, 1.0),
        ("one one two", ["one two two"], 0.0, 2 * 2 / 6),
    ],
)
def test_squad_scores(answer: str, references: list[str], match: float, overlap: float) -> None:
    assert exact_match(answer, references) == match
    assert f1(answer, references) == pytest.approx(overlap)


def test_squad_normalisation() -> None:
    assert normalized(" The  cat's, an  Apple-pie a ") == "cats applepie"


def brute_force(first: str, second: str) -> int:
    @functools.cache
    def least(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    return least(len(first), len(second))


def test_edit_distance_is_the_least_number_of_edits() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first, second = ("".join(draw.choices("abc", k=draw.randrange(8))) for _ in range(2))
        assert edit_distance(first, second) == brute_force(first, second)


def test_error_rates_count_symbols_and_take_the_best_reference() -> None:
    assert value("character_error_rate", ["abc", "x"], [["abd"], ["y", "xx"]]) == pytest.approx((1 + 1) / (3 + 2))
    assert value("symbol_error_rate", ["AH B AE", ""], [["AH B AE1"], ["T"]]) == pytest.approx(2 / 4)
    # One letter, whether it is stored as one character or as two.
    assert value("character_error_rate", ["e\u0301"], [["\u00e9"]]) == 0.0
    assert value("character_error_rate", ["e"], [["\u00e9"]]) == 1.0


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    draw = np.random.default_rng(3)
    scores = draw.normal(size=4000)
    found = interval(np.stack([scores, np.ones_like(scores)], 1), lambda sums: float(sums[0] / sums[1]))
    half = 1.96 * scores.std(ddof=1) / math.sqrt(len(scores))
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_paired_differences_see_what_unpaired_intervals_hide() -> None:
    draw = np.random.default_rng(4)
    hard = draw.normal(size=300)  # how hard a row is, for both alike
    rows = [np.stack([hard + shift, np.ones(300)], 1) for shift in (0.05, 0.0)]

    def mean(sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])

    found = paired(rows[0], rows[1], mean)
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05)
    assert found.p == pytest.approx(2 / 1001)
    assert interval(rows[0], mean).low < mean(rows[1].sum(0)) < interval(rows[0], mean).high
    # Negative control: no difference at all.
    assert paired(rows[0], rows[0], mean).p == 1.0


def test_p_values_are_as_likely_as_they_say() -> None:
    draw = np.random.default_rng(5)
    found = []
    for trial in range(200):
        rows = [np.stack([draw.normal(size=60), np.ones(60)], 1) for _ in range(2)]
        found.append(paired(rows[0], rows[1], lambda sums: float(sums[0] / sums[1]), seed=trial).p)
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.11


def test_few_rows_do_not_pretend_to_be_sure() -> None:
    def mean(sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])

    for count in (1, 2, 5, 8, 20):
        better, worse = np.ones((count, 2)), np.stack([np.zeros(count), np.ones(count)], 1)
        # Of 2^n ways to swap the models row by row, two give a difference as large as this one.
        assert paired(better, worse, mean).p == pytest.approx(max(2 / 2**count, 2 / 1001))
    one = np.ones((1, 2))
    assert math.isnan(interval(one, mean).low)
    assert interval(one, mean).value == 1.0
    assert math.isnan(paired(one, one, mean).high)


def test_draws_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.stack([np.random.default_rng(6).integers(0, 9, 50), np.ones(50)], 1).astype(float)

    def mean(sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])

    whole = interval(rows, mean), paired(rows, rows[::-1], mean)
    monkeypatch.setattr("regroup.evaluation.bootstrap._CELLS", 50 * 7)
    assert (interval(rows, mean), paired(rows, rows[::-1], mean)) == whole
    assert interval(rows, mean, seed=1) != whole[0]
