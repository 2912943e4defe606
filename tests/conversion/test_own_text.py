"""Conversions calibrated on text that the original model writes itself: the default where it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regroup
import texts
import tiny
from helpers import config_of, digests, edit_json, everything, refused, run
from regroup.calibration import own_text
from regroup.calibration.text import calibration_batches
from regroup.checkpoint import Checkpoint
from regroup.errors import RegroupError
from regroup.listener import Listener
from regroup.plans import OWN_TEXT_FILE, PLAN_FILE, RESULT_FILE, CalibrationText, Plan
from regroup.safe_text import command

OWN = "self:1024"  # 16 windows of as many tokens as the tiny models have positions
SMALL: dict[str, Any] = {"kv_heads": 2, "device": "cpu"}


class Noted(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ahead: list[Any] = []

    def notice(self, text: str) -> None:
        self.notes.append(text)

    def own_text(self, ahead: Any) -> None:
        self.ahead.append(ahead)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save("llama", tmp_path_factory.mktemp("own") / "parent")
    texts.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(parent: Path) -> Path:
    regroup.convert(parent, parent.parent / "converted", calibration=OWN, **SMALL)
    return parent.parent / "converted"


def biased(folder: Path, target: Path, change: Callable[[torch.Tensor], object]) -> Path:
    """A copy of a checkpoint with another output head."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    held = load_file(folder / "model.safetensors")
    change(held["lm_head.weight"])
    save_file(held, target / "model.safetensors", {"format": "pt"})
    return target


def test_the_default_of_auto_is_own_text(parent: Path, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regroup.plans.calibration.OWN_TOKENS", 1024)
    target = parent.parent / "by-default"
    listener = Noted()
    regroup.convert(parent, target, listener=listener, **SMALL)
    assert digests(target) == digests(converted)
    plan, result = Plan.load(target / PLAN_FILE), json.loads((target / RESULT_FILE).read_text())
    assert plan.calibration == CalibrationText(own=True, tokens=1024)
    lines = [json.loads(line) for line in (target / OWN_TEXT_FILE).read_text().splitlines()]
    assert len(lines) == result["calibration"]["self_written"]["rows"] == 16
    assert {len(line["input_ids"]) for line in lines} == {tiny.MAX_POSITIONS}
    assert all("text" in line for line in lines)
    assert [ahead.tokens for ahead in listener.ahead] == [1024]
    assert listener.ahead[0].calibration_seconds > 0


def test_a_plan_is_calibrated_by_default_too(
    parent: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is what a conversion with the same options records, made from headers; it makes the same model."""
    monkeypatch.setattr("regroup.plans.calibration.OWN_TOKENS", 1024)
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "open_sampler", lambda *_, **__: pytest.fail("sampled"))
        patch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("read a weight"))
        status, _, err = run("plan", parent, "--kv-heads", 2, "-o", tmp_path / "plan.json")
        assert status == 0, err
        seeded, _ = regroup.plan(parent, kv_heads=2, seed=1)
        weights, _ = regroup.plan(parent, kv_heads=2, calibration="none")
    made = Plan.load(tmp_path / "plan.json")
    assert made.dumps() == (converted / PLAN_FILE).read_text()
    regroup.convert(parent, tmp_path / "a", plan=tmp_path / "plan.json", device="cpu")
    assert digests(tmp_path / "a") == digests(converted)
    # Another seed writes another text, and without text there is another plan.
    assert seeded.calibration == CalibrationText(own=True, tokens=1024, seed=1)
    assert weights.calibration is None
    assert len({made.digest(), seeded.digest(), weights.digest()}) == 3


@pytest.mark.parametrize("said", ["none", "FILE", "self:512,FILE"])
def test_a_plan_makes_what_the_same_options_make(said: str, parent: Path, tmp_path: Path) -> None:
    text, plan = tmp_path / "text.txt", tmp_path / "elsewhere" / "plan.json"
    text.write_text(texts.TEXT * 4)
    sizes = () if said == "none" else ("--calibration-window", 32, "--calibration-batch", 2)
    words = ("--kv-heads", 2, "--calibration", said.replace("FILE", str(text)), *sizes)
    status, _, err = run("plan", parent, *words, "-o", plan)
    assert status == 0, err
    place = () if said == "none" else ("--calibration", text)
    assert command("convert", parent, "DST", plan=plan, calibration=text if place else None) in " ".join(err.split())
    assert run("convert", parent, tmp_path / "a", *words, "--device", "cpu")[0] == 0
    assert run("convert", parent, tmp_path / "b", "--plan", plan, *place, "--device", "cpu")[0] == 0
    assert plan.read_text() == (tmp_path / "a" / PLAN_FILE).read_text()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("method", ["mean", "first", "lowrank"])
def test_a_named_method_uses_the_weights_alone(parent: Path, tmp_path: Path, method: str) -> None:
    regroup.convert(parent, tmp_path / "a", method=method, **SMALL)
    assert not (tmp_path / "a" / OWN_TEXT_FILE).exists()
    assert Plan.load(tmp_path / "a" / PLAN_FILE).calibration is None


def test_the_kept_text_reproduces_the_conversion(parent: Path, converted: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"plan": converted / PLAN_FILE, "calibration": converted / OWN_TEXT_FILE, "device": "cpu"}
    regroup.convert(parent, tmp_path / "again", **given)
    assert digests(tmp_path / "again") == digests(converted)
    # The ids count, and not what they look like; other ids are another text.
    rows = [json.loads(line) for line in (converted / OWN_TEXT_FILE).read_text().splitlines()]
    for name, change in (("same", 0), ("other", 1)):
        altered = [{"input_ids": [row["input_ids"][0] + change, *row["input_ids"][1:]]} for row in rows]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in altered))
        others: dict[str, Any] = {**given, "calibration": tmp_path / name}
        regroup.convert(parent, tmp_path / f"by-{name}", **others)
        weights = [digests(folder)["model.safetensors"] for folder in (tmp_path / f"by-{name}", converted)]
        assert (weights[0] == weights[1]) == (name == "same")
    # Without the plan it is text like any other.
    regroup.convert(parent, tmp_path / "given", calibration=converted / OWN_TEXT_FILE, **SMALL)
    assert digests(tmp_path / "given")["model.safetensors"] == digests(converted)["model.safetensors"]


def test_the_text_need_not_be_kept(parent: Path, converted: Path, tmp_path: Path) -> None:
    regroup.convert(parent, tmp_path / "a", calibration=OWN, keep_calibration=False, **SMALL)
    assert not (tmp_path / "a" / OWN_TEXT_FILE).exists()
    record = json.loads((tmp_path / "a" / RESULT_FILE).read_text())["calibration"]["self_written"]
    kept = json.loads((converted / RESULT_FILE).read_text())["calibration"]["self_written"]
    assert record == kept | {"file": None}
    assert digests(tmp_path / "a")["model.safetensors"] == digests(converted)["model.safetensors"]


def test_a_dry_run_writes_no_text(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "open_sampler", lambda *_, **__: pytest.fail("sampled"))
    listener = Noted()
    done = regroup.convert(parent, tmp_path / "a", dry_run=True, listener=listener, **SMALL)
    assert done.destination is None
    assert [ahead.tokens for ahead in listener.ahead] == [16_384]
    assert everything(tmp_path) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_without_numbers_is_converted_by_its_weights(parent: Path, tmp_path: Path, value: float) -> None:
    broken = biased(parent, tmp_path / "broken", lambda head: head.fill_(value))
    listener = Noted()
    regroup.convert(broken, tmp_path / "a", calibration=OWN, listener=listener, **SMALL)
    regroup.convert(broken, tmp_path / "b", calibration="none", **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [note for note in listener.notes if "weights alone" in note and "NaN or infinity" in note]


def test_a_model_that_repeats_itself_is_converted_by_its_weights(parent: Path, tmp_path: Path) -> None:
    def repeat(head: torch.Tensor) -> None:
        head.mul_(1000)  # the likeliest token always: soon a circle

    broken = biased(parent, tmp_path / "broken", repeat)
    listener = Noted()
    regroup.convert(broken, tmp_path / "a", calibration=OWN, listener=listener, **SMALL)
    regroup.convert(broken, tmp_path / "b", calibration="none", **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [note for note in listener.notes if "repeats itself" in note or "end a text" in note]


def test_what_cannot_write_is_converted_by_its_weights(saved: Callable[[str], Path], tmp_path: Path) -> None:
    listener = Noted()
    regroup.convert(saved("whisper"), tmp_path / "a", listener=listener, kv_heads=3)
    regroup.convert(saved("whisper"), tmp_path / "b", calibration="none", kv_heads=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert any("speech" in note for note in listener.notes)
    listener = Noted()
    plan, _ = regroup.plan(saved("whisper"), listener=listener, kv_heads=3)
    assert plan.dumps() == (tmp_path / "b" / PLAN_FILE).read_text()
    assert any("speech" in note for note in listener.notes)
    with pytest.raises(RegroupError, match="writes itself"):
        regroup.plan(saved("whisper"), calibration="self", kv_heads=3)
    # Who asks for it is told.
    with pytest.raises(RegroupError, match="writes itself"):
        regroup.convert(saved("whisper"), tmp_path / "c", calibration="self", kv_heads=3)
    assert not (tmp_path / "c").exists()


def test_a_killed_conversion_does_not_write_its_text_again(
    parent: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("regroup.conversion.convert._calibrate", broken)
        with pytest.raises(KeyboardInterrupt):
            regroup.convert(parent, tmp_path / "a", calibration=OWN, **SMALL)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(own_text, "open_sampler", lambda *_, **__: pytest.fail("sampled again"))
    listener = Noted()
    regroup.convert(parent, tmp_path / "a", calibration=OWN, listener=listener, **SMALL)
    assert digests(tmp_path / "a") == digests(converted)
    assert any("resumes" in note for note in listener.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_own_and_given_text_in_turn(parent: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(texts.TEXT * 4)
    text = CalibrationText.parse(f"self:512,{tmp_path / 'text.txt'}")
    assert text is not None
    assert (text.own_tokens, text.tokens) == (512, 1024)
    config = config_of(parent)
    mixed = torch.cat([batch["input_ids"] for batch in calibration_batches(text, parent, config, device="cpu")])
    own = calibration_batches(replace(text, data=None, tokens=512), parent, config, device="cpu")
    given = calibration_batches(replace(text, own=False, tokens=512, window=64), parent, config)
    parts = [torch.cat([batch["input_ids"] for batch in batches]) for batches in (given, own)]
    assert torch.equal(mixed, torch.stack(parts, 1).flatten(0, 1))
    # Half of every batch is of each kind, of the held-out ones too.
    status, _, err = run(
        "convert", parent, tmp_path / "a", "--kv-heads", 2, "--calibration", f"self:512,{tmp_path / 'text.txt'}",
        "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    plan = Plan.load(tmp_path / "a" / PLAN_FILE)
    assert plan.calibration is not None
    assert plan.calibration.name == "self,text.txt"
    assert plan.calibration.sha256 is not None
    # The kept half and the given file reproduce it.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "plan.json").write_bytes((tmp_path / "a" / PLAN_FILE).read_bytes())
    (tmp_path / "b" / "text.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    kept = tmp_path / "a" / OWN_TEXT_FILE
    regroup.convert(parent, tmp_path / "c", plan=tmp_path / "b" / "plan.json", calibration=kept, device="cpu")
    assert digests(tmp_path / "c") == digests(tmp_path / "a")


def test_pairs_are_written_kept_and_reproduced(saved: Callable[[str], Path], tmp_path: Path) -> None:
    regroup.convert(saved("marian"), tmp_path / "a", kv_heads=3, calibration="self:600", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "a" / OWN_TEXT_FILE).read_text().splitlines()]
    assert all(line["input_ids"] and line["labels"] for line in lines)
    assert sum(len(line["labels"]) for line in lines) >= 600
    given: dict[str, Any] = {"plan": tmp_path / "a" / PLAN_FILE, "calibration": tmp_path / "a" / OWN_TEXT_FILE}
    regroup.convert(saved("marian"), tmp_path / "b", device="cpu", **given)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    # A decoder's text is no text of pairs.
    with pytest.raises(RegroupError, match="no calibration text of such a model"):
        regroup.convert(saved("llama"), tmp_path / "c", kv_heads=2, calibration=given["calibration"], device="cpu")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("none", None),
        ("self", CalibrationText(own=True, tokens=16_384)),
        ("self:16k", CalibrationText(own=True, tokens=16_000)),
        ("self,a,b.jsonl", CalibrationText("a,b.jsonl", own=True, tokens=32_768)),
        ("self:100,hf:name", CalibrationText("hf:name", own=True, tokens=200)),
        ("./self", CalibrationText("./self")),
        ("selfish.txt", CalibrationText("selfish.txt")),
    ],
)
def test_what_the_option_says(said: str, expected: CalibrationText | None) -> None:
    assert CalibrationText.parse(said) == expected


@pytest.mark.parametrize("said", ["self:", "self:0", "self:many", "self:-4", "self,"])
def test_what_the_option_cannot_say(said: str) -> None:
    with pytest.raises(RegroupError):
        CalibrationText.parse(said)


def test_a_plan_with_own_text(parent: Path, converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes((converted / PLAN_FILE).read_bytes())
    assert json.loads(path.read_text())["calibration"] == {
        "tokens": 1024, "window": 512, "document_starts": False, "seed": 0, "own": True,
    }  # fmt: skip
    # The weights alone, if that is said.
    regroup.convert(parent, tmp_path / "a", plan=path, calibration="none", device="cpu")
    regroup.convert(parent, tmp_path / "b", calibration="none", **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert "different calibration tokens" in refused(
        "convert", parent, tmp_path / "c", "--plan", path, "--calibration", "self:99"
    )
    edit_json(path, calibration={"own": True, "tokens": 1024, "written": "/etc/passwd"})
    assert "wrong type" in refused("convert", parent, tmp_path / "c", "--plan", path)
    # Plans without such text are hashed as before.
    assert "own" not in CalibrationText("text.txt").to_json()


def test_too_little_is_said_before_anything_is_written(parent: Path, tmp_path: Path) -> None:
    words = ("--kv-heads", 2, "--calibration", "self:64", "--device", "cpu")
    assert "too little calibration text" in refused("convert", parent, tmp_path / "a", *words)
    assert everything(tmp_path) == []
    assert "needs calibration text" in refused(
        "convert", parent, tmp_path / "a", "--kv-heads", 2, "--calibration", "none", "--repair", "output"
    )
