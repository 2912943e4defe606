"""The page: what it holds, that it loads nothing and escapes everything, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from helpers import refused, run
from regroup.errors import RegroupError
from regroup.report.heads import _cache, _short, _some
from regroup.report.page import made_of, render
from regroup.report.plausible import impossible
from regroup.report.records import read_records, short_names

RECORDS = sorted((Path(__file__).parents[2] / "benchmarks/records").glob("*.json"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def record(kind: str, configuration: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    machine = {"processor": "Z80", "threads": 1}
    return {
        "kind": kind,
        "format": 1,
        "date": "2026-01-02T03:04:05Z",
        "configuration": configuration,
        "results": results,
        "versions": {"torch": "2.0"},
        "machine": machine,
    }


def layer(name: str, heads: int, *, window: int | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "self",
        "num_attention_heads": 4,
        "num_key_value_heads": heads,
        "head_dim": 8,
        "window": window,
    }


def inspected(model: str = "tiny") -> dict[str, Any]:
    pairs = [[0.0, 0.25], [0.25, 0.0]]
    alike = {"pairs": pairs, "contiguous": {"1": 0.2}}
    return record(
        "inspect",
        {"model": model},
        {
            "source": model,
            "family": "llama",
            "parameters": 1_000_000,
            "layers": [layer("model.layers.0.self_attn", 4), layer("model.layers.1.self_attn", 2)],
            "similarity": [{"name": "model.layers.0.self_attn", "num_key_value_heads": 2, "key": alike, "value": None}],
        },
    )


def answered(model: str, value: float) -> dict[str, Any]:
    found = {"value": value, "low": value - 0.1, "high": value + 0.1, "lower_is_better": False}
    done = {"model": model, "task": "qa", "digest": "d", "against": None}
    return record("evaluate/task", done, {"rows": 3, "metrics": {"f1": found}})


def write(folder: Path, *values: dict[str, Any]) -> list[Path]:
    paths = [folder / f"record-{number}.json" for number in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        path.write_text(json.dumps(value), encoding="utf-8")
    return paths


def text_of(*values: dict[str, Any], folder: Path) -> str:
    records = read_records(write(folder, *values))
    sections, unused = made_of(records)
    return render(sections, records, unused, "title")


def own(page: str) -> str:
    """A page without the library's script, which has markup in its strings."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    return page.replace(max(scripts, key=len), "")


def test_figures_are_those_of_the_records(tmp_path: Path) -> None:
    page = text_of(inspected(), answered("parent", 0.5), answered("child", 0.25), folder=tmp_path)
    # 2 · (4 + 2) heads · 8 · 2 bytes a token.
    assert "192 B" in page
    assert "<td>0.500</td>" in page
    assert "<td>0.250</td>" in page
    assert "2026-01-02" in page
    assert "Z80, 1 thread" in page
    assert page.count("<figure>") == 5  # facts, memory, G by layer, key maps, f1


def test_a_section_without_records_is_absent(tmp_path: Path) -> None:
    page = text_of(answered("parent", 0.5), folder=tmp_path)
    assert 'id="quality"' in page
    assert 'id="models"' not in page
    assert 'id="uptraining"' not in page


def test_every_record_that_is_committed_makes_a_page(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    status, _, message = run("report", *RECORDS, "-o", output)
    assert status == 0, message
    assert 10_000 < output.stat().st_size < 2_000_000
    page = output.read_text(encoding="utf-8")
    charts = len(re.findall(r"data-chart=", page))
    specs = json.loads(re.search(r'id="specs">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert charts == len(specs) > 8


def test_the_papers_table_is_shown_by_its_figures(tmp_path: Path) -> None:
    """Times there are of a sample, and every row's loss stands in the table."""
    path = next(path for path in RECORDS if path.name == "paper.json")
    output = tmp_path / "page.html"
    assert run("report", path, "-o", output)[0] == 0
    page = output.read_text(encoding="utf-8")
    assert "milliseconds per sample" in page
    assert "milliseconds per token" not in own(page)
    for row in json.loads(path.read_text(encoding="utf-8"))["results"]["decoder"]["table_1"]:
        assert f"{row['nats_per_token']['mean']:.4f}" in page
        assert row["model"] in page


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = own(text_of(inspected(), answered("m", 0.5), folder=tmp_path))
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert "@import" not in page
    assert "default-src 'none'" in page


EVIL = "<\\script><script>alert(1)<\\script><img src=x onerror=alert(2)>"


def test_text_of_records_is_never_markup(tmp_path: Path) -> None:
    page = own(text_of(inspected(EVIL), answered(EVIL, 0.5), folder=tmp_path))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    # It is still shown: in the charts' data as text.
    assert "\\u003cscript>alert(1)" in page


def test_memory_stops_at_a_window() -> None:
    layers = [layer("a", 4), layer("b", 2, window=100)]
    for context in (1, 50, 100, 101, 5000):
        wanted = sum(
            2 * heads * 8 * 2 for heads, kept in ((4, 10**9), (2, 100)) for token in range(context) if token < kept
        )
        assert _cache(layers, context) == wanted


def test_names_are_shortened_by_whole_words() -> None:
    assert _short(["model.layers.1.self_attn", "model.layers.12.self_attn"]) == ["1", "12"]
    assert _short(["d.0.self", "d.0.cross", "d.1.self"]) == ["0.self", "0.cross", "1.self"]
    assert _short(["one.name"]) == ["one.name"]


def test_many_heads_are_drawn_of_some_layers() -> None:
    layers = [{"name": str(number), "num_key_value_heads": 32} for number in range(40)]
    chosen = [int(one["name"]) for one in _some(layers)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 6000 // 32**2
    assert _some(layers[:3]) == layers[:3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("not valid JSON",)),
        ("[]", ("not a record", "list")),
        ('{"kind": "demo"}', ("not a record", "nothing as configuration")),
        (json.dumps(record("demo", {}, {}) | {"format": 2}), ("another format", "format 1")),
        (json.dumps(record("demo", {}, {})), ("lacks what its kind has", "demo", "rows")),
        (json.dumps(record("demo", {}, {"rows": 3})), ("lacks what its kind has", "record.json")),
        (json.dumps(record("nothing/known", {}, {})), ("anything to draw", "nothing/known")),
        ("", ("not valid JSON",)),
        ("[" * 100_000, ("not valid JSON", "recursion")),
        (json.dumps(answered("m", math.nan)), ("not valid JSON", "NaN is not a finite number")),
        (json.dumps(answered("m", math.inf)), ("not valid JSON", "Infinity is not a finite number")),
        (json.dumps(answered("m", 0.5)).replace("0.5", "1e400"), ("not valid JSON", "1e400")),
        (json.dumps(answered("m", 0.5)).replace("0.5", "1" + 400 * "0"), ("not valid JSON", "1000")),
        (json.dumps(answered("\ud800", 0.5)), ("not valid JSON", "surrogates")),
        (json.dumps(record("demo", {}, {}) | {"format": True}), ("another format", "True")),
        (json.dumps(record("demo", {}, {}) | {"machine": "Z80"}), ("not a record", "machine: Z80")),
        (json.dumps(record("demo", {}, {}) | {"versions": [3]}), ("not a record", "versions: [3]")),
        (json.dumps(record("demo", {}, {}) | {"date": 3}), ("not a record", "date: 3")),
        (json.dumps(record("benchmark/decode-runs", {}, {"runs": 3})), ("not a record", "runs: 3")),
        (json.dumps(record("benchmark/decode-runs", {}, {"runs": []})), ("not a record", "runs: []")),
        (json.dumps({"fingerprint": "f", "layers": [], "format": "regroup-plan/9"}), ("another format", "plan/9")),
        (json.dumps(record("inspect", {}, {"layers": []})), ("lacks what its kind has", "inspect")),
    ],
)
def test_what_is_no_record_is_refused(content: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path, output = tmp_path / "record.json", tmp_path / "report.html"
    path.write_text(content, encoding="utf-8")
    message = refused("report", path, "-o", output)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == [path]
    output.write_text("before")
    refused("report", path, "-o", output)
    assert output.read_text() == "before"


def planned(tmp_path: Path) -> dict[str, Any]:
    """A plan as the command writes it, with layers that differ, so that there is something to draw."""
    file = tmp_path / "plan.json"
    status, _, message = run("plan", tiny.save("llama", tmp_path / "parent"), "--layers", "0:3,1-2:2", "-o", file)
    assert status == 0, message
    return json.loads(file.read_text(encoding="utf-8"))


def advised(tmp_path: Path) -> dict[str, Any]:
    given = ("--hardware", "l4", "--context", 32, "--batch", 4, "--record", tmp_path / "advice.json")
    status, _, message = run("advise", tiny.save("llama", tmp_path / "parent"), *given)
    assert status == 0, message
    return json.loads((tmp_path / "advice.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("num_key_value_heads", -3, "layers[0].num_key_value_heads"),
        ("num_key_value_heads", 0, "layers[0].num_key_value_heads"),
        ("num_key_value_heads", 2.5, "layers[0].num_key_value_heads"),
        ("num_key_value_heads", "3", "layers[0].num_key_value_heads"),
        ("num_key_value_heads", True, "layers[0].num_key_value_heads"),
        ("num_key_value_heads", 4, "layers[0].num_key_value_heads: a divisor of 6"),
        ("num_key_value_heads", 12, "layers[0].num_key_value_heads: at most num_attention_heads"),
        ("num_attention_heads", -6, "layers[0].num_attention_heads"),
        ("original_num_key_value_heads", 1, "layers[0].num_key_value_heads: at most original_num_key_value_heads"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_file_and_field(
    name: str, value: object, field: str, tmp_path: Path
) -> None:
    plan = planned(tmp_path)
    file, output = tmp_path / "edited.json", tmp_path / "report.html"
    file.write_text(json.dumps(plan))
    assert run("report", file, "-o", output)[0] == 0  # the control
    output.unlink()
    plan["layers"][0][name] = value
    file.write_text(json.dumps(plan))
    message = refused("report", file, "-o", output)
    assert "holds an impossible value" in message
    assert str(file) in message
    assert field in message
    assert not output.exists()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


@pytest.mark.parametrize("kind", ["inspect", "task", "plan", "advise", "decode"])
def test_a_damaged_record_never_ends_in_a_traceback(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any field of any record set to what it should not be: a page or a refusal, and never a negative count."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "inspect": inspected,
        "task": lambda: answered("m", 0.5),
        "plan": lambda: planned(tmp_path),
        "advise": lambda: advised(tmp_path),
        "decode": lambda: json.loads((RECORDS[0].parent / "decode-llama-1b.json").read_text()),
    }
    monkeypatch.setattr("regroup.report.page._library", lambda: "")
    whole, draw = made[kind](), random.Random(0)
    places = sorted(leaves(whole), key=str)
    refusals: list[str] = []
    for place in draw.sample(places, min(20, len(places))):
        for value in draw.sample([-1, -0.5, 0, None, "x", [], {}, 1e308, [[]], True, "<script>"], 3):
            damaged = json.loads(json.dumps(whole))
            part = damaged
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            (path,) = write(tmp_path, damaged)
            try:
                records = read_records([path])
                sections, unused = made_of(records)
                render(sections, records, unused, "title")
            except RegroupError as error:
                refusals.append(str(error))
                continue
            counts = ("num_attention_heads", "num_key_value_heads", "kv_heads", "head_dim", "batch", "context")
            below = isinstance(value, (int, float)) and not isinstance(value, bool) and value < 1
            assert not (place[-1] in counts and below), (place, value)
    assert refusals
    assert all("record-0.json" in message for message in refusals)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"heads": {"model.layers.1.self_attn": -4}}, "heads.model.layers.1.self_attn"),
        ({"kv_heads": {"a": [4, 0]}}, "kv_heads.a[1]"),
        ({"seconds": {"convert": [1.0, -1.0]}}, "seconds.convert[1]"),
        ({"nats_per_token": {"mean": -1.0, "seeds": [1.0]}}, "nats_per_token.mean"),
        ({"excess_standard_error": -0.1}, "excess_standard_error"),
        ({"query_order": [1, -2]}, "query_order[1]"),
        ({"speedup_over_mha": -2.0}, "speedup_over_mha"),
        ({"layers": -1}, "layers"),
    ],
)
def test_numbers_in_tables_and_spreads_of_differences_are_looked_at(value: dict[str, Any], field: str) -> None:
    assert [place for place, _, _ in impossible({"results": value})] == [f"results.{field}"]
    # Controls: differences may be negative, in tables too, and what a table names itself goes by that name.
    fine = {"excess_nats_per_token": {"mean": -1.0}, "seconds": {"excess": -1.0, "name": "x"}, "heads": None}
    assert list(impossible(fine)) == []


def test_every_committed_record_is_plausible() -> None:
    for path in RECORDS:
        assert list(impossible(json.loads(path.read_text(encoding="utf-8")))) == [], path


def test_a_limit_of_address_space_is_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path, answered("m", 0.5))
    output = tmp_path / "report.html"
    words = f"{sys.executable} -m regroup.cli report {path} -o {output}"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 12000000; exec {words}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the charts cannot be made within the limit of address space")
    assert "12.3 GB (ulimit -v)" in done.stderr
    assert "ulimit -v unlimited" in done.stderr
    assert not output.exists()


def test_a_record_is_not_written_over(tmp_path: Path) -> None:
    paths = write(tmp_path, answered("m", 0.5), answered("n", 0.5))
    before = paths[1].read_bytes()
    assert "overwrite" in refused("report", *paths, "-o", paths[1])
    assert paths[1].read_bytes() == before


def test_an_output_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write(tmp_path, answered("m", 0.5))
    output = tmp_path / "report.html"
    output.write_text("before")

    def full(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in refused("report", path, "-o", output)
    assert output.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == sorted([path, output])


def test_names_are_as_long_as_they_must_be() -> None:
    places = ["run1/child", "/a/run2/child/", "parent", "org/model"]
    assert list(short_names(places).values()) == ["run1/child", "run2/child", "parent", "model"]
    assert short_names(["x/same", "x/same"]) == {"x/same": "same"}


def loss(model: str, value: float, *, data: str = "text.txt", teacher: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"nats_per_token": value, "standard_error": 0.01}
    if teacher is not None:
        found |= {"teacher_nats_per_token": 1.0, "teacher_standard_error": 0.02}
    done = {"model": model, "teacher": teacher, "data": data, "window": 512}
    return record("evaluate/language-modeling", done, found)


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    values = [loss("run1/child", 2.0, teacher="parent"), loss("run2/child", 3.0, teacher="parent")]
    page = text_of(*values, answered("run1/child", 0.5), answered("run2/child", 0.25), folder=tmp_path)
    for name in ("run1/child", "run2/child"):
        assert page.count(f"<td>{name}</td>") == 2
    assert page.count("<td>parent</td>") == 1
    # Each with its own interval.
    assert "<td>1.9804 – 2.0196</td>" in page
    assert "<td>0.9608 – 1.0392</td>" in page
    # The same model twice: told apart by its records.
    page = text_of(loss("child", 2.0), loss("child", 3.0), folder=tmp_path)
    assert "<td>child, record-0.json</td>" in page
    assert "<td>child, record-1.json</td>" in page


def test_losses_on_other_texts_are_not_compared(tmp_path: Path) -> None:
    page = text_of(loss("child", 2.0), loss("child", 3.0, data="other.txt"), folder=tmp_path)
    assert page.count("<h3>Loss on held-out text") == 2
    assert page.count("<td>child</td>") == 2


def test_a_single_row_has_no_interval(tmp_path: Path) -> None:
    value = answered("m", 0.5)
    value["results"]["metrics"]["f1"] |= {"low": None, "high": None}
    page = text_of(value, folder=tmp_path)
    assert "<td>0.500</td><td>–</td>" in page


def test_records_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for run_name in ("run1", "run2"):
        (tmp_path / run_name).mkdir()
        paths += write(tmp_path / run_name, answered(run_name, 0.5))
    assert [record.file for record in read_records(paths)] == ["run1/record-0.json", "run2/record-0.json"]
    # Given twice it is shown once.
    assert [record.file for record in read_records([paths[0], paths[0]])] == ["record-0.json"]


@pytest.mark.parametrize(("excess", "kind"), [(0.5, "log"), (-0.01, None)])
def test_losses_below_the_parents_have_no_logarithm(excess: float, kind: str | None, tmp_path: Path) -> None:
    row = {"num_key_value_heads": 2, "way": "ours", "standard_deviation": None, "seeds": 1}
    table = [row | {"tokens": tokens, "excess_nats_per_token": excess} for tokens in (0, 100)]
    (path,) = write(tmp_path, record("uptraining-curve", {"parent": "p"}, {"table": table}))
    (section,), _ = made_of(read_records([path]))
    chart = section.figures[0].chart
    assert chart is not None
    assert chart["layer"][0]["encoding"]["y"]["scale"].get("type") == kind


def test_an_unknown_kind_next_to_others_is_named(tmp_path: Path) -> None:
    paths = write(tmp_path, answered("m", 0.5), record("nothing/known", {}, {}))
    status, _, message = run("report", *paths, "-o", tmp_path / "report.html")
    assert status == 0
    assert "not shown on the page: record-1.json (nothing/known)" in message
    assert "record-1.json (nothing/known)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_too_much_for_a_page_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regroup.report.page.MOST_BYTES", 10_000)
    (path,) = write(tmp_path, answered("m", 0.5))
    assert "too large" in refused("report", path, "-o", tmp_path / "report.html")


def test_inspect_writes_a_record_that_the_page_shows(tmp_path: Path) -> None:
    import tiny

    original = tiny.save("llama", tmp_path / "parent")
    kept = tmp_path / "inspect.json"
    status, _, message = run("inspect", original, "--similarity", "-o", tmp_path / "plots", "--record", kept)
    assert status == 0, message
    (found,) = read_records([kept])
    sections, unused = made_of([found])
    assert [section.name for section in sections] == ["models", "similarity"]
    assert unused == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_figure_without_complaint(size: str, theme: str, tmp_path: Path) -> None:
    paths = [*RECORDS, *write(tmp_path, inspected(), answered("m", 0.5))]
    output = tmp_path / "report.html"
    status, _, _ = run("report", *paths, "-o", output)
    assert status == 0
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={size}",
        f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}",
        "--virtual-time-budget=30000",
        "--dump-dom",
        output.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    charts = len(re.findall(r'<div class="chart[^"]*" data-chart=', dom))
    assert charts > 10
    assert f'data-drawn="{charts}"' in dom
    assert f'data-theme="{theme}"' in dom
    drawings = re.findall(r'<svg[^>]* class="marks".*?</svg>', dom, re.S)
    assert len(drawings) == charts
    for drawing in drawings:
        marks = re.findall(r'class="mark-(?:symbol|rect|line|rule)[^>]*>.*?<path[^>]* d="M', drawing, re.S)
        assert marks, drawing[:300]
    if size.startswith("390"):
        # No chart is wider than the screen, which Chromium makes 500 wide at least.
        widths = [float(width) for width in re.findall(r'<svg[^>]* class="marks" width="([\d.]+)"', dom)]
        assert max(widths) < 500
