"""The command line itself: help, dry runs, options that cannot be, and a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import regroup
import regroup.api
from helpers import assert_same_tensors, digests, everything, refused, run, tensors
from regroup.cli import app

Saved = Callable[[str], Path]


@pytest.mark.parametrize("verb", ["inspect", "plan", "convert", "export", "evaluate", "demo"])
def test_every_verb_has_help(verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert "Usage:" in out
    assert verb in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-heads", "4"], ("divided into", "layer:", "divisor of 6", "got:", "choose one of 1, 2, 3, 6")),
        (["--kv-heads", "12"], ("more KV heads", "at most 6", "remedy:")),
        (["--kv-heads", "0"], ("divided into", "remedy:")),
        (["--kv-heads", "-2"], ("divided into", "remedy:")),
        ([], ("no number of KV heads", "remedy:")),
        (["--layers", "0-9:2"], ("do not exist", "layers 0 to 2")),
        (["--layers", "x"], ("cannot be read", "0-3:8,4-31:4")),
        (["--layers", "encoder.0:2"], ("encoder layers are not converted", "remedy:")),
        (["--kv-heads", "2", "--tensor-parallel", "4"], ("over that many devices", "remedy:")),
        (["--kv-heads", "3", "--tensor-parallel", "2"], ("tensor-parallel devices", "remedy:")),
        (["--kv-heads", "2", "--method", "median"], ("merge method", "mean or first or random")),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "convert", "convert --dry-run"])
def test_impossible_requests(
    verb: str, options: list[str], words: tuple[str, ...], saved: Saved, tmp_path: Path
) -> None:
    name, *flags = verb.split()
    target = [] if name == "plan" else [tmp_path / "child"]
    message = refused(name, saved("llama"), *target, *options, *flags)
    assert [word for word in words if word not in message] == []
    assert everything(tmp_path) == []


def test_a_dry_run_checks_everything_and_writes_nothing(saved: Saved, tmp_path: Path) -> None:
    status, out, message = run(
        "convert", saved("opt"), tmp_path / "child", "--layers", "0:2", "--dry-run", "--calibration", "none"
    )
    assert (status, out) == (0, "")
    assert "nothing was written" in message
    assert "trust_remote_code=True" in message
    assert everything(tmp_path) == []
    (tmp_path / "child").mkdir()
    assert "exists already" in refused(
        "convert", saved("opt"), tmp_path / "child", "--kv-heads", 2, "--dry-run", "--calibration", "none"
    )


def test_the_command_and_the_function_write_the_same(saved: Saved, tmp_path: Path) -> None:
    status, out, message = run(
        "convert", saved("bart"), tmp_path / "a", "--kv-heads", 3, "--layers", "cross.0:1", "--calibration", "none"
    )
    assert (status, out) == (0, ""), message
    assert "loads with trust_remote_code" in message
    regroup.convert(saved("bart"), tmp_path / "b", kv_heads=3, layers="cross.0:1", calibration="none")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_tensor_parallel_copies_are_noted(saved: Saved) -> None:
    status, _, message = run("plan", saved("llama"), "--kv-heads", 1, "--tensor-parallel", 3)
    assert status == 0
    assert "3 layers have 1 KV heads for 3 devices" in " ".join(message.split())


@pytest.mark.parametrize("arguments", [[], ["no-such-verb"], ["convert"], ["inspect", "x", "--context", "0"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    message = refused("plan", tmp_path / "[bold]nowhere[" / "bold]", "--kv-heads", 1)
    assert "[bold]nowhere[/bold]" in message


def test_a_process_of_its_own(saved: Saved, tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "regroup.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = call("convert", saved("llama"), tmp_path / "child", "--kv-heads", 2, "--calibration", "none")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "child" / "config.json").exists()
    again = call("convert", saved("llama"), tmp_path / "child", "--kv-heads", 2, "--calibration", "none")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


def slow_imports(*arguments: object) -> set[str]:
    """What a command imports of the libraries that take long to import."""
    code = (
        "import sys\nfrom regroup.cli import app\nfrom typer.testing import CliRunner\n"
        f"result = CliRunner().invoke(app, {[str(argument) for argument in arguments]!r})\n"
        "assert result.exit_code == 0, result.output\n"
        "print(*{'torch', 'transformers', 'safetensors', 'huggingface_hub', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    return set(done.stdout.split())


def test_help_and_headers_import_nothing_that_takes_long(saved: Saved, tmp_path: Path) -> None:
    assert not slow_imports("convert", "--help")
    assert not slow_imports("inspect", saved("t5"))
    reads_weights = ("inspect", saved("t5"), "--similarity", "-o", tmp_path / "plots")
    assert slow_imports(*reads_weights) >= {"torch"}


def test_the_commands_are_public_functions() -> None:
    names = {"inspect", "advise", "plan", "convert", "verify", "evaluate", "uptrain", "export"}
    assert names == set(regroup.api.__all__)
    assert names <= set(dir(regroup))
    assert all(getattr(regroup, name) is getattr(regroup.api, name) for name in names)
    code = "import sys, regroup.api; dir(regroup); print('torch' in sys.modules, hasattr(regroup.api, 'no_such'))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_public_names() -> None:
    for name in regroup.__all__:
        assert getattr(regroup, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = regroup.no_such  # type: ignore[attr-defined]
