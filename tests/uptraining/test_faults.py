"""Processes of their own: killed at any moment, and several at once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import runs
from helpers import assert_same_tensors, everything, tensors

pytestmark = pytest.mark.slow
SHORT = ("--log-every", 1, "--window", 32, "--learning-rate", 1e-3, "--device", "cpu", "--held-out-windows", 8)


def options(shop: Path, output: Path, *more: object, steps: int = 12) -> list[object]:
    data = ("--data", shop / "train.txt", "--held-out", shop / "held-out.txt", "--teacher", shop / "parent")
    return [shop / "child", *data, "-o", output, "--steps", steps, *SHORT, *more]


def finished(process: Any) -> str:
    """Its standard error, once it has ended well."""
    _, message = process.communicate(timeout=300)
    assert process.returncode == 0, message
    return message


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "record.json").read_text(encoding="utf-8"))["results"]["history"]


@pytest.fixture(scope="module")
def alone(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, twelve steps, a state after each."""
    output = tmp_path_factory.mktemp("alone") / "run"
    finished(runs.start(*options(shop, output, "--save-every", 1, "--eval-every", 6)))
    return output


def test_kill_at_any_moment(shop: Path, alone: Path, tmp_path: Path) -> None:
    """Four kills, each at a moment of its own after the process began to write: in steps, saves and evaluations."""
    output = tmp_path / "run"
    draw = random.Random(0)
    given = options(shop, output, "--save-every", 1, "--eval-every", 6)
    seen = set()
    for _ in range(4):
        process = runs.start(*given)
        before = {path.name for path in output.glob("checkpoint-*")}
        while process.poll() is None and {path.name for path in output.glob("checkpoint-*")} <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        names = [path.name for path in output.glob("checkpoint-*")]
        seen.add(max(int(name.removeprefix("checkpoint-")) for name in names))
    assert len(seen) > 1, "the kills came too late or too early"
    finished(runs.start(*given))
    assert_same_tensors(tensors(output / "model"), tensors(alone / "model"))
    assert [entry.get("loss") for entry in history(output)] == [entry.get("loss") for entry in history(alone)]
    assert [name for name in everything(output) if name.startswith(".")] == []


def test_a_second_process_is_refused_while_the_first_one_runs(shop: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = options(shop, output, "--save-every", 1, "--eval-every", 6)
    first = runs.start(*given)
    while first.poll() is None and not (output / "run.json").exists():
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    second = runs.start(*given)
    _, message = second.communicate(timeout=120)
    first.send_signal(signal.SIGCONT)
    assert (second.returncode, "another process is running" in message) == (2, True), message
    finished(first)
    assert_same_tensors(tensors(output / "model"), tensors(alone / "model"))


@pytest.fixture(scope="module")
def two(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "run"
    message = finished(
        runs.start(*options(shop, output, "--save-every", 6, "--eval-every", 6, "--micro-batch", 2), processes=2)
    )
    # The first process alone speaks.
    assert message.count("result: ") == 1
    return output


def test_two_processes_learn_what_one_does(alone: Path, two: Path) -> None:
    one, both = history(alone), history(two)
    for left, right in zip(one, both, strict=True):
        assert right.keys() == left.keys()
        for key in left.keys() - {"tokens_per_second"}:
            assert right[key] == pytest.approx(left[key], rel=1e-5), (left["step"], key)
    for name, tensor in tensors(alone / "model").items():
        assert (tensors(two / "model")[name] - tensor).abs().max() < 1e-4


def test_one_process_resumes_where_two_stopped(shop: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(two, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-12")
    finished(runs.start(*options(shop, output, "--save-every", 6, "--eval-every", 6)))
    for name, tensor in tensors(two / "model").items():
        assert (tensors(output / "model")[name] - tensor).abs().max() < 1e-5
    assert json.loads((output / "record.json").read_text())["results"]["resumed_from"] == 6


def test_an_error_of_one_process_ends_both(shop: Path, tmp_path: Path) -> None:
    process = runs.start(*options(shop, tmp_path / "run", "--batch-size", 7), processes=2)
    _, message = process.communicate(timeout=120)
    assert process.returncode != 0
    assert message.count("error: the batch cannot be shared") == 1
    assert not (tmp_path / "run").exists()


# accelerate does not shard on the CPU; told that it may, everything but its choice of processes is what GPUs run.
SHARDED = """
import accelerate.state as state
from accelerate.utils import DistributedType
first = state.PartialState.__init__
def init(self, *arguments, **options):
    first(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
state.PartialState.__init__ = init
from regroup.cli import main
main()
"""


def test_fsdp2_on_the_cpu(shop: Path, two: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    output = tmp_path / "run"
    given = options(shop, output, "--save-every", 6, "--eval-every", 6, "--micro-batch", 2, "--fsdp")
    finished(runs.start(*given, processes=2, script=script))
    assert list((output / "checkpoint-6").rglob("*.distcp"))
    for left, right in zip(history(two), history(output), strict=True):
        for key in {"loss", "eval_kl", "grad_norm"} & left.keys():
            assert right[key] == pytest.approx(left[key], rel=1e-5), (left["step"], key)
    whole = tensors(output / "model")
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-12")
    finished(runs.start(*given, processes=2, script=script))
    assert_same_tensors(tensors(output / "model"), whole)


def test_fsdp_on_the_cpu_is_refused_by_the_command(shop: Path, tmp_path: Path) -> None:
    process = runs.start(*options(shop, tmp_path / "run", "--fsdp"), processes=2)
    _, message = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "accelerate does not shard on the CPU" in message
