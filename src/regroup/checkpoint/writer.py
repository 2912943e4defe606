"""Writing a checkpoint folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import RegroupError
from .header import encode_header, nbytes_of

# Large enough to run at disk speed, small enough that two workers stay far below the memory goal.
COPY_BYTES = 8 << 20


class ShardFile:
    """A safetensors file of known content, written at any offset in any order.

    Args:
        path: the file to create.
        tensors: name to (safetensors dtype, shape), in the order of the data.
        metadata: the file's free-form metadata.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        header = encode_header(tensors, metadata)
        self.ranges: dict[str, tuple[int, int]] = {}
        position = len(header)
        for name, (dtype, shape) in tensors.items():
            end = position + nbytes_of(dtype, shape)
            self.ranges[name] = (position, end)
            position = end
        self.nbytes = position
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.truncate(self._fd, position)
        _write_all(self._fd, memoryview(header), 0)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write one tensor; its bytes must be exactly those that the header announces."""
        start, end = self.ranges[name]
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert data.nbytes == end - start, f"{name}: {data.nbytes} bytes for a place of {end - start}"
        _write_all(self._fd, data, start)

    def copy(self, source: Path, start: int, end: int, to: int) -> None:
        """Copy bytes ``start:end`` of another file to offset ``to``, inside the kernel where it can."""
        fd = os.open(source, os.O_RDONLY)
        try:
            while start < end:
                try:
                    count = os.copy_file_range(fd, self._fd, min(end - start, COPY_BYTES), start, to)
                except (AttributeError, OSError) as error:
                    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                        raise
                    block = os.pread(fd, min(end - start, COPY_BYTES), start)
                    _write_all(self._fd, memoryview(block), to)
                    count = len(block)
                if count == 0:
                    raise RegroupError(
                        "a checkpoint file became shorter while it was read",
                        file=source,
                        expected=f"{end} bytes",
                        got=f"{start} bytes",
                    )
                start, to = start + count, to + count
        finally:
            os.close(fd)

    def close(self, *, sync: bool = True) -> None:
        """Flush to the disk and close; harmless when repeated."""
        if self._fd >= 0:
            try:
                if sync:
                    os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_destination(destination: Path, source: Path | None, nbytes: int) -> None:
    """Refuse a destination that exists, lies inside the source, or does not fit on its disk.

    Args:
        destination: the folder to be made.
        source: the folder that is read, if it is local.
        nbytes: what will be written, in bytes.

    Raises:
        RegroupError: with the remedy.
    """
    if destination.exists() or destination.is_symlink():
        raise RegroupError(
            "the destination exists already",
            file=destination,
            expected="a folder that does not exist yet",
            remedy="choose another destination, or remove it first",
        )
    if source is not None:
        absolute, root = destination.absolute().resolve(), source.resolve()
        if absolute.is_relative_to(root):
            raise RegroupError(
                "the destination lies inside the source",
                file=destination,
                expected=f"a folder outside {source}",
                remedy="choose a destination beside the source",
            )
    parent = existing_parent(destination)
    if not os.access(parent, os.W_OK):
        raise RegroupError("the destination's folder cannot be written to", file=parent)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise RegroupError(
            "the disk has too little room for the result",
            file=parent,
            expected=f"{nbytes / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB free",
            remedy="free some space or choose a destination on another disk",
        )


@contextlib.contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside ``destination`` that becomes it, by one rename, when the block ends well.

    Whatever goes wrong, Ctrl-C included, removes it. A run that was killed outright leaves the hidden folder behind,
    without a config.json; the next run to the same destination removes it.
    """
    parent = destination.absolute().parent
    made = _make_parents(parent)
    prefix = f".{destination.name}.regroup-"
    _remove_stale(parent, prefix)
    try:
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError:
        _remove_empty(made)
        raise
    lock = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield stage
        stage.chmod(0o777 & ~_umask())
        os.fsync(lock)
        try:
            stage.rename(destination)
        except OSError as error:
            raise RegroupError(
                "the destination appeared while the result was being written", file=destination
            ) from error
        _sync_folder(parent)
    except BaseException as error:
        with _undisturbed():
            shutil.rmtree(stage, ignore_errors=True)
            _remove_empty(made)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RegroupError(
                "the disk became full; nothing was left behind",
                file=destination,
                remedy="free some space or choose a destination on another disk",
            ) from error
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a second, impatient Ctrl-C wait: half a clean-up is what it would leave behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _remove_stale(parent: Path, prefix: str) -> None:
    for stale in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            fd = os.open(stale, os.O_RDONLY)
            try:
                # Whoever still works on it holds the lock; a killed run does not.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
            finally:
                os.close(fd)


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    parent = path.absolute().parent
    while not parent.is_dir():
        if parent.exists():
            raise RegroupError("a part of the destination's path is a file", file=parent)
        parent = parent.parent
    return parent


def _make_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing[::-1]


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)
