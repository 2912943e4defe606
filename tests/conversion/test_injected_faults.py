"""A fault at every single call that changes the disk: the destination is absent or complete, and a rerun succeeds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import regroup
from helpers import config_of, copy, digests, everything, refused, run, scattered, tensors, write
from regroup import RegroupError
from regroup.listener import Listener
from regroup.writer import journal as resume

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
    regroup.convert(source, target, kv_heads=2, method=method, listener=listener)
    return target


KILLED = """
import json, sys
from pathlib import Path
import torch
import faults, regroup, regroup.conversion.convert
from regroup.writer.preview import prepare
from regroup.opening import open_source
from regroup.plans import make_plan

torch.set_num_threads(1)
for line in sys.stdin:
    source, root, options, numbers = json.loads(line)
    # What the model's class needs is found out once, and known to the children.
    with open_source(source, allow_pickle=options.get("allow_pickle", False), scratch=Path(root)) as opened:
        prepare(opened.checkpoint, opened.layout, make_plan(opened.layout, kv_heads=options.get("kv_heads", 2)))

    def run(number):
        usual = {"kv_heads": 2, "calibration": "none"}
        regroup.convert(source, Path(root, str(number), "new", "child"), **{**usual, **options})

    print(json.dumps(faults.killed_at(numbers, run, Path(root))), flush=True)
"""
Kill = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    """The folders of conversions to new/child that were each killed before their n-th change of the disk.

    One process, which imports everything once and starts no thread, has the others as its children.
    """
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        ask, answers = process.stdin, process.stdout
        assert ask is not None
        assert answers is not None

        def killed(source: Path, root: Path, numbers: Iterable[int], **options: Any) -> list[Path]:
            print(json.dumps([str(source), str(root), options, list(numbers)]), file=ask, flush=True)
            answer = answers.readline()
            assert answer, "the process ended; what it said is above"
            return [root / str(number) for number in json.loads(answer)]

        yield killed
        ask.close()


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_killed_before_any_change_of_the_disk(
    method: str, stride: int, sharded: Path, expected: dict[str, dict[str, str]], tmp_path: Path, kill: Kill
) -> None:
    """Then run again: the same bytes, nothing left over, and finished files are not made again."""
    resumed: list[int] = []
    # After a fork, two threads that start to use torch at the same time can break its own pool of threads.
    workers = 1 if method == "lowrank" else 2
    for folder in kill(sharded, tmp_path, range(0, 1000, stride), method=method, workers=workers):
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


def test_killed_while_pickles_are_read(saved: Saved, tmp_path: Path, kill: Kill) -> None:
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
        regroup.convert(source, folder / "new" / "child", kv_heads=2, listener=listener, **options)
        # The copy is as old as the pickle, so that this goes on where it was.
        assert not any("source has changed" in note for note in listener.notes)
        assert faults.below(folder / "new") == ["child"]


def count_changes(source: Path, target: Path, method: str) -> int:
    with faults.at_call(-1, faults.die) as calls:
        child(source, target, method)
    return len(calls.names)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.__getitem__)
def test_an_error_at_any_change_of_the_disk(
    number: int, stride: int, sharded: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    words = "disk became full" if number == errno.ENOSPC else os.strerror(number)
    refusals = 0
    for at in range(0, count_changes(sharded, tmp_path / "counted", "mean"), stride):
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
    assert refusals > 30 / stride


def refusal(source: Path, target: Path) -> str | None:
    """The message of a conversion that is refused, or None; any other exception is one too many."""
    try:
        child(source, target, "mean")
    except RegroupError as error:
        return str(error)
    return None


def test_a_read_error_names_the_file(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the source's disk: whichever call meets it, nothing is left, and the message says where it was."""
    for name in faults.READS:
        reads: list[str] = []
        for at in range(100):
            calls = faults.Calls(faults.fail(errno.EIO), at)
            with monkeypatch.context() as patch:
                patch.setattr(os, name, calls.wrap(name, getattr(os, name)))
                if name == "pread":  # what is read where the kernel does not copy
                    patch.delattr(os, "copy_file_range")
                message = refusal(sharded, tmp_path / name / "child")
            if message is None:
                break
            words = ("a checkpoint file cannot be read", str(sharded / "model-0000"), "Input/output error", "remedy:")
            assert [word for word in words if word not in message] == [], message
            assert everything(tmp_path) == []
            reads.append(message)
        assert len(reads) > 3
        shutil.rmtree(tmp_path / name)


def test_a_copy_that_fails_at_the_source(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's copy does not say which of its two files failed."""

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "copy_file_range", broken)
    child(sharded, tmp_path / "sound", "mean")  # neither did: it is copied another way
    monkeypatch.setattr(os, "pread", broken)
    message = refused("convert", sharded, tmp_path / "child", "--kv-heads", 2, "--method", "mean")
    assert "a checkpoint file cannot be read" in message
    assert f"{sharded}/model-0000" in message
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", broken)
    message = refused("convert", sharded, tmp_path / "child", "--kv-heads", 2, "--method", "mean")
    assert f"{tmp_path}/.child.regroup-" in message
    assert faults.below(tmp_path) == ["sound"]


@pytest.mark.parametrize("method", METHODS)
def test_a_source_that_changes_while_it_is_read(method: str, parent: Path, tmp_path: Path) -> None:
    """Written over in place, in the same length: what was read before and after does not belong together."""
    shard = parent / SHARD
    raw = bytearray(shard.read_bytes())

    def write_over(_: int) -> None:
        raw[-1] ^= 1
        with shard.open("r+b") as file:
            file.write(raw)

    with pytest.raises(RegroupError, match="changed while it was read") as error:
        child(parent, tmp_path / "child", method, Noted(write_over))
    assert str(shard) in str(error.value)
    assert faults.below(tmp_path) == ["parent"]


def test_a_source_that_goes_away(parent: Path, tmp_path: Path) -> None:
    last = parent / "model-00004-of-00004.safetensors"
    with pytest.raises(RegroupError, match=last.name):
        child(parent, tmp_path / "child", "mean", Noted(lambda _: last.unlink(missing_ok=True)))
    assert faults.below(tmp_path) == ["parent"]


@pytest.fixture(scope="module")
def killed(sharded: Path, tmp_path_factory: pytest.TempPathFactory, kill: Kill) -> Path:
    """A folder in which a conversion to ``child`` by mean was killed with some of its files finished. Shared."""
    for folder in reversed(kill(sharded, tmp_path_factory.mktemp("killed"), range(30, 120, 6), method="mean")):
        for journal in folder.glob(f"new/*/{resume.JOURNAL_FILE}"):
            if 0 < len(json.loads(journal.read_text())["finished"]) < 4:
                return folder / "new"
    raise AssertionError("killed too early or too late")


@pytest.fixture
def half(killed: Path, tmp_path: Path) -> Path:
    return copy(killed, tmp_path / "half")


def test_what_was_finished_is_kept_for_the_same_work_alone(half: Path, sharded: Path, tmp_path: Path) -> None:
    parent = copy(sharded, tmp_path / "moved")  # with the same times
    runs: list[tuple[str, Callable[[Path], Any], str]] = [
        ("same", lambda folder: child(parent, folder / "child", "mean", told), "and it resumes from there"),
        ("plan", lambda folder: child(parent, folder / "child", "first", told), "it had another plan, so"),
        ("changed", lambda folder: child(parent, folder / "child", "mean", told), "the source has changed since, so"),
    ]
    for name, convert, words in runs:
        told = Noted()
        folder = Path(shutil.copytree(half, tmp_path / name))
        if name == "changed":
            os.utime(parent / SHARD)
        convert(folder)
        assert [words in note for note in told.notes] == [True]
        assert faults.below(folder) == ["child"]
    assert digests(tmp_path / "same" / "child") == digests(tmp_path / "changed" / "child")
    assert digests(tmp_path / "same" / "child") != digests(tmp_path / "plan" / "child")


def test_another_model_of_the_same_sizes_and_times_is_another(half: Path, sharded: Path, tmp_path: Path) -> None:
    parent = copy(sharded, tmp_path / "other")
    status = (parent / SHARD).stat()
    with (parent / SHARD).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(parent / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))
    told = Noted()
    child(parent, half / "child", "mean", told)
    assert "the source has changed since, so it starts anew" in told.notes[0]
    assert digests(half / "child") == digests(child(parent, tmp_path / "expected", "mean"))


def test_a_finished_file_that_is_damaged_is_made_again(half: Path, sharded: Path, expected: Any) -> None:
    (stage,) = half.iterdir()
    finished = json.loads((stage / resume.JOURNAL_FILE).read_text())["finished"]
    with (stage / finished[0]).open("r+b") as file:
        file.truncate(100)
    (stage / "left-over.json").write_text("{}")
    told = Noted()
    child(sharded, half / "child", "mean", told)
    assert f"{len(finished) - 1} of 4 weight files are finished" in told.notes[0]
    assert digests(half / "child") == expected["mean"]


def test_room_that_a_killed_run_takes_counts_as_free(
    half: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(half)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    taken = sum(path.lstat().st_blocks * 512 for path in half.rglob("*"))
    needed = sum(path.stat().st_size for path in sharded.rglob("*"))
    free = max(0, needed - taken)
    assert taken > 0
    with pytest.raises(RegroupError, match="too little room"):
        child(sharded, half.parent / "elsewhere", "mean")
    child(sharded, half / "child", "mean")


def test_a_search_is_not_made_twice(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: Kill) -> None:
    from regroup.conversion import convert as pipeline

    folders = kill(sharded, tmp_path, (40, 60), kv_heads=2)
    stages = [stage for folder in folders for stage in folder.glob(f"new/*/{resume.JOURNAL_FILE}")]
    regroup.convert(sharded, tmp_path / "expected", kv_heads=2, calibration="none")
    monkeypatch.setattr(pipeline, "grouped", lambda *_, **__: pytest.fail("searched again"))
    for journal in stages:
        regroup.convert(sharded, journal.parents[1] / "child", kv_heads=2, calibration="none")
        assert digests(journal.parents[1] / "child") == digests(tmp_path / "expected")
    assert stages


def test_a_disk_that_is_really_full(sharded: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    size = sum(path.stat().st_size for path in sharded.rglob("*"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", place], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:

        def fill(_: int) -> None:
            with contextlib.suppress(OSError), (place / "theirs").open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        with pytest.raises(RegroupError, match="disk became full; nothing was left behind"):
            child(sharded, place / "child", "mean", Noted(fill))
        assert faults.below(place) == ["theirs"]
        (place / "theirs").unlink()
        child(sharded, place / "child", "mean")
        assert faults.below(place) == ["child"]
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_dry_run_foretells_and_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    for method in METHODS:
        done = regroup.convert(sharded, tmp_path / "new" / "child", kv_heads=2, method=method, dry_run=True)
        ahead = done.estimate
        assert everything(tmp_path) == []
        assert ahead is not None
        written = sum(path.stat().st_size for path in child(sharded, tmp_path / "real", method).rglob("*.safetensors"))
        assert 0 < written - ahead.bytes_written < 4096 * 4  # headers
        assert ahead.probed == max(path.stat().st_size for path in sharded.glob("*.safetensors"))
        assert ahead.copy_seconds == pytest.approx(ahead.bytes_written / ahead.copy_rate)
        work = ahead.pool_seconds + ahead.solve_seconds
        assert 0 < work < ahead.seconds[1] == pytest.approx(ahead.copy_seconds + work)
        shutil.rmtree(tmp_path / "real")


def test_a_dry_run_says_what_it_foretells(sharded: Path, tmp_path: Path) -> None:
    status, _, message = run("convert", sharded, tmp_path / "child", "--kv-heads", 2, "--method", "mean", "--dry-run")
    assert status == 0
    assert [
        word for word in ("nothing was written", "to read", "to write", "free in", "time: ") if word not in message
    ] == []
