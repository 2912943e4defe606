"""Hidden folders: one that becomes the destination when it is complete, and temporary ones.

A run locks its hidden folder, and the system releases the lock when the process ends in any way: a folder without a
lock was left by a run that was killed. Folders of other users are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RegroupError


@contextlib.contextmanager
def staged_folder(
    destination: Path,
    *,
    adopt: Callable[[Path], bool] | None = None,
    keep: Callable[[], bool] | None = None,
) -> Iterator[Path]:
    """A hidden folder next to ``destination`` that is renamed to it when the block succeeds.

    Any error, Ctrl-C included, removes it, unless ``keep`` says otherwise. A run that was killed leaves the hidden
    folder behind; the next run to the same destination resumes in it or removes it.

    Args:
        destination: does not exist yet.
        adopt: called with each folder that a killed run left, until it returns True: that folder is used, with what
            ``adopt`` left in it.
        keep: called on Ctrl-C: True keeps the folder for the next run.

    Raises:
        RegroupError: the disk is full, or the system refuses to read or to write.
    """
    parent = destination.absolute().parent
    made: list[Path] = []
    try:
        _make_parents(parent, made)
        stage, lock = _stage(parent, _prefix(destination), adopt)
    except OSError as error:
        _remove_empty(made)
        raise _refusal(error, destination) from error
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        # Libraries write files of their own, and do not flush them.
        for folder, _, files in os.walk(stage):
            for name in (*files, ""):
                sync(Path(folder) / name)
        try:
            stage.rename(destination)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise _appeared(destination) from error
    except BaseException as error:
        with _undisturbed():
            if not (keep is not None and isinstance(error, KeyboardInterrupt) and keep()):
                shutil.rmtree(stage, ignore_errors=True)
                _remove_empty(made)
        if isinstance(error, OSError):
            raise _refusal(error, destination) from error
        raise
    finally:
        os.close(lock)
    _confirm(destination)


@contextlib.contextmanager
def staged_file(destination: Path) -> Iterator[Path]:
    """A file in a hidden folder next to ``destination`` that becomes it when the block succeeds (``staged_folder``).

    Raises:
        RegroupError: the destination appeared meanwhile, the disk is full, or the system refuses to read or to write.
    """
    with scratch_folder(destination.absolute().parent, _prefix(destination)) as folder:
        made = folder / destination.name
        yield made
        sync(made)
        try:
            _place(made, destination)
        except FileExistsError as error:
            raise _appeared(destination) from error
    _confirm(destination)


def _place(made: Path, destination: Path) -> None:
    """Rename a file to a name that does not exist yet."""
    try:
        os.link(made, destination)  # unlike a rename, it replaces nothing
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without links.
        if os.path.lexists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination)) from error
        made.rename(destination)


def _appeared(destination: Path) -> RegroupError:
    return RegroupError("the destination appeared while the result was being written", file=destination)


def _confirm(destination: Path) -> None:
    try:
        sync(destination.absolute().parent)
    except OSError as error:
        raise RegroupError(
            "the result is complete, but the system does not confirm that its name is on the disk",
            file=destination,
            got=error.strerror or str(error),
            remedy="see whether the disk is sound; `regroup verify` checks the result",
        ) from error


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A hidden temporary folder for one run; those that killed runs left next to it are removed first.

    Args:
        parent: on a disk with enough room; made for as long if it is not there.
        prefix: of the folder's name; begins with a dot, and says what is in it.

    Raises:
        RegroupError: as ``staged_folder``.
    """
    made: list[Path] = []
    try:
        _make_parents(parent, made)
        folder, lock = _stage(parent, prefix, None)
    except OSError as error:
        _remove_empty(made)
        raise _refusal(error, parent) from error
    try:
        yield folder
    except OSError as error:
        raise _refusal(error, parent) from error
    finally:
        with _undisturbed():
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(made)
        os.close(lock)


def left_behind(destination: Path) -> list[Path]:
    """The hidden folders of runs to this destination that were killed."""
    found = []
    for folder in destination.absolute().parent.glob(f"{glob.escape(_prefix(destination))}*"):
        with _locked(folder) as lock:
            found += [folder] if lock is not None else []
    return found


def allocated(folder: Path) -> int:
    """Bytes of disk that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stage(parent: Path, prefix: str, adopt: Callable[[Path], bool] | None) -> tuple[Path, int]:
    """A locked hidden folder, new or adopted; others that nobody holds are removed."""
    adopted: tuple[Path, int] | None = None
    # One run at a time: a folder that another has just made is not locked yet.
    around = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(around, fcntl.LOCK_EX)
        for folder in sorted(parent.glob(f"{glob.escape(prefix)}*")):
            with _locked(folder) as lock:
                if lock is None:
                    continue
                if adopted is None and adopt is not None and adopt(folder):
                    adopted = folder, os.dup(lock)  # the lock lasts as long as one of the two is open
                else:
                    shutil.rmtree(folder, ignore_errors=True)
        if adopted is not None:
            return adopted
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(stage, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return stage, lock
    finally:
        os.close(around)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """A descriptor that holds the folder's lock, or None: another process does, it is another user's, or not there."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.regroup-"


def _refusal(error: OSError, destination: Path) -> RegroupError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RegroupError(
            "the disk became full; nothing was left behind",
            file=destination,
            remedy="free some space or choose a destination on another disk",
        )
    return RegroupError(
        "the system refused to read or to write; nothing was left behind",
        file=error.filename or destination,
        got=error.strerror or str(error),
        remedy="see whether the disk is sound and the file may be used, then run the command again",
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C, SIGTERM or SIGHUP, which would interrupt the clean-up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None is a handler that was not set from Python and cannot be set again from here.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is not None}
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_parents(parent: Path, made: list[Path]) -> None:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        made.append(folder)


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
