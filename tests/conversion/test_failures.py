"""Destinations that cannot be written and runs that are cut short: refused, and nothing left that looks complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regroup
from helpers import assert_same_tensors, convert_heads, digests, everything, head_map, refused, tensors, write
from regroup import RegroupError
from regroup.checkpoint import stage, staged_folder
from regroup.checkpoint.writer import ShardFile
from regroup.listener import Listener

Saved = Callable[[str], Path]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def parent(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("llama"), tmp_path / "parent"))


class Watching(Listener):
    """Calls something after every piece that is written."""

    def __init__(self, seen: Callable[[int], Any]) -> None:
        self.seen = seen

    def writing(self, nbytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(self.seen)


def refuse_both(parent: Path, target: Path, *words: str) -> None:
    """The function and the command both refuse, with these words, and leave the disk as it was."""
    root = parent.parent
    before = everything(root)
    with pytest.raises(RegroupError) as error:
        regroup.convert(parent, target, kv_heads=2, calibration="none")
    message = refused("convert", parent, target, "--kv-heads", 2, "--calibration", "none")
    for text in (str(error.value), message):
        assert [word for word in words if word not in text] == [], text
    assert everything(root) == before


def test_destination_exists(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "dangling", "parent"):
        refuse_both(parent, tmp_path / name, "exists already", "file:", "expected:", "remedy:")


def test_destination_inside_the_source(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(parent)
    (parent / "sub").mkdir()
    for target in (parent / "child", parent / "sub" / "child", tmp_path / "link" / "child", parent / "new" / "child"):
        refuse_both(parent, target, "inside the source", "remedy:")
    regroup.convert(
        parent, tmp_path / "parent-2", kv_heads=2, calibration="none"
    )  # a name that begins alike is outside


def test_destination_below_a_file(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refuse_both(parent, tmp_path / "file" / "child", "is a file")


def test_destination_that_cannot_be_written(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **kw: mode != os.W_OK and real(path, mode, **kw))
    refuse_both(parent, tmp_path / "child", "cannot be written to", "file:")


def test_a_system_that_refuses_the_folder(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdtemp(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(stage.tempfile, "mkdtemp", mkdtemp)
    assert "Permission denied" in refused(
        "convert", parent, tmp_path / "new" / "child", "--kv-heads", 2, "--calibration", "none"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_too_little_disk(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regroup.convert(parent, tmp_path / "measure", kv_heads=2, calibration="none")
    needed = sum(tensor.nbytes for tensor in tensors(tmp_path / "measure").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed, 1, needed - 1))
    refuse_both(parent, tmp_path / "child", "too little room", "expected:", "got:", "remedy:")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * needed, 1, 2 * needed))
    regroup.convert(parent, tmp_path / "child", kv_heads=2, calibration="none")


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> list[str]:
    """Let ``count`` writes of weights through, and fail every one that follows; the list names the calls."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., int]:
        real = getattr(os, name)

        def call(*arguments: Any) -> int:
            calls.append(name)
            if len(calls) > count:
                raise error
            return real(*arguments)

        return call

    for name in ("pwrite", "copy_file_range"):
        monkeypatch.setattr(os, name, counted(name))
    return calls


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_a_disk_that_fills_up(
    count: int, workers: int, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        calls = fail_after(patch, count, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(RegroupError, match=r"disk became full[\s\S]*remedy"):
            regroup.convert(parent, tmp_path / "new" / "child", kv_heads=2, workers=workers, calibration="none")
        assert len(calls) > count
        assert "disk became full" in refused(
            "convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none"
        )
    assert everything(tmp_path) == before
    regroup.convert(parent, tmp_path / "child", kv_heads=2, calibration="none")


@pytest.mark.parametrize("name", ["fsync", "pwrite"])
def test_a_disk_that_fails(name: str, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    before = everything(tmp_path)
    monkeypatch.setattr(os, name, fail)
    assert "Input/output error" in refused(
        "convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none"
    )
    assert everything(tmp_path) == before


@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupt_between_two_writes(
    count: int, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path)
    fail_after(monkeypatch, count, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        regroup.convert(parent, tmp_path / "child", kv_heads=2, calibration="none")
    assert "interrupted; no incomplete result was left" in refused(
        "convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none"
    )
    assert everything(tmp_path) == before


def test_an_interrupt_by_a_signal(parent: Path, tmp_path: Path) -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = everything(tmp_path)
    once = iter([signal.SIGINT])
    listener = Watching(lambda _: [os.kill(os.getpid(), number) for number in once])
    try:
        with pytest.raises(KeyboardInterrupt):
            regroup.convert(parent, tmp_path / "child", kv_heads=2, listener=listener, calibration="none")
    finally:
        signal.signal(signal.SIGINT, ours)
    assert everything(tmp_path) == before


def test_copying_falls_back_where_the_kernel_cannot(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regroup.convert(parent, tmp_path / "expected", kv_heads=2, calibration="none")

    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    regroup.convert(parent, tmp_path / "one", kv_heads=2, calibration="none")
    monkeypatch.delattr(os, "copy_file_range")
    regroup.convert(parent, tmp_path / "two", kv_heads=2, calibration="none")
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "expected")


def test_short_writes_and_reads_are_continued(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regroup.convert(parent, tmp_path / "expected", kv_heads=2, calibration="none")
    write_some, copy_some, read_some = os.pwrite, os.copy_file_range, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write_some(fd, data[:1000], at))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *at: copy_some(a, b, min(n, 777), *at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read_some(fd, [views[0][:999]], at))
    regroup.convert(parent, tmp_path / "child", kv_heads=2, calibration="none")
    assert digests(tmp_path / "child") == digests(tmp_path / "expected")


def test_a_destination_that_appears_meanwhile(parent: Path, tmp_path: Path) -> None:
    def appear(_: int) -> None:
        (tmp_path / "child").mkdir(exist_ok=True)
        (tmp_path / "child" / "theirs").write_text("x")

    with pytest.raises(RegroupError, match="appeared"):
        regroup.convert(parent, tmp_path / "child", kv_heads=2, listener=Watching(appear), calibration="none")
    assert everything(tmp_path / "child") == ["theirs"]
    assert not list(tmp_path.glob(".child*"))


def test_the_destination_appears_last_and_the_config_in_it(parent: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(_: int) -> None:
        assert not (tmp_path / "child").exists()
        seen.append([path.name for stage in tmp_path.glob(".child*") for path in stage.iterdir()])

    regroup.convert(parent, tmp_path / "child", kv_heads=2, listener=Watching(look), calibration="none")
    assert seen
    assert all("model.safetensors" in names and "config.json" not in names for names in seen)


def test_stale_stages_go_and_live_ones_stay(tmp_path: Path) -> None:
    def work(live: Path) -> None:
        stale = tmp_path / ".child.regroup-stale"
        stale.mkdir()
        (stale / "model.safetensors").write_text("x")
        (tmp_path / ".child2.regroup-other").mkdir()
        with staged_folder(tmp_path / "child") as second:
            assert live.exists()
            assert not stale.exists()
            (second / "a").write_text("second")
        assert (tmp_path / "child" / "a").read_text() == "second"

    with pytest.raises(RegroupError, match="appeared"), staged_folder(tmp_path / "child") as live:
        work(live)
    assert not live.exists()
    assert (tmp_path / "child" / "a").read_text() == "second"
    assert (tmp_path / ".child2.regroup-other").exists()


def test_folders_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many may write, anybody can leave a folder that looks like that of a killed run."""
    left = tmp_path / ".child.regroup-stale"
    left.mkdir()
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    assert stage.left_behind(tmp_path / "child") == []
    with staged_folder(tmp_path / "child", adopt=lambda folder: pytest.fail(f"adopted {folder}")):
        assert left.exists()
    assert left.exists()
    monkeypatch.undo()
    assert stage.left_behind(tmp_path / "child") == [left]
    with staged_folder(tmp_path / "again"), staged_folder(tmp_path / "child2", adopt=lambda folder: True):
        assert left.exists()


def test_a_shard_file_takes_exact_bytes_in_any_order(tmp_path: Path) -> None:
    values = {"a": torch.arange(3, dtype=torch.float32), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    file = ShardFile(tmp_path / "x.safetensors", {"a": ("F32", (3,)), "b": ("BF16", (2, 2))}, {"format": "pt"})
    for name in ("b", "a"):
        file.write(name, values[name])
    with pytest.raises(AssertionError, match="bytes for a place"):
        file.write("a", torch.zeros(4))
    file.close()
    file.close()
    assert_same_tensors(tensors(tmp_path), values)
    with pytest.raises(FileExistsError):
        ShardFile(tmp_path / "x.safetensors", {}, {})


SLOW_CONVERSION = """
import os, sys, time
from regroup.cli import main
real = os.pwrite
def slow(*arguments):
    time.sleep(0.05)
    return real(*arguments)
os.pwrite = slow
sys.argv = ["regroup", "convert", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_run_stopped_from_outside(number: signal.Signals, tmp_path: Path) -> None:
    import tiny

    parent = tiny.build("llama")
    config = parent.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 40}
    state = {k: v for k, v in parent.state_dict().items() if "layers" not in k}
    for i in range(40):
        state |= {
            k.replace("layers.0", f"layers.{i}"): v.clone() for k, v in parent.state_dict().items() if "layers.0" in k
        }
    write(tmp_path / "parent", config, state)
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", SLOW_CONVERSION, str(tmp_path / "parent"), str(tmp_path / "child")),
            *("--kv-heads", "2", "--method", "mean"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, Ctrl-C is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".child*/model.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert not (tmp_path / "child").exists()
    assert [path.parent.name for path in tmp_path.rglob("config.json")] == ["parent"]
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".child*"))) == 1
    else:
        assert process.returncode == 2
        assert "interrupted; no incomplete result was left" in message
        assert "Traceback" not in message
        assert not list(tmp_path.glob(".child*"))
    regroup.convert(tmp_path / "parent", tmp_path / "child", kv_heads=2, method="mean")
    assert not list(tmp_path.glob(".child*"))


def test_a_conversion_by_parts_is_checked_too(saved: Saved, tmp_path: Path) -> None:
    heads = head_map("llama", "some")
    convert_heads(saved("llama"), tmp_path / "child", heads)
    with pytest.raises(RegroupError, match="exists already"):
        convert_heads(saved("llama"), tmp_path / "child", heads)
