"""Pickled weights: refused, then read with torch's restricted unpickler where that is asked for, and never run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regroup
from helpers import (
    assert_same_tensors,
    config_of,
    copy,
    digests,
    refused,
    run,
    scattered,
    tensors,
)
from regroup import RegroupError

Saved = Callable[[str], Path]


class Malice:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def pickled(saved: Saved, tmp_path: Path) -> Path:
    folder = copy(saved("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(tensors(saved("llama")), folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_unless_asked_for(pickled: Path, saved: Saved, tmp_path: Path) -> None:
    message = refused("convert", pickled, tmp_path / "converted", "--kv-heads", 2, "--calibration", "none")
    for word in ("pytorch_model.bin", "expected:", "--allow-pickle", "safetensors revision"):
        assert word in message
    assert not (tmp_path / "converted").exists()
    regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")
    regroup.convert(saved("llama"), tmp_path / "expected", kv_heads=2, calibration="none")
    assert_same_tensors(tensors(tmp_path / "converted"), tensors(tmp_path / "expected"))
    assert config_of(tmp_path / "converted") == config_of(tmp_path / "expected")
    assert not list((tmp_path / "converted").glob("*.bin"))
    assert run("plan", pickled, "--kv-heads", 2, "--allow-pickle")[0] == 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_sharded_and_legacy_pickles(zipped: bool, pickled: Path, saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved("llama"))
    (pickled / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, names in enumerate(scattered(list(state)).values()):
        file = f"pytorch_model-{number}.bin"
        torch.save({k: state[k] for k in names}, pickled / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(names, file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = digests(pickled)
    regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")
    regroup.convert(saved("llama"), tmp_path / "expected", kv_heads=2, calibration="none")
    assert_same_tensors(tensors(tmp_path / "converted"), tensors(tmp_path / "expected"))
    assert digests(pickled) == before


def test_tied_tensors_get_bytes_of_their_own(pickled: Path, saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved("llama"))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, pickled / "pytorch_model.bin")
    regroup.convert(pickled, tmp_path / "converted", kv_heads=6, allow_pickle=True, calibration="none")
    assert_same_tensors(tensors(tmp_path / "converted"), state)


def test_a_malicious_pickle_does_not_run(pickled: Path, saved: Saved, tmp_path: Path) -> None:
    marker, file = tmp_path / "it-ran", pickled / "pytorch_model.bin"
    torch.save({**tensors(saved("llama")), "x": Malice(marker)}, file)
    for flags in ([], ["--allow-pickle"]):
        message = refused("convert", pickled, tmp_path / "converted", "--kv-heads", 2, "--calibration", "none", *flags)
        assert "pytorch_model.bin" in message
        assert not marker.exists()
    assert not (tmp_path / "converted").exists()
    torch.load(file, weights_only=False)  # the pickle works
    assert marker.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80", b"PK\x03\x04", b"garbage" * 99, b"\x80\x02}q\x00.", b"\x80\x02K\x05.", b"I1\nR.", b"(", b"0."),
        b"\x80\x02cbuiltins\neval\n.",
    ],
)
def test_damaged_pickles_are_refused(content: bytes, pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(RegroupError, match=r"pickled weights|no attention layer"):
        regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")


def test_a_pickle_cut_short_is_refused(pickled: Path, tmp_path: Path) -> None:
    file = pickled / "pytorch_model.bin"
    whole = file.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 100):
        file.write_bytes(whole[:length])
        with pytest.raises(RegroupError, match="pickled weights"):
            regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": 1}, {"a": {"b": torch.ones(2)}}, {1: torch.ones(2)}])
def test_other_contents_are_refused(value: Any, pickled: Path, tmp_path: Path) -> None:
    torch.save(value, pickled / "pytorch_model.bin")
    with pytest.raises(RegroupError, match="table of tensors"):
        regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")


@pytest.mark.parametrize("target", ["../x.bin", "/etc/x.bin", "sub/x.bin", 7, None, ["x.bin"], "", "absent.bin"])
def test_an_index_of_pickles_stays_in_its_folder(target: object, pickled: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": target, "x": "pytorch_model.bin"}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(RegroupError):
        regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")


def test_links_and_destinations_are_checked_as_without_pickles(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match="inside the source"):
        regroup.convert(pickled, pickled / "converted", kv_heads=2, allow_pickle=True, calibration="none")
    assert "inside the source" in refused(
        "convert", pickled, pickled / "converted", "--kv-heads", 2, "--allow-pickle", "--calibration", "none"
    )
    (pickled / "words").mkdir()
    (pickled / "words" / "list.txt").write_text("a b")
    regroup.convert(pickled, tmp_path / "converted", kv_heads=2, allow_pickle=True, calibration="none")
    assert (tmp_path / "converted" / "words" / "list.txt").read_text() == "a b"
    (tmp_path / "secret.txt").write_text("secret")
    (pickled / "note.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RegroupError, match="points out of it"):
        regroup.convert(pickled, tmp_path / "child2", kv_heads=2, allow_pickle=True, calibration="none")


@pytest.fixture
def shop_pickled(shop: Path, tmp_path: Path) -> Path:
    """The shop's original model with its weights pickled, in two shards."""
    folder = copy(shop / "parent", tmp_path / "original")
    state = tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_every_command_reads_a_pickled_original(shop: Path, shop_pickled: Path, tmp_path: Path) -> None:
    before = digests(shop_pickled)
    converted, text, original = tmp_path / "converted", shop / "held-out.txt", shop / "parent"
    plain, pickled = run("inspect", original, "--json")[1], run("inspect", shop_pickled, "--json", "--allow-pickle")[1]
    found = [json.loads(found) | {"source": ""} for found in (plain, pickled)]
    assert found[0] == found[1]
    assert run("convert", shop_pickled, converted, "--kv-heads", 2, "--method", "mean", "--allow-pickle")[0] == 0
    # Names that other tools look for.
    assert sorted(file.name for file in converted.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for command in (
        ("inspect", shop_pickled, "--similarity", "-o", tmp_path / "plots"),
        ("verify", shop_pickled, converted),
        ("evaluate", converted, "--teacher", shop_pickled, "--data", text, "--windows", 2, "--window", 16),
        ("plan", shop_pickled, "--kv-heads", 2),
        ("export", shop_pickled, tmp_path / "copy", "--to", "hf"),
        ("advise", shop_pickled, "--hardware", "l4", "--context", 32, "--batch", 1),
        ("bench", "decode", shop_pickled, "--prompt", 8, "--new", 2, "--dry-run"),
    ):
        status, out, message = run(*command, "--allow-pickle")
        assert status == 0, (command, out, message)
        if command[0] in ("verify", "evaluate", "plan", "export") or "--similarity" in command:
            assert "pickled weights only" in refused(*command), command
            assert "--allow-pickle" in refused(*command)
    assert_same_tensors(tensors(tmp_path / "copy"), tensors(original))
    assert digests(shop_pickled) == before


def test_records_name_the_original_and_not_the_copy(shop: Path, shop_pickled: Path, tmp_path: Path) -> None:
    flags = ("--data", shop / "held-out.txt", "--windows", 2, "--window", 16, "--json")
    records = [
        json.loads(run("evaluate", folder, "--teacher", folder, *flags, "--allow-pickle")[1])
        for folder in (shop / "parent", shop_pickled)
    ]
    assert records[0]["results"] == records[1]["results"]
    assert records[1]["configuration"]["model"] == records[1]["configuration"]["teacher"] == str(shop_pickled)


def test_uptraining_asks_for_a_copy_of_a_pickled_teacher(shop: Path, shop_pickled: Path, tmp_path: Path) -> None:
    flags = ("--data", shop / "held-out.txt", "--steps", 2, "-o", tmp_path / "run", "--window", 16)
    message = refused("uptrain", shop / "child", "--teacher", shop_pickled, *flags)
    assert "regroup export FOLDER COPY --to hf --allow-pickle" in message
    assert run("export", shop_pickled, tmp_path / "copy", "--to", "hf", "--allow-pickle")[0] == 0
    assert run("uptrain", shop / "child", "--teacher", tmp_path / "copy", *flags, "--dry-run")[0] == 0


def test_a_shard_that_is_missing_or_a_pointer(shop_pickled: Path, tmp_path: Path) -> None:
    shard = shop_pickled / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = refused(
        "convert", shop_pickled, tmp_path / "out", "--kv-heads", 2, "--allow-pickle", "--calibration", "none"
    )
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message
    assert shard.name in message
    shard.unlink()
    message = refused(
        "convert", shop_pickled, tmp_path / "out", "--kv-heads", 2, "--allow-pickle", "--calibration", "none"
    )
    assert "a shard of the checkpoint is missing" in message
    assert shard.name in message
    assert not (tmp_path / "out").exists()
