"""Writing the files of a checkpoint folder, each of them flushed to the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RegroupError, two_sizes
from .header import encode_header, nbytes_of, unreadable
from .stage import allocated, left_behind

if TYPE_CHECKING:
    import torch

# Large enough to run at disk speed, small enough that two workers stay far below the memory goal.
COPY_BYTES = 8 << 20


class ShardFile:
    """A safetensors file of known content, written at any offset in any order.

    Args:
        path: the file to create.
        tensors: name to (safetensors dtype, shape), in the order of the data.
        metadata: the file's free-form metadata.
        again: the file is there, complete, and some of its tensors are to be written once more.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        again: bool = False,
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
        self._fd = os.open(path, os.O_RDWR | (0 if again else os.O_CREAT | os.O_EXCL), 0o644)
        if again:
            return
        try:
            with _named(path):
                os.truncate(self._fd, position)
            _write_all(self._fd, memoryview(header), 0, path)
        except BaseException:
            self.close(sync=False)
            raise

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write one tensor; its bytes must be exactly those that the header announces."""
        import torch

        start, end = self.ranges[name]
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert data.nbytes == end - start, f"{name}: {data.nbytes} bytes for a place of {end - start}"
        _write_all(self._fd, data, start, self.path)

    def copy(self, source: Path, start: int, end: int, to: int) -> None:
        """Copy bytes ``start:end`` of another file to offset ``to``, inside the kernel where it can."""
        copy_range(source, start, end, self._fd, self.path, to)

    def sync(self) -> None:
        """Flush to the disk."""
        with _named(self.path):
            os.fsync(self._fd)

    def close(self, *, sync: bool = True) -> None:
        """Flush to the disk and close; harmless when repeated."""
        if self._fd >= 0:
            try:
                if sync:
                    self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1


def copy_range(source: Path, start: int, end: int, fd: int, path: Path, to: int) -> None:
    """Copy bytes ``start:end`` of a file to offset ``to`` of another, inside the kernel where it can.

    Args:
        source, start, end: what to copy.
        fd, path: the open file to write to, and its name for messages.
        to: offset in it.

    Raises:
        RegroupError: the source cannot be read, or has become shorter.
        OSError: the other file cannot be written.
    """
    with unreadable(source):
        origin = os.open(source, os.O_RDONLY)
    try:
        while start < end:
            try:
                count = os.copy_file_range(origin, fd, min(end - start, COPY_BYTES), start, to)
            except (AttributeError, OSError):
                # The kernel cannot do it between these two files, or one of them fails: which, this tells.
                with unreadable(source):
                    block = os.pread(origin, min(end - start, COPY_BYTES), start)
                _write_all(fd, memoryview(block), to, path)
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
        os.close(origin)


def _write_all(fd: int, data: memoryview, offset: int, path: Path) -> None:
    done = 0
    with _named(path):
        while done < data.nbytes:
            done += os.pwrite(fd, data[done:], offset + done)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A descriptor's error does not say which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file, _named(path):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of tensors that are all in memory, for the run alone: it is not flushed.

    Raises:
        RegroupError: the system refuses to write it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # in which the library wraps what the system said
        raise RegroupError(
            "a file of weights cannot be written",
            file=path,
            got=str(error)[:200],
            remedy="free some space or choose a destination on another disk",
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file, into a folder that is made if need be, and flush it to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file, _named(target):
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
                remedy="choose a destination next to the source",
            )
    parent = existing_parent(destination)
    if not os.access(parent, os.W_OK):
        raise RegroupError("the destination's folder cannot be written to", file=parent)
    # What a killed run left is removed or used.
    free = shutil.disk_usage(parent).free + sum(map(allocated, left_behind(destination)))
    if free < nbytes:
        needed, there_is = two_sizes(nbytes, free)
        raise RegroupError(
            "the disk has too little room for the result",
            file=parent,
            expected=f"{needed} free",
            got=f"{there_is} free",
            remedy="free some space or choose a destination on another disk",
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    parent = path.absolute().parent
    while not parent.is_dir():
        if parent.exists():
            raise RegroupError("a part of the destination's path is a file", file=parent)
        parent = parent.parent
    return parent
