"""Training on text that the teacher writes: the same for the same seed, sampled once, never what is held out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from helpers import assert_same_tensors, tensors
from regroup.errors import RegroupError
from regroup.modeling import load_tokenizer
from regroup.uptraining import own_text
from regroup.uptraining.objective import make_objective
from regroup.uptraining.own_text import SampledWindows
from regroup.uptraining.recipe import Recipe
from regroup.uptraining.run import uptrain
from regroup.uptraining.sampled import with_length
from regroup.uptraining.stream import ExampleStream, open_stream

WINDOW = 8


def counted(folder: Path, limit: int | None = None) -> tuple[SampledWindows, list[tuple[int, int]]]:
    """Own text whose window n is n, n, …, and what was asked of its sampler."""
    asked: list[tuple[int, int]] = []

    def sample(first: int, count: int) -> np.ndarray:
        asked.append((first, count))
        return np.arange(first, first + count)[:, None].repeat(WINDOW, 1) % 96

    return SampledWindows(sample, WINDOW, 0, folder, limit), asked


def opened(shop: Path, own: SampledWindows | None, files: tuple[str, ...] = (), **settings: Any) -> ExampleStream:
    tokenizer = load_tokenizer(shop / "parent")
    objective = make_objective("causal", tokenizer, window=WINDOW, documents=True)
    given: dict[str, Any] = {"vocab_size": 96, "shuffle_buffer": 1, "own": own, **settings}
    return open_stream([str(shop / name) for name in files], tokenizer, objective, **given)


def numbers(stream: ExampleStream, steps: int, batch: int = 4) -> list[int]:
    """The last token of every row: of own text its number."""
    taken = stream.batches(batch)
    return [int(row) for _ in range(steps) for row in next(taken)["input_ids"][:, -1]]


def test_windows_come_in_their_order_and_are_sampled_as_they_are_reached(shop: Path, tmp_path: Path) -> None:
    own, asked = counted(tmp_path)
    assert numbers(opened(shop, own), 3) == list(range(12))
    assert asked == [(0, own_text.AHEAD)]
    again, asked = counted(tmp_path)
    # What lies there is used, by a later pass or a run that is continued.
    assert numbers(opened(shop, again), 20) == [number % 96 for number in range(80)]
    assert asked == [(own_text.AHEAD, own_text.AHEAD)]


def test_a_pass_ends_at_its_limit_and_the_next_one_reuses_it(shop: Path, tmp_path: Path) -> None:
    own, asked = counted(tmp_path)
    stream = opened(shop, own, limit=6, epochs=2)
    assert numbers(stream, 3) == [*range(6), *range(6)]
    assert (stream.pass_examples, len(asked)) == (6, 1)


def test_given_text_is_taken_in_turn(shop: Path, tmp_path: Path) -> None:
    own, _ = counted(tmp_path)
    alone = next(opened(shop, None, ("train.txt",)).batches(4))["input_ids"]
    mixed = next(opened(shop, own, ("train.txt",)).batches(8))["input_ids"]
    assert mixed[0::2, -1].tolist() == [0, 1, 2, 3]
    assert torch.equal(mixed[1::2], alone)


@pytest.mark.parametrize("files", [(), ("train.txt",)])
def test_a_stream_continues_where_its_state_stands(shop: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    whole = numbers(opened(shop, counted(tmp_path)[0], files, limit=10, epochs=3, shuffle_buffer=4), 6)
    first = opened(shop, counted(tmp_path)[0], files, limit=10, epochs=3, shuffle_buffer=4)
    begun = numbers(first, 3)
    rest = opened(shop, counted(tmp_path)[0], files, limit=10, epochs=3, shuffle_buffer=4)
    rest.load_state_dict(first.state_dict())
    assert begun + numbers(rest, 3) == whole
    other = opened(shop, counted(tmp_path)[0], files, limit=11, epochs=3, shuffle_buffer=4)
    with pytest.raises(RegroupError, match="another stream"):
        other.load_state_dict(first.state_dict())


def test_lengths_follow_from_unique_tokens_and_passes() -> None:
    def length(*data: str, **settings: Any) -> tuple[int | None, int | None]:
        recipe = Recipe("child", Path("out"), data, teacher="parent", objective="causal", **settings)
        found = with_length(recipe)
        return found.unique_tokens, found.tokens

    assert length("self:1k") == (1000, 1000)
    assert length("self:1k", epochs=4) == (1000, 4000)
    assert length("self:1k", "a.txt") == (2000, 2000)
    assert length("a.txt", unique_tokens=500, epochs=3) == (500, 1500)
    assert length("self:1k", tokens=100) == (1000, 100)
    assert length("self", tokens=100) == (None, 100)
    with pytest.raises(RegroupError, match="no second pass"):
        length("self", tokens=100, epochs=2)
    with pytest.raises(RegroupError, match="twice"):
        length("self", "self:1k")


def test_a_comma_mixes(shop: Path) -> None:
    given: dict[str, Any] = {"model": "m", "output": "o", "teacher": "t"}
    assert Recipe.load(data=["self:1k,a,b.txt"], **given).data == ("self:1k", "a,b.txt")
    assert Recipe.load(data=["a,b.txt"], **given).data == ("a,b.txt",)


def test_a_run_on_own_text(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "AHEAD", 8)
    settings = {"teacher": str(shop / "parent"), "data": ("self:512",), "steps": None, "epochs": 2, "held_out": "self"}
    settings |= {"held_out_windows": 4, "batch_size": 4, "optimizer": "muon", "save_every": 4}
    done = uptrain(runs.recipe(shop, output=tmp_path / "run", **settings))
    assert done.record is not None
    results = done.record["results"]
    assert (results["tokens"], results["unique_tokens"], results["passes"]) == (1024, 512, 2)
    rows = np.concatenate([np.load(path) for path in sorted((tmp_path / "run" / "own").glob("*.npy"))])
    assert rows.shape == (16, 32)
    assert results["own_text"]["sha256"] == hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    # The same text from the beginning, and the same weights.
    again = uptrain(runs.recipe(shop, output=tmp_path / "again", **settings))
    assert again.record is not None
    assert again.record["results"]["own_text"] == results["own_text"]
    assert_same_tensors(tensors(tmp_path / "run" / "model"), tensors(tmp_path / "again" / "model"))
    other = uptrain(runs.recipe(shop, output=tmp_path / "other", seed=1, **settings))
    assert other.record is not None
    assert other.record["results"]["own_text"]["sha256"] != results["own_text"]["sha256"]


def test_own_text_needs_a_teacher_that_is_a_decoder(shop: Path, tmp_path: Path) -> None:
    for source in ({"data": ("self:1k",)}, {"held_out": "self"}):
        with pytest.raises(RegroupError, match="no teacher to write"):
            uptrain(runs.recipe(shop, output=tmp_path / "run", **source))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_samples_nothing(shop: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(shop / "parent"), "data": ("self:1024",), "steps": None, "held_out": "self"}
    found = uptrain(runs.recipe(shop, output=tmp_path / "run", **settings), dry_run=True)
    assert any("1,024 unique tokens" in line for line in found.lines)
    assert not (tmp_path / "run").exists()
