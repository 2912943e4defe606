"""The paper's experiments: texts that do not overlap, which runs there are, means over seeds, and all of it, small."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes.paper import experiments, figures, paired, tables, texts
from recipes.paper.settings import SCALES, TASKS
from recipes.paper.variants import FAMILIES, OURS, Variant
from transformers import PreTrainedTokenizerFast

from regroup.data import read_pairs, read_texts
from regroup.errors import RegroupError

SMOKE = SCALES["smoke"]
WORDS = "the cat sat on a mat while seven dogs ran over green hills and sang of rivers".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Books of numbered sentences, so that every passage differs, and a small dictionary."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, sentences in (("train", 4000), ("valid", 1200)):
        pieces = []
        for number in range(sentences):
            clauses = [" ".join(draw.choices(WORDS, k=3)) for _ in range(4)]
            pieces.append(f"{', '.join(clauses)} {number}.".capitalize() + ("\n\n" if number % 5 == 4 else "\n"))
        with gzip.open(folder / f"gutenberg-{name}.txt.gz", "wt") as file:
            file.write("".join(pieces))
    for name in ("train", "valid", "test"):
        rows = (f"{''.join(draw.choices('abcdefg', k=6))}\t{''.join(draw.choices('ɑʃɪˈ', k=5))}" for _ in range(200))
        (folder / f"g2p-{name}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> texts.Texts:
    sizes = {"pretraining": 60_000, "uptraining": 20_000, "calibration": 10_000, "held_out": 20}
    return texts.prepare(data, tmp_path_factory.mktemp("work"), **sizes)


def test_no_two_uses_share_a_passage(prepared: texts.Texts) -> None:
    uses = {
        name: list(read_texts(getattr(prepared, name)))
        for name in ("pretraining", "uptraining", "calibration", "held_out")
    }
    assert all(uses.values())
    counted = Counter(text for found in uses.values() for text in found)
    assert max(counted.values()) == 1
    # Clauses to restore come from passages that nothing else has; sentences are numbered, so that they can be found.
    seen = "".join(text for found in uses.values() for text in found)
    for split in (prepared.tuning("restoration"), prepared.dev("restoration")):
        numbered = [target for _, target in read_pairs(split) if target[-2].isdigit()]
        assert numbered
        assert not any(line in seen for line in numbered[:50])


def test_nothing_is_asked_that_was_learnt(data: Path, prepared: texts.Texts) -> None:
    """Clauses of three of sixteen words come in many passages."""
    for task in TASKS:
        learnt = {source for source, _ in read_pairs(prepared.tuning(task))}
        asked = {source for source, _ in read_pairs(prepared.dev(task))}
        assert asked
        assert not asked & learnt
    with gzip.open(data / "gutenberg-valid.txt.gz", "rt") as file:
        clauses = {texts.bare(clause) for clause in re.split("[,.]", file.read())}
    assert clauses & {source for source, _ in read_pairs(prepared.tuning("restoration"))}


def test_restoration_is_its_clause_without_what_is_to_be_restored(prepared: texts.Texts) -> None:
    assert texts.bare("It's 5 o'clock, Mr. Smith!") == "its5oclockmrsmith"
    for source, target in read_pairs(prepared.dev("restoration")):
        assert source == texts.bare(target)
        assert texts.CLAUSE[0] <= len(source) <= texts.CLAUSE[1]


def test_the_real_continuation_is_among_the_choices(prepared: texts.Texts) -> None:
    rows = [json.loads(line) for line in prepared.continuation.read_text().splitlines()]
    assert rows
    assert len({row["answer"] for row in rows}) > 1
    for row in rows:
        assert len(set(row["choices"])) >= 2
        assert 0 <= row["answer"] < len(row["choices"]) == texts.CHOICES


def test_the_tokenizer_gives_back_what_it_was_given(prepared: texts.Texts) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(prepared.tokenizer)
    for text in ("The cat sat.", "ɑʃɪˈ", "<extra_id_0>the<extra_id_1>\ncat"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == texts.END
        assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(tokenizer) - 1
    assert texts.UNKNOWN in tokenizer("☽")["input_ids"]


def test_text_that_is_not_there_or_too_little_is_refused(data: Path, tmp_path: Path) -> None:
    sizes = {"uptraining": 10, "calibration": 10, "held_out": 2}
    with pytest.raises(RegroupError, match="is not there"):
        texts.prepare(tmp_path, tmp_path, pretraining=10, **sizes)
    with pytest.raises(RegroupError, match="too little text"):
        texts.prepare(data, tmp_path, pretraining=10**7, **sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_has_its_runs_and_none_is_run_twice(family: str) -> None:
    scale = SCALES["cpu"]
    found = experiments.variants(family, scale)
    assert len(found) == len(set(found))
    for seed in range(scale.seeds):
        for part in (
            experiments.table(family, scale, seed),
            experiments.methods(family, seed),
            experiments.proportions(family, scale, seed),
        ):
            assert set(part.values()) <= set(found)
    # Seeds share what no seed touches: converted by means, and not uptrained.
    names = [variant.name for variant in experiments.trained(found)]
    assert len(names) == len(set(names))
    assert names.count(f"{family}-large-mean-1") == 1
    assert {f"{family}-large-random-1-s{seed}-a0.05-s{seed}" for seed in range(3)} <= set(names)


def test_our_calibration_counts_as_uptraining() -> None:
    for scale in SCALES.values():
        least = min(alpha for alpha in scale.alphas if alpha)
        for tokens in (scale.encoder_decoder_tokens, scale.decoder_tokens):
            left = least * tokens - scale.calibration_tokens
            assert left >= scale.batch * scale.window


def a_record() -> dict[str, Any]:
    """What a run of made-up results comes to."""
    scale = replace(SMOKE, seeds=3)

    def loss(variant: Variant) -> dict[str, Any]:
        base = 2.0 + (variant.heads == 1) - variant.alpha - 0.5 * (variant.method == OURS)
        found = {"nats_per_token": base + 0.01 * variant.seed, "standard_error": 0.1}
        return found | ({"continuation": 0.5} if variant.family == "decoder" else {})

    def answers(variant: Variant) -> dict[str, Any]:
        quality = 0.5 + 0.1 * variant.seed
        return {"average": quality, "pronunciation": quality, "restoration": quality, "spikes": 1, "diverged": 0}

    times = {"seconds_per_sample": {"p20": 0.1, "p50": 0.2, "p80": 0.3}, "cache_bytes": 10**6}
    seconds = {family: dict.fromkeys(experiments.table(family, scale, 0), times) for family in FAMILIES}
    return {"results": experiments.summarise(scale, loss, answers, seconds)}


def test_results_are_means_over_seeds() -> None:
    results = a_record()["results"]
    row = next(row for row in results["encoder-decoder"]["table_1"] if row["model"] == "MQA large")
    assert row["average"]["mean"] == pytest.approx(0.6)
    assert row["average"]["standard_deviation"] == pytest.approx(0.1)
    assert row["average"]["seeds"] == pytest.approx([0.5, 0.6, 0.7])
    assert row["nats_per_token"]["mean"] == pytest.approx(3.0 - 0.05 + 0.01)
    ours = next(
        row
        for row in results["decoder"]["figure_5"]
        if (row["method"], row["num_key_value_heads"], row["alpha"]) == (OURS, 2, 0.05)
    )
    assert ours["nats_per_token"]["mean"] == pytest.approx(2.0 - 0.05 - 0.5 + 0.01)
    assert results["decoder"]["appendix_a"][0]["model"] == experiments.SCRATCH


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    # Tables of Student's t: 5% two-sided; ν = 1 is Cauchy's distribution, where p = 1/2 at 1.
    [(0.0, 5, 1.0), (1.0, 1, 0.5), (12.706, 1, 0.05), (4.3027, 2, 0.05), (2.3646, 7, 0.05), (3.4995, 7, 0.01)],
)
def test_p_of_the_paired_test(t: float, freedom: int, p: float) -> None:
    assert paired.t_test(t, freedom) == pytest.approx(p, rel=1e-3)


def test_what_seeds_have_in_common_is_no_difference() -> None:
    found = paired.compare([0.52, 0.41, 0.63], [0.50, 0.40, 0.60])
    assert found.mean == pytest.approx(0.02)
    assert found.standard_error == pytest.approx(0.01 / 3**0.5)
    assert found.p == pytest.approx(paired.t_test(2 * 3**0.5, 2))
    # In another order the same values tell nothing.
    assert (paired.compare([0.63, 0.52, 0.41], [0.50, 0.40, 0.60]).p or 0) > 0.5
    assert paired.compare([0.5], [0.4]).p is None


def test_fine_tuned_models_are_compared_over_their_seeds() -> None:
    record = a_record()
    rows = record["results"]["encoder-decoder"]["fine_tuning"]
    assert {experiments.CONTINUED, experiments.UNTRAINED, experiments.SCRATCH} < {row["model"] for row in rows}
    assert all(len(row["average"]["seeds"]) == SMOKE.tuning_seeds for row in rows)
    lines = tables.fine_tuning(record)
    assert "| MHA large, continued − MHA large | +0.0 ± 0.0 | 1.00 |" in lines
    # A record from before has fewer rows, and says nothing of models that it lacks.
    del record["results"]["encoder-decoder"]["fine_tuning"]
    assert not any("continued" in line or "untrained" in line for line in tables.fine_tuning(record))


def test_figures_are_drawn(tmp_path: Path) -> None:
    figures.draw(a_record(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"paper-figure-{n}.png" for n in (3, 4, 5)}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


@pytest.mark.slow
def test_all_of_it_on_a_small_scale(data: Path, tmp_path: Path) -> None:
    """As a command: what spawned processes import of a program is not what they import of a module."""

    def run(*more: str) -> None:
        given = ["--data", str(data), "--scale", "smoke", "--work", str(tmp_path / "work"), "--processes", "2"]
        subprocess.run(
            [sys.executable, "-m", "recipes.paper", *given, *more], check=True, cwd=Path(__file__).parents[2]
        )

    run("--figures", str(tmp_path / "figures"), "-o", str(tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    for family in FAMILIES:
        assert len(record["results"][family]["table_1"]) == 6
        assert all(row["seconds_per_sample"]["p50"] > 0 for row in record["results"][family]["table_1"])
    # Broken off and begun again: nothing is done twice, and the figures are the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    run("-o", str(tmp_path / "again.json"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    again = json.loads((tmp_path / "again.json").read_text())
    for family in FAMILIES:
        for one, other in zip(record["results"][family]["figure_5"], again["results"][family]["figure_5"], strict=True):
            assert one == other
