"""The operator's benchmark: what it compares is right, what it keeps is complete, what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import quick  # noqa: F401

from helpers import everything, refused, run
from regroup.bench import attention, journal, machine
from regroup.bench.attention import OperatorRoofs, Shape, grid, measure
from regroup.bench.journal import run_grid
from regroup.errors import RegroupError

SMALL = ["--heads", 4, "--head-dim", 8, "--kv-heads", "4,2", "--batch", "1", "--context", "16,32"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_agree(dtype: str) -> None:
    found = measure(Shape(2, 24, 2, dtype, heads=6, head_dim=16), OperatorRoofs())
    ran = {name: way for name, way in found["ways"].items() if "ms" in way}
    assert {"enable_gqa", "repeat", "packed_sdpa", "regroup", "regroup packed"} <= set(ran)
    assert found["auto_takes"] in {name.removeprefix("regroup ") for name in ran}
    for name, way in ran.items():
        assert way["largest_difference"] < (1e-5 if dtype == "float32" else 2e-2), name
        assert 0 < way["ms"]["p20"] <= way["ms"]["p50"] <= way["ms"]["p80"]
        assert way["runs"] >= 1
    assert found["kv_bytes"] == 2 * 2 * 2 * 24 * 16 * (4 if dtype == "float32" else 2)
    assert found["floor_ms"] == 1e3 * max(
        found["kv_bytes"] / found["bandwidth_bytes_per_second"], found["flops"] / found["product_flops_per_second"]
    )


def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.grouped_query_attention
    monkeypatch.setattr(attention, "grouped_query_attention", lambda q, *kv, backend: 2 * real(q, *kv, backend=backend))
    found = measure(Shape(1, 8, 1, heads=2, head_dim=8), OperatorRoofs())
    assert found["ways"]["regroup"]["largest_difference"] > 1e-2
    assert found["ways"]["packed_sdpa"]["largest_difference"] < 1e-5


def test_what_was_not_run_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_REPEATED_BYTES", 100)
    found = measure(Shape(1, 8, 1, heads=2, head_dim=8), OperatorRoofs())
    assert "would take" in found["ways"]["repeat"]["not_run"]
    assert "CPU" in found["ways"]["regroup triton"]["not_run"]
    assert "on request" in found["ways"]["regroup flex"]["not_run"]
    alone = measure(Shape(1, 8, 2, heads=2, head_dim=8), OperatorRoofs())
    assert "the same as enable_gqa" in alone["ways"]["packed_sdpa"]["not_run"]


def test_a_grid_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "DISTURBED", 1.5)
    shapes = grid(batches=[1], contexts=[8, 12], kv_heads=[2, 1], dtypes=["float32"], heads=2, head_dim=8)
    work = tmp_path / "work.jsonl"
    assert run_grid(shapes, limit=10**9, work=work, minutes=0) is None
    seen: list[dict[str, Any]] = []
    first = run_grid(shapes[:2], limit=10**9, work=work, each=seen.append)
    assert first is not None
    assert len(seen) == len(work.read_text().splitlines()) == 2
    record = run_grid(shapes, limit=10**9, work=work, each=seen.append)
    assert record is not None
    assert len(seen) == 4
    results = record["results"]["shapes"]
    assert results[:2] == json.loads(json.dumps(first["results"]["shapes"]))
    assert [{name: found[name] for name in asdict(shape)} for found, shape in zip(results, shapes, strict=True)] == [
        asdict(shape) for shape in shapes
    ]
    # A result that others disturbed is measured again, and the calmer one is kept.
    lines = [json.loads(line) for line in work.read_text().splitlines()]
    lines[0]["other_processes_share_of_cpu"] = 2.0
    work.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run_grid(shapes, limit=10**9, work=work, each=seen.append)
    assert again is not None
    assert len(seen) == 5
    assert again["results"]["shapes"][0]["other_processes_share_of_cpu"] < 2.0
    work.write_text("not a result\n")
    with pytest.raises(RegroupError, match="does not contain results"):
        run_grid(shapes, limit=10**9, work=work)


def test_large_shapes_are_omitted_and_reported() -> None:
    shapes = grid(batches=[1], contexts=[8, 4096], kv_heads=[1], dtypes=["float32"], heads=2, head_dim=8)
    record = run_grid(shapes, limit=100_000)
    assert record is not None
    kept, left_out = record["results"]["shapes"]
    assert "ways" in kept
    assert "more than the limit" in left_out["left_out"]


def test_the_command(tmp_path: Path) -> None:
    status, out, message = run("bench", "attention", *SMALL, "-o", tmp_path / "record.json")
    assert status == 0, message
    assert "floor" in out
    assert "enable_gqa" in out
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["kind"] == "benchmark/attention"
    assert len(record["results"]["shapes"]) == 4
    status, out, _ = run("bench", "attention", *SMALL, "--json")
    assert status == 0
    assert len(json.loads(out)["results"]["shapes"]) == 4


def test_a_dry_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "timed", None)
    status, out, _ = run("bench", "attention", *SMALL, "--dry-run", "-o", tmp_path / "record.json")
    assert status == 0
    assert "nothing was measured" in out
    assert "4 KiB" in out  # float32, 4 KV heads of 8, 16 tokens: 2 · 4 · 8 · 16 · 4 bytes
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-heads", "3"], ("divided into", "divisor of 32")),
        (["--kv-heads", "0"], ("must be at least 1",)),
        (["--context", "0"], ("must be at least 1",)),
        (["--batch", "x"], ("not a list of integers",)),
        (["--dtype", "int8"], ("unknown dtype",)),
        (["--minutes", "1"], ("needs a file", "--work")),
        (["--device", "abacus"], ("device cannot be used",)),
    ],
)
def test_impossible_requests(options: list[str], words: tuple[str, ...], tmp_path: Path) -> None:
    message = refused("bench", "attention", *options, "-o", tmp_path / "record.json")
    assert [word for word in words if word not in message] == []
    assert everything(tmp_path) == []


def test_probes_count_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of twice the size does not count as the same work."""
    # On a busy machine fewer products would be affordable.
    monkeypatch.setattr(machine, "_affordable", lambda *_: float("inf"))
    probe = machine.product_rate(4, 16).probe
    columns = int(probe.way.split(", ")[1].split()[0])
    assert columns in [cached // (16 * 4) for cached in machine._CACHED_BYTES]
    assert probe.work == 2 * machine._PRODUCTS * 4 * 16 * columns
    twice = machine.product_rate(8, 16).probe
    assert twice.work == 2 * machine._PRODUCTS * 8 * 16 * int(twice.way.split(", ")[1].split()[0])
    assert machine.read_bandwidth(nbytes=1 << 16).probe.work == 1 << 16
    assert machine.quantiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})


class Slow:
    """A machine whose products take the time that a rate says, by a clock of its own."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now = rate, 0.0

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        batch = left.shape[0] if left.dim() == 3 else 1
        self.now += 1e-6 + 2 * batch * left.shape[-2] * left.shape[-1] * right.shape[-1] / self.rate
        return left


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("inner", [8, 64, 4096])
@pytest.mark.parametrize("rate", [1e7, 1e8, 1e9, 1e11, 1e13])
def test_a_rate_is_known_within_seconds_on_any_machine(
    rows: int, inner: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 without instructions for it can be a thousand times slower; some operations each took minutes."""
    slow = Slow(rate)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: slow.now)
    monkeypatch.setattr(torch, "bmm", slow.product)
    monkeypatch.setattr(torch, "mm", slow.product)
    monkeypatch.setattr(machine, "fast_layer", lambda dtype: (None, "not here"))
    # Operands are as large as they are; only the clock is not real.
    monkeypatch.setattr(torch, "full", lambda sizes, *_, **__: torch.empty(sizes, device="meta"))
    found = machine.product_rate(rows, inner, dtype=torch.bfloat16)
    least = 2 * rows * inner * 16 / rate  # one small product of these sizes takes as long as it takes
    assert slow.now < 2 * machine._MOST_SECONDS + 3 * least
    assert found.median == pytest.approx(rate, rel=0.35) or rate > 1e12


@pytest.mark.parametrize("threads", [1, 3, 6, 7, 12])
def test_bandwidth_is_read_with_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    probe = machine.read_bandwidth(nbytes=1 << 18).probe
    assert (1 << 18) - 8 * 16 * threads < probe.work <= 1 << 18
