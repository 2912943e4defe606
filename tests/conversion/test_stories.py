"""A real checkpoint, where it is at hand: heads repeated and taken back, and what the paper's mean costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import regroup
from helpers import assert_same_tensors, config_of, tensors, write
from regroup.calibration.text import CalibrationText
from regroup.data import token_windows
from regroup.evaluation import causal_batches, score
from regroup.evaluation.run import evaluate

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
STORIES = SHARED / "models" / "stories260k"
VALID = SHARED / "data" / "tinystories-valid.txt"
TRAIN = SHARED / "data" / "tinystories-train.txt"

pytestmark = pytest.mark.skipif(
    not (STORIES.is_dir() and VALID.is_file()),
    reason="the stories260k checkpoint and its text are not beside the project",
)


def test_repeated_heads_come_back_bit_for_bit(tmp_path: Path) -> None:
    config, state = config_of(STORIES), tensors(STORIES)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    size = config["hidden_size"] // 8
    repeated = {
        name: tensor.unflatten(0, (4, size)).repeat_interleave(2, 0).flatten(0, 1).contiguous()
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else tensor
        for name, tensor in state.items()
    }
    write(tmp_path / "eight", config | {"num_key_value_heads": 8}, repeated)
    regroup.convert(tmp_path / "eight", tmp_path / "four", kv_heads=4, method="mean")
    assert_same_tensors(tensors(tmp_path / "four"), state)
    assert config_of(tmp_path / "four") == config
    regroup.convert(tmp_path / "eight", tmp_path / "two", kv_heads=2, method="mean")
    regroup.convert(STORIES, tmp_path / "direct", kv_heads=2, method="mean")
    assert_same_tensors(tensors(tmp_path / "two"), tensors(tmp_path / "direct"))

    name = next(name for name in state if name.endswith("k_proj.weight"))
    repeated[name] = repeated[name].roll(size, 0)  # pairs that are not equal do not come back
    write(tmp_path / "rolled", config | {"num_key_value_heads": 8}, repeated)
    regroup.convert(tmp_path / "rolled", tmp_path / "other", kv_heads=4, method="mean")
    assert not torch.equal(tensors(tmp_path / "other")[name], state[name])


def split(path: Path) -> list[str]:
    """The stories of a file."""
    return re.split(r"\n\s*\n(?=Once upon a time|One day,)", path.read_text(encoding="utf-8"))


def test_what_the_mean_costs(tmp_path: Path) -> None:
    stories = split(VALID)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    windows, _ = token_windows(stories, tokenizer, length=256, limit=64, document_starts=True)
    assert windows.shape == (64, 256)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 64

    def nats(folder: Path) -> float:
        return score(regroup.load(folder, dtype=torch.float32), causal_batches(windows, 16)).nats_per_token

    parent = nats(STORIES)
    assert parent == pytest.approx(1.2553, abs=0.02)
    for groups, excess in ((2, 3.14), (1, 3.74)):
        regroup.convert(STORIES, tmp_path / str(groups), kv_heads=groups, method="mean")
        assert nats(tmp_path / str(groups)) - parent == pytest.approx(excess, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.is_file(), reason="the training text is not beside the project")
def test_auto_on_text_loses_to_no_single_method(tmp_path: Path) -> None:
    """On stories that calibration never saw; heads that belong together beat neighbours with either method."""
    for path in (TRAIN, VALID):
        rows = [json.dumps({"text": story}) for story in split(path)]
        (tmp_path / path.name).with_suffix(".jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = CalibrationText(tmp_path / "tinystories-train.jsonl", 32_768, 256, 8, document_starts=True)
    held_out = tmp_path / "tinystories-valid.jsonl"

    def nats(method: str, grouping: str | None) -> float:
        child = tmp_path / f"{method}-{grouping}"
        regroup.convert(STORIES, child, kv_heads=2, method=method, grouping=grouping, calibration=text)
        record = evaluate(str(child), held_out, window=256, windows=64, document_starts=True, dtype="float32")
        return record["results"]["nats_per_token"]

    lowrank, procrustes = nats("lowrank", "contiguous"), nats("procrustes", "contiguous")
    together = {"lowrank": nats("lowrank", "search"), "procrustes": nats("procrustes", "search")}
    auto, neighbours = nats("auto", None), nats("auto", "contiguous")
    # Far below a standard error; sums of floats need not be the same on every machine.
    slack = 0.002
    assert auto <= min(together.values()) + slack
    assert neighbours <= min(lowrank, procrustes) + slack
    assert auto < neighbours - 0.02
    assert together["lowrank"] < lowrank - 0.02
    assert together["procrustes"] < procrustes - 0.02
    # One of the two methods is worse, so that choosing is worth something; and the parent is better than all.
    assert procrustes > lowrank + 0.02
    parent = evaluate(str(STORIES), held_out, window=256, windows=64, document_starts=True, dtype="float32")
    assert parent["results"]["nats_per_token"] == pytest.approx(1.2553, abs=0.02)
    assert parent["results"]["nats_per_token"] < auto - 0.1
