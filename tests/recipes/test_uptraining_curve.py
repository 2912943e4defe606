"""The recipe of the uptraining table: choice of rates, means over seeds, stories, texts that do not overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import runs
import texts
from helpers import load_recipe


@pytest.mark.parametrize(("optimum", "wanted"), [(0.001, 0.001), (0.0003, 0.00025), (0.009, 0.008)])
def test_rates_are_tried_until_the_best_has_neighbours(
    optimum: float, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(rate - optimum)

    found = load_recipe("uptraining_curve", monkeypatch).best_rate([0.002, 0.001], loss)
    assert found == wanted
    assert {found / 2, found * 2} <= set(asked)


def test_rows_are_averaged_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = load_recipe("uptraining_curve", monkeypatch)
    same = {"way": "ours", "num_key_value_heads": 2, "asked": 100, "tokens": 128, "flops": 7}
    rows = [same | {"nats_per_token": loss} for loss in (2.0, 4.0)] + [same | {"asked": 200, "nats_per_token": 9.0}]
    first, second = curve.summarise(rows, 1.0)
    assert (first["excess_nats_per_token"], first["seeds"]) == (2.0, 2)
    assert first["standard_deviation"] == pytest.approx(2**0.5)
    assert (second["excess_nats_per_token"], second["standard_deviation"]) == (8.0, None)


def test_stories_end_at_their_mark_or_begin_with_an_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = load_recipe("stories", monkeypatch).stories
    assert stories("a b\n<|endoftext|>\nOne day,\n\nOne day, c\n<|endoftext|>\n") == ["a b", "One day,\n\nOne day, c"]
    assert stories("Once upon a time x\n\ny\n\nOne day, z") == ["Once upon a time x\n\ny", "One day, z"]


def test_the_whole_table_on_a_small_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = load_recipe("uptraining_curve", monkeypatch)
    original, _ = runs.pair(tmp_path)
    for name, times in (("train", 60), ("held", 12)):
        lines = (json.dumps({"text": f"{number} {texts.TEXT[:400]}"}) for number in range(times))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(curve, "CALIBRATION_TOKENS", 512)
    given: dict[str, Any] = {"kv_heads": "1", "tokens": "128,256", "rates": "0.001", "seeds": 2, "between_seeds": 1}
    given |= {"window": 32, "windows": 3, "batch": 2, "work": tmp_path / "work", "output": tmp_path / "record.json"}
    # With one rate to choose from, the best one would need neighbours.
    monkeypatch.setattr(curve, "best_rate", lambda choices, loss: min(choices, key=loss))
    curve.main(original, tmp_path / "train.jsonl", tmp_path / "held.jsonl", figure=tmp_path / "curve.png", **given)
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    table = record["results"]["table"]
    assert len(table) == 4 * 3
    assert {(row["way"], row["tokens"]): row["seeds"] for row in table if row["tokens"] == 256} == {
        (way.name, 256): 2 if number in (0, 3) else 1 for number, way in enumerate(curve.WAYS)
    }
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    calibration, train = (
        (tmp_path / f"work/{name}.jsonl").read_text().splitlines() for name in ("calibration", "train")
    )
    assert not set(calibration) & set(train)
    assert len(calibration) + len(train) == 60
    # A second call has everything already.
    monkeypatch.setattr(curve.Bench, "run", None)
    curve.main(original, tmp_path / "train.jsonl", tmp_path / "held.jsonl", **given)
