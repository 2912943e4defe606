"""A fault at every single call that changes the disk: the destination is absent or complete, and a rerun succeeds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import regroup
from helpers import config_of, copy, digests, everything, scattered, tensors, write
from regroup import RegroupError
from regroup.convert import resume
from regroup.planning import Listener

Saved = Callable[[str], Path]
METHODS = ("mean", "lowrank")
SHARD = "model-00002-of-00004.safetensors"


class Noted(Listener):
    """Keeps what is told; ``seen`` is called after every piece."""

    def __init__(self, seen: Callable[[int], Any] = lambda count: None) -> None:
        self.notes: list[str] = []
        self.written: list[int] = []
        self.seen = seen

    def notice(self, text: str) -> None:
        self.notes.append(text)

    def writing(self, nbytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        def count(done: int) -> None:
            self.written.append(done)
            self.seen(done)

        return contextlib.nullcontext(count)


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files take long on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def sharded(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers lie across four shards, with a tokenizer in a folder of its own. Shared."""
    state = tensors(saved("llama"))
    folder = tmp_path_factory.mktemp("faults") / "parent"
    write(folder, config_of(saved("llama")), state, shards=scattered(list(state)))
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def parent(sharded: Path, tmp_path: Path) -> Path:
    return copy(sharded, tmp_path / "parent")


@pytest.fixture(scope="module")
def expected(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The digests of undisturbed children, by method."""
    root = tmp_path_factory.mktemp("expected")
    return {name: digests(child(sharded, root / name, name)) for name in METHODS}


def child(source: Path, target: Path, method: str, listener: Listener | None = None) -> Path:
    regroup.convert_checkpoint(source, target, kv_heads=2, method=method, listener=listener)
    return target


KILLED = """
import json, sys
from pathlib import Path
import torch
import faults, regroup, regroup.pipeline

torch.set_num_threads(1)
source, root, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def run(number):
    regroup.convert_checkpoint(source, root / str(number) / "new" / "child", kv_heads=2, **options)

print(*faults.killed_at(json.loads(sys.argv[4]), run, root))
"""


def kill(source: Path, root: Path, numbers: Iterable[int], **options: Any) -> list[Path]:
    """The folders of conversions to new/child that were each killed before their n-th change of the disk."""
    arguments = [str(source), str(root), json.dumps(options), json.dumps(list(numbers))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return [root / number for number in done.stdout.split()]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_killed_before_any_change_of_the_disk(
    method: str, stride: int, sharded: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Then run again: the same bytes, nothing left over, and finished files are not made again."""
    resumed: list[int] = []
    for folder in kill(sharded, tmp_path, range(0, 1000, stride), method=method):
        target = folder / "new" / "child"
        if not target.parent.exists():
            continue
        names = faults.below(target.parent)
        if target.exists():
            assert digests(target) == expected[method]
            assert names == ["child"]
            continue
        assert len(names) < 2
        assert all(name.startswith(".child.regroup-") for name in names)
        kept: dict[str, int] = {}
        for journal in target.parent.glob(f"*/{resume.JOURNAL_FILE}"):
            finished = json.loads(journal.read_text())["finished"]
            kept = {name: (journal.parent / name).stat().st_ino for name in finished}
        listener = Noted()
        child(sharded, target, method, listener)
        assert digests(target) == expected[method]
        assert faults.below(target.parent) == ["child"]
        assert {name: (target / name).stat().st_ino for name in kept} == kept
        assert sum(listener.written) == sum(tensor.nbytes for tensor in tensors(target).values())
        if kept:
            assert f"{len(kept)} of 4 weight files are finished" in listener.notes[0]
        resumed.append(len(kept))
    # The threads' calls do not come in the same order each time.
    assert len(set(resumed)) > (2 if stride > 1 else 4)


def test_killed_while_pickles_are_read(saved: Saved, tmp_path: Path) -> None:
    source, root = tmp_path / "pickled", tmp_path / "runs"
    source.mkdir()
    root.mkdir()
    torch.save(tensors(saved("opt")), source / "pytorch_model.bin")
    shutil.copy(saved("opt") / "config.json", source)
    options: dict[str, Any] = {"allow_pickle": True, "method": "mean"}
    folders = kill(source, root, (2, 12), **options)
    assert len(folders) == 2
    for folder in folders:
        names = faults.below(folder / "new")
        assert ".regroup-pickle-" in {name[:16] for name in names}
        assert all(name.startswith((".regroup-pickle-", ".child.regroup-")) for name in names)
        listener = Noted()
        regroup.convert_checkpoint(source, folder / "new" / "child", kv_heads=2, listener=listener, **options)
        # The copy is as old as the pickle, so that this goes on where it was.
        assert not any("source has changed" in note for note in listener.notes)
        assert faults.below(folder / "new") == ["child"]


def count_changes(source: Path, target: Path, method: str) -> int:
    with faults.at_call(-1, faults.die) as calls:
        child(source, target, method)
    return len(calls.names)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.__getitem__)
def test_an_error_at_any_change_of_the_disk(
    number: int, sharded: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    words = "disk became full" if number == errno.ENOSPC else os.strerror(number)
    refusals = 0
    for at in range(count_changes(sharded, tmp_path / "counted", "mean")):
        target = tmp_path / str(at) / "new" / "child"
        (tmp_path / str(at)).mkdir()
        with faults.at_call(at, faults.fail(number)):
            message = refusal(sharded, target)
        if target.exists():
            assert digests(target) == expected["mean"]
            assert faults.below(target.parent) == ["child"]
            assert message is None or "the result is complete, but" in message
        else:
            assert message is not None
            assert [word for word in (words, "file:", "remedy:") if word not in message] == []
            assert everything(tmp_path / str(at)) == []
            refusals += 1
    assert refusals > 30


def refusal(source: Path, target: Path) -> str | None:
    """The message of a conversion that is refused, or None; any other exception is one too many."""
    try:
        child(source, target, "mean")
    except RegroupError as error:
        return str(error)
    return None
