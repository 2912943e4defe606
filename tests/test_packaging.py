"""What is built of the repository: complete, without anything else, and working where no source is in sight."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import regroup

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling")


def _run(*command: object, **settings: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "wheel", "-t", "sdist", cwd=ROOT)
    return folder


def _wheel(built: Path) -> Path:
    return built / f"regroup_gqa-{regroup.__version__}-py3-none-any.whl"


def _in_the_repository(*options: str) -> set[str]:
    try:
        return set(_run("git", "ls-files", *options, cwd=ROOT).splitlines())
    except (AssertionError, FileNotFoundError):
        pytest.skip("needs the git repository, which says what belongs to it")


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/regroup").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == wanted
    # Not modules, so that nothing else would miss them before a user does.
    assert {
        "regroup/advice/recovery.json",
        "regroup/attention/cpu/decode.cpp",
        "regroup/attention/cpu/vectors.h",
        "regroup/demo/corpus.txt",
        "regroup/demo/parent/model.safetensors",
        "regroup/modeling/modeling_regroup.py",
        "regroup/py.typed",
        "regroup/report/page.html.j2",
    } <= names


def test_the_source_distribution_is_the_repository(built: Path) -> None:
    tracked, known = _in_the_repository(), _in_the_repository("--cached", "--others", "--exclude-standard")
    with tarfile.open(built / f"regroup_gqa-{regroup.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
    assert names - known == set()


@pytest.mark.slow
def test_the_wheel_works_without_the_source(built: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    _run(*pip, "--target", site, _wheel(built))
    # Before the environment's own packages, so that an editable install of the source there is not what is found.
    here = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(site)}}
    code = (
        "import importlib.metadata, regroup\n"
        "print(regroup.__file__, importlib.metadata.distribution('regroup-gqa').locate_file(''), sep='\\n')"
    )
    assert [Path(line) for line in _run(sys.executable, "-c", code, **here).split()] == [
        site / "regroup/__init__.py",
        site,
    ]
    assert _run(site / "bin/regroup", "--version", **here) == f"{regroup.__version__}\n"
    shown = _run(site / "bin/regroup", "inspect", saved("llama"), "--json", **here)
    assert '"llama"' in shown
    _run(site / "bin/regroup", "convert", saved("opt"), "child", "--kv-heads", 2, "--method", "mean", **here)
    assert (elsewhere / "child/modeling_regroup.py").is_file()
