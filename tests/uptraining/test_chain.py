"""``regroup convert --uptrain``: conversion and uptraining as one command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import runs
import texts
from helpers import everything, refused, run, tensors

RECIPE = "steps: 4\nwindow: 32\nbatch-size: 8\nlearning-rate: 1e-3\nreport-to: []\ndevice: cpu\nsave-every: 2\n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    runs.pair(tmp_path)
    runs.text(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE + f"data: ['{tmp_path / 'train.txt'}']\n")
    return tmp_path


def options(shop: Path, *more: object) -> list[object]:
    return [
        shop / "parent",
        shop / "dst",
        "--kv-heads",
        1,
        "--calibration",
        "none",
        "--uptrain",
        shop / "recipe.yaml",
        *more,
    ]


def test_the_result_is_what_two_commands_give(shop: Path) -> None:
    status, _, message = run("convert", *options(shop))
    assert status == 0, message
    assert (shop / "dst.uptraining/run/record.json").is_file()
    assert not (shop / "dst.uptraining/converted").exists()
    AutoModelForCausalLM.from_pretrained(shop / "dst")

    assert run("convert", shop / "parent", shop / "alone", "--kv-heads", 1, "--calibration", "none")[0] == 0
    given = ("--recipe", shop / "recipe.yaml", "--teacher", shop / "parent", "-o", shop / "by-hand")
    status, _, message = run("uptrain", shop / "alone", *given)
    assert status == 0, message
    found, expected, before = tensors(shop / "dst"), tensors(shop / "by-hand/model"), tensors(shop / "alone")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in before.items())


def test_without_a_teacher_it_learns_something_else(shop: Path) -> None:
    assert run("convert", *options(shop))[0] == 0
    distilled = tensors(shop / "dst")
    (shop / "dst").rename(shop / "first")
    (shop / "dst.uptraining").rename(shop / "first.uptraining")
    with (shop / "recipe.yaml").open("a") as file:
        file.write("teacher: null\n")
    assert run("convert", *options(shop))[0] == 0
    assert any(not torch.equal(tensors(shop / "dst")[name], value) for name, value in distilled.items())


def test_it_resumes_where_it_was_broken_off(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("regroup.uptraining.chain.uptrain", broken)
        assert run("convert", *options(shop))[0] == 2
    assert not (shop / "dst").exists()
    kept = everything(shop / "dst.uptraining/converted")
    assert kept
    message = refused("convert", *options(shop, "--method", "mean"))
    assert "begun and not finished" in message
    with monkeypatch.context() as patch:
        # What is converted is not converted again.
        patch.setattr("regroup.conversion.convert.convert", broken)
        status, _, message = run("convert", *options(shop))
    assert status == 0, message
    assert (shop / "dst/config.json").is_file()


@pytest.mark.parametrize("edited", ["plan.json", "text.txt"])
def test_an_edited_plan_or_text_is_another_conversion(shop: Path, monkeypatch: pytest.MonkeyPatch, edited: str) -> None:
    asked = ["convert", shop / "parent", shop / "dst", "--uptrain", shop / "recipe.yaml"]
    if edited == "plan.json":
        assert run("plan", shop / "parent", "--kv-heads", 1, "--method", "mean", "-o", shop / edited)[0] == 0
        asked += ["--plan", shop / edited]
    else:
        (shop / edited).write_text(texts.TEXT)
        given = ("--calibration-window", 32, "--calibration-tokens", 512, "--device", "cpu")
        asked += ["--kv-heads", 1, "--calibration", shop / edited, *given]

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("regroup.uptraining.chain.uptrain", broken)
        assert run(*asked)[0] == 2
        before = (shop / edited).read_text()
        (shop / edited).write_text(before.replace('"mean"', '"first"') if edited == "plan.json" else before + "More.\n")
        assert "begun and not finished" in refused(*asked)
        (shop / edited).write_text(before)
        # The same source by another name is no other conversion.
        patch.chdir(shop)
        patch.setattr("regroup.conversion.convert.convert", lambda *_, **__: pytest.fail("converted again"))
        status, _, message = run("convert", "parent", *asked[2:])
        assert status == 2
        assert "begun and not finished" not in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model: x", "model and output out"),
        ("stepz: 3", "steps"),
        ("held-out: [", "YAML"),
        ("data: [absent.txt]", "absent.txt"),
        ("held-out: absent.txt", "absent.txt"),
        ("teacher: ./absent", "absent"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_wrong_recipe_is_refused_before_anything_is_converted(
    shop: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str, more: tuple[str, ...]
) -> None:
    with (shop / "recipe.yaml").open("a") as file:
        file.write(line + "\n")
    before = everything(shop)
    monkeypatch.setattr("regroup.conversion.convert.convert", lambda *_, **__: pytest.fail("converted"))
    assert words in refused("convert", *options(shop, *more))
    assert everything(shop) == before


def test_a_dry_run_looks_at_the_recipe_and_the_conversion(shop: Path) -> None:
    before = everything(shop)
    status, _, message = run("convert", *options(shop, "--dry-run"))
    assert status == 0, message
    assert "nothing was written" in message
    assert "got:      4" in refused("convert", *options(shop, "--dry-run", "--kv-heads", 4))
    (shop / "recipe.yaml").rename(shop / "moved.yaml")
    assert "recipe.yaml" in refused("convert", *options(shop, "--dry-run"))
    (shop / "moved.yaml").rename(shop / "recipe.yaml")
    assert everything(shop) == before


def test_a_refused_conversion_leaves_nothing_behind(shop: Path) -> None:
    before = everything(shop)
    refused("convert", *options(shop, "--kv-heads", 4))
    elsewhere = ("--kv-heads", 4, "--uptrain", shop / "recipe.yaml")
    refused("convert", shop / "parent", shop / "new/folder/dst", *elsewhere)
    assert everything(shop) == before
