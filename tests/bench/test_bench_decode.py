"""``regroup bench decode`` on tiny models, from the command line: no timing is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quick import quick  # noqa: F401

import regroup.bench.decode as decoding
import tiny
from helpers import edit_json, everything, refused, run
from regroup.bench import machine
from regroup.bench import work as planned

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config alone, without weights."""
    path = tmp_path_factory.mktemp("configs") / "llama.json"
    path.write_text(json.dumps(json.loads(tiny.build("llama").config.to_json_string())))
    edit_json(path, architectures=["LlamaForCausalLM"])
    return path


def test_a_config_at_several_numbers_of_kv_heads(config: Path, tmp_path: Path) -> None:
    record_file, plot = tmp_path / "out" / "record.json", tmp_path / "out" / "figure.png"
    status, out, message = run(
        "bench", "decode", config, "--kv-heads", "6,2,1", "--batch", 2, "--prompt", 12, "--new", 4,
        "--baseline", "-o", record_file, "--plot", plot,
    )  # fmt: skip
    assert status == 0, message
    # The ceiling comes before what is measured.
    assert out.index("the ceiling") < out.index("first token")
    assert "weights are random" in out
    record = json.loads(record_file.read_text())
    assert record["kind"] == "benchmark/decode"
    assert record["configuration"]["model"] == "llama.json"
    models = record["results"]["models"]
    assert [model["kv_heads"] for model in models] == [6, 2, 1]
    layers, head_dim, cached = 3, 10, 12 + 4 - 1
    for model in models:
        ours = model["regroup"]
        assert ours["cache_bytes"] == 2 * layers * model["kv_heads"] * head_dim * cached * 2 * 4
        assert ours["cache_bytes"] == model["predicted_cache_bytes"]
        assert (ours["attention"], model["transformers"]["attention"]) == ("regroup", "sdpa")
        assert model["kv_read_bytes"] == 2 * layers * model["kv_heads"] * head_dim * (12 + 2) * 2 * 4
        speed = models[0]["regroup"]["token_ms"]["p50"] / ours["token_ms"]["p50"]
        assert ours["speedup_over_mha"] == pytest.approx(speed)
        assert ours["fraction_of_the_ceiling"] == pytest.approx(model["floor_ms"] / ours["token_ms"]["p50"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert everything(plot.parent) == ["figure.png", "record.json"]


def test_json_on_standard_output_is_nothing_else(config: Path) -> None:
    status, out, message = run("bench", "decode", config, "--prompt", 3, "--new", 2, "--json")
    assert status == 0
    assert json.loads(out)["results"]["models"][0]["kv_heads"] == 6
    assert "the ceiling" in message


def test_a_checkpoint_is_measured_with_its_weights(saved: Any, tmp_path: Path) -> None:
    status, out, message = run(
        "bench", "decode", saved("t5"), "--kv-heads", "6,1", "--prompt", 5, "--new", 3, "-o", tmp_path / "r.json"
    )
    assert status == 0, message
    assert "weights are random for KV heads 1\n" in out
    assert "encoder is not run" in out
    record = json.loads((tmp_path / "r.json").read_text())
    assert [model["weights"] for model in record["results"]["models"]] == ["the checkpoint's", "random"]
    assert str(saved("t5").parent) not in json.dumps(record)


def test_fewer_layers_are_reported(config: Path, tmp_path: Path) -> None:
    arguments = ("bench", "decode", config, "--layers", 2, "--prompt", 4, "--new", 2)
    status, out, message = run(*arguments, "-o", tmp_path / "r.json")
    assert status == 0, message
    assert "2 of the model's 3 layers" in out
    assert "nothing is extrapolated" in out
    found = json.loads((tmp_path / "r.json").read_text())["results"]["models"][0]
    assert (found["layers"], found["layers_of_the_model"]) == (2, 3)


def test_as_many_layers_as_memory_holds(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = planned.Work(1, 4, 2)
    one, three = (planned.memory_needed(planned.models_for(str(config), [1], work, layers=n)[0], work) for n in (1, 3))
    monkeypatch.setattr(planned, "free_memory", lambda _: int((one + 0.6 * (three - one)) / planned.USABLE))
    assert [model.layers for model in planned.models_for(str(config), [1], work)] == [2]
    status, out, _ = run("bench", "decode", config, "--kv-heads", 1, "--prompt", 4, "--new", 2, "--dry-run")
    assert status == 0
    assert "2 of the model's 3 layers" in out


@pytest.mark.parametrize("layers", [[], ["--layers", 3]])
def test_what_does_not_fit_into_memory(
    config: Path, layers: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "free_memory", lambda _: 1000)
    message = refused("bench", "decode", config, *layers, "--prompt", 4, "-o", tmp_path / "r.json")
    assert "does not fit into memory" in message
    assert "remedy:" in message
    assert everything(tmp_path) == []


def test_a_dry_run_measures_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "timed", None)
    monkeypatch.setattr(decoding, "build", None)
    status, out, _ = run(
        "bench", "decode", config, "--kv-heads", "6,1", "--prompt", 7, "--dry-run", "-o", tmp_path / "r.json"
    )
    assert status == 0
    assert "nothing was measured" in out
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-heads", "4"], ("divided into", "divisor of 6")),
        (["--kv-heads", "six"], ("not a list of integers",)),
        (["--kv-heads", "0"], ("divided into",)),
        (["--prompt", "0"], ("--prompt", "1 or more", "got:")),
        (["--new", "1"], ("--new", "2 or more")),
        (["--batch", "0"], ("--batch", "1 or more")),
        (["--repeats", "0"], ("--repeats",)),
        (["--prompt", "60", "--new", "5"], ("more positions", "at most 64", "65")),
        (["--layers", "4"], ("that many layers", "1 to 3")),
        (["--dtype", "int8"], ("unknown dtype",)),
        (["--device", "abacus"], ("device cannot be used",)),
        (["--plot", "figure.png"], ("two numbers", "--kv-heads")),
    ],
)
def test_impossible_requests(
    config: Path, options: list[str], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("bench", "decode", config, "-o", "r.json", *options)
    assert [word for word in words if word not in message] == []
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "perceptron"}, ("family is not known",)),
        ({"model_type": None}, ("family is not known",)),
        ({"architectures": ["LlamaForPoetry"]}, ("cannot build", "LlamaForPoetry")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("does not generate",)),
        ({"hidden_act": "bogus"}, ("cannot build",)),
    ],
)
def test_configs_that_cannot_be_built(config: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_json(config, **changes)
    message = refused("bench", "decode", config)
    assert [word for word in words if word not in message] == []


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "not a checkpoint" in refused("bench", "decode", tmp_path)
    assert "neither a local folder" in refused("bench", "decode", "no-such-model")
    (tmp_path / "config.json").write_text("{")
    refused("bench", "decode", tmp_path / "config.json")


def test_an_interruption_leaves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "_generate", stop)
    message = refused("bench", "decode", config, "--prompt", 3, "--new", 2, "-o", tmp_path / "r.json")
    assert "interrupted" in message
    assert everything(tmp_path) == []


def test_a_record_that_cannot_be_written_is_refused_first(config: Path, tmp_path: Path) -> None:
    assert "is a folder" in refused("bench", "decode", config, "-o", tmp_path)


def test_a_config_without_a_class_gets_its_familys(config: Path) -> None:
    edit_json(config, architectures=None)
    assert "architectures" not in json.loads(config.read_text())
    assert run("bench", "decode", config, "--prompt", 3, "--new", 2, "--dry-run")[0] == 0
