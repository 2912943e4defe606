"""Builds the CPU kernels with the installed C++ compiler, once per machine, and loads them.

The only file of this package that accesses the disk. The library is in the user's cache (``$XDG_CACHE_HOME`` or
``~/.cache``, below ``regroup/``) under a hash of everything that it depends on. It is built under another name and
renamed, so that several processes may build it at once. A file that other users could have written is not loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..tracing import constant

_SOURCES = ("decode.cpp", "linear.cpp", "vectors.h")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared")
_SECONDS = 120
# Features of the processor that the library is built for (regroup_features in decode.cpp).
HALVES, AVX2 = 1, 2
_INSTALL = "install a C++ compiler (Debian, Ubuntu: apt-get install g++), or name one in $CXX"


@dataclass(frozen=True)
class Built:
    """The loaded library, or the reason why there is none."""

    library: ctypes.CDLL | None
    unsupported_reason: str | None


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX")
    try:
        commands = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    except ValueError:  # a quotation that does not end
        return None
    return next((command for command in commands if command and shutil.which(command[0])), None)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(wanted)})])


def _native() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The result of a command; compilers may write any encoding."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SECONDS, check=False
    )


def cache_folder() -> Path:
    """Where built libraries are kept. A relative ``$XDG_CACHE_HOME`` does not count, as its specification says."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "regroup"


def _require_private(place: Path) -> None:
    """Check that only this user and root can have written a file or folder.

    Raises:
        PermissionError: others could have.
    """
    state = place.stat()
    if state.st_uid not in (0, os.getuid()) or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{place} is writable by others")


def _make_private(folder: Path) -> None:
    """Create a folder that only this user can write to, or make it so."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"{above} is writable by everybody, who could replace its contents")
    state = folder.stat()
    if state.st_uid == os.getuid() and state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)
    _require_private(folder)


def _open(library: Path) -> Built:
    """Load a built library; remove it if it cannot be loaded."""
    _require_private(library)
    try:
        return Built(ctypes.CDLL(str(library)), None)
    except OSError:
        library.unlink(missing_ok=True)
        raise


def _compile(command: list[str], target: Path) -> str | None:
    """Build under another name and rename; return the compiler's error, if it failed."""
    folder = Path(__file__).parent
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".part")
    os.close(handle)
    try:
        sources = [str(folder / file) for file in _SOURCES if file.endswith(".cpp")]
        done = _finished([*command, *sources, "-o", name])
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return lines[0].strip() if lines else f"exit code {done.returncode}"
        Path(name).chmod(0o755)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return None


def _make(command: list[str], target: Path) -> Built:
    problem = _compile(command, target)
    return Built(None, f"{command[0]} could not build it: {problem}; {_INSTALL}") if problem else _open(target)


def _load(command: list[str]) -> Built:
    full = [*command, *_FLAGS, *_native()]
    folder = Path(__file__).parent
    text = "\0".join(
        [*full, _finished([*command, "--version"]).stdout, _processor(), torch.__version__]
        + [(folder / name).read_text(encoding="utf-8") for name in _SOURCES]
    )
    name = f"cpu-{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
    try:
        target = cache_folder() / name
        _make_private(target.parent)
        return _open(target) if target.exists() else _make(full, target)
    except (OSError, RuntimeError):
        # There is no home, or the cache is not writable, does not allow execution, or is writable by others: build for
        # this process only.
        with tempfile.TemporaryDirectory(prefix="regroup-") as private:
            return _make(full, Path(private) / name)


@functools.cache
def build() -> Built:
    """The kernels of this machine, built at first use (some seconds), then from the cache. Raises no errors."""
    if os.name != "posix":
        return Built(None, "it is built only on POSIX systems")
    command = find_compiler()
    if command is None:
        wanted = os.environ.get("CXX")
        missing = f"there is no {wanted} ($CXX)" if wanted else "there is no C++ compiler"
        return Built(None, f"{missing}: {_INSTALL}")
    try:
        return _load(command)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Built(None, f"it could not be built: {error}; {_INSTALL}")


@constant
def unsupported_reason() -> str | None:
    """The reason why there are no kernels, or None. Builds them if necessary."""
    return build().unsupported_reason


@constant
def features() -> int:
    """What the built kernels can use: a sum of :data:`HALVES` (float16) and :data:`AVX2` (that, and nothing wider); 0
    where there are no kernels."""
    library = build().library
    return 0 if library is None else library.regroup_features()


def has_short_vectors() -> bool:
    """Whether this processor has AVX2 and nothing wider."""
    return bool(features() & AVX2)


@functools.cache
def parallel() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch runs on, 0 if there is none (then one thread).

    GNU's, Intel's and LLVM's runtimes all have it. A second runtime next to torch's would start a second pool of
    threads on the same cores.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        maps = []
    files = {line.split(maxsplit=5)[-1] for line in maps if "omp" in line.rpartition("/")[2]}
    # torch's own first if there are several; last, the global symbols of the process.
    for place in [*sorted(files, key=lambda file: ("/torch/" not in file, file)), None]:
        try:
            found = ctypes.cast(ctypes.CDLL(place).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if found:
            return found
    return 0
