"""Recipes from YAML and from flags: what is read, what is refused, and what a family settles."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from regroup import RegroupError
from regroup.uptraining.defaults import resolved
from regroup.uptraining.recipe import Recipe

LEAST: dict[str, Any] = {"model": "child", "output": "out", "data": ["a.txt"]}


def written(tmp_path: Path, **settings: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST | settings))
    return path


def test_a_file_gives_what_flags_give(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: child\noutput: out\ndata: [a.txt, b.jsonl]\npretraining-tokens: 2T\nalpha: 0.05\n"
        "learning-rate: 1e-4\nreport-to: [wandb, tensorboard]\nteacher: parent\nbetas: [0.9, 0.99]\nfsdp: true\n"
        "teacher_cache: cache\nwindow: 1024\n"
    )
    flags = Recipe.load(
        model="child",
        output=Path("out"),
        data=["a.txt", "b.jsonl"],
        pretraining_tokens="2T",
        alpha=0.05,
        learning_rate=1e-4,
        report_to=("wandb", "tensorboard"),
        teacher="parent",
        betas=(0.9, 0.99),
        fsdp=True,
        teacher_cache=Path("cache"),
        window=1024,
        steps=None,
    )
    assert Recipe.load(path) == flags
    assert flags.pretraining_tokens == 2 * 10**12
    assert flags.output == Path("out")
    assert flags.data == ("a.txt", "b.jsonl")


def test_every_setting_can_be_written_and_read_again(tmp_path: Path) -> None:
    recipe = Recipe(
        **{
            **{field.name: field.default for field in fields(Recipe) if field.name not in LEAST},
            "model": "child",
            "output": Path("out"),
            "data": ("a.txt",),
            "steps": 3,
            "held_out": "b.txt",
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.to_json()))))
    assert Recipe.load(path) == recipe


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, alpha=0.05, pretraining_tokens="2T", seed=1, resume=True, top_k=5)
    recipe = Recipe.load(path, steps=10, seed=0, resume=False, top_k=None, data=())
    assert (recipe.alpha, recipe.steps, recipe.seed, recipe.resume, recipe.top_k) == (None, 10, 0, False, 5)
    assert recipe.data == ("a.txt",)
    assert Recipe.load(path).alpha == 0.05


def test_one_source_needs_no_list(tmp_path: Path) -> None:
    assert Recipe.load(written(tmp_path, data="a.txt")).data == ("a.txt",)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("learning-rte", 1, r"learning_rate[\s\S]*learning_rte"),
        ("zzz", 1, "one of model"),
        ("steps", "many", "whole number"),
        ("steps", 1.5, "whole number"),
        ("steps", True, "whole number"),
        ("steps", 0, "at least 1"),
        ("alpha", 0, "above 0"),
        ("alpha", 2, "at most 1"),
        ("warmup", -0.1, "at least 0"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", float("inf"), "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", [1], "a number"),
        ("dropout", 1, "below 1"),
        ("betas", [0.9], "2 number"),
        ("betas", [0.9, 1.0], "below 1"),
        ("betas", 3, "2 number"),
        ("window", 1, "at least 2"),
        ("fsdp", "yes", "true or false"),
        ("fsdp", 1, "true or false"),
        ("data", [1], "text"),
        ("data", 1, "list of text"),
        ("seed", None, "a value"),
        ("seed", 2**32, "at most 4294967295"),
        ("batch_size", -1, "at least 0"),
        ("batch_size", 2**63, "at most 9223372036854775807"),
        ("objective", "mlm", "span-corruption"),
        ("optimizer", "sgd", "adafactor"),
        ("schedule", "linear", "inverse-sqrt"),
        ("dtype", "int8", "bfloat16"),
        ("model", 7, "a text"),
        ("model", "", "a text"),
    ],
)
def test_settings_that_are_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match=words) as refusal:
        Recipe.load(written(tmp_path, **{key: value}))
    assert "recipe.yaml" in str(refusal.value)
    assert key.replace("-", "_") in str(refusal.value)
    if value is not None:
        with pytest.raises(RegroupError, match=words) as refusal:
            Recipe.load(written(tmp_path), **{key.replace("-", "_"): value})
        assert "recipe.yaml" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- model\n", "not a table"),
        ("1: 2\n", "not a table"),
        ("batch-size: 1\nbatch_size: 2\n", "twice"),
        ("", "model, output, data"),
        ("model: child\ndata: a.txt\n", "output"),
        ("model: child\noutput: out\ndata: []\n", "expected: data"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_files_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RegroupError, match=words.replace("expected: ", r"expected: +")):
        Recipe.load(path)


@pytest.mark.parametrize("key", ["stages", "local-share"])
def test_settings_of_earlier_states_are_told_what_replaces_them(key: str, tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match=r"not known[\s\S]*remedy: .*regroup convert with --calibration") as refusal:
        Recipe.load(written(tmp_path, **{key: "local"}))
    assert "recipe.yaml" in str(refusal.value)
    assert refusal.value.details["got"] == key.replace("-", "_")
    # The control: of another name nothing is said but what comes close to it.
    with pytest.raises(RegroupError, match="not known") as refusal:
        Recipe.load(written(tmp_path, stage="local"))
    assert "remedy" not in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RegroupError, match="cannot be read"):
        Recipe.load(tmp_path / "a.yaml")


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(RegroupError, match="trained on"):
        Recipe.load(path, held_out="./a.txt")
    assert Recipe.load(path, held_out="b.txt").held_out == "b.txt"


def test_the_digest_is_of_what_is_learnt() -> None:
    recipe = Recipe("child", Path("out"), ("a.txt",), steps=3)
    same = replace(recipe, output=Path("other"), device="cpu", log_every=1, micro_batch=1, workers=3)
    assert recipe.digest() == same.digest()
    for change in ({"seed": 1}, {"steps": 4}, {"data": ("b.txt",)}, {"window": 256}, {"teacher": "parent"}):
        assert replace(recipe, **change).digest() != recipe.digest()


def test_a_decoder_is_uptrained_with_adamw_and_a_cosine() -> None:
    recipe, chosen = resolved(Recipe("child", Path("out"), ("a.txt",)), "llama", False)
    assert (recipe.objective, recipe.optimizer, recipe.schedule) == ("causal", "adamw", "cosine")
    assert (recipe.learning_rate, recipe.weight_decay) == (3e-4, 0.1)
    assert [line.split(":")[0] for line in chosen] == [
        *("objective", "optimizer", "batch-size", "schedule", "learning-rate", "weight-decay"),
    ]
    # A second time nothing is left to choose.
    assert resolved(recipe, "llama", False) == (recipe, [])


def test_t5_resumes_from_its_last_step() -> None:
    recipe, _ = resolved(Recipe("child", Path("out"), ("a.txt",)), "t5", True)
    assert (recipe.objective, recipe.optimizer, recipe.schedule) == ("span-corruption", "adafactor", "inverse-sqrt")
    assert (recipe.original_steps, recipe.learning_rate, recipe.weight_decay) == (1_000_000, 0.001, 0.0)
    assert recipe.dropout is None
    early, _ = resolved(Recipe("child", Path("out"), ("a.txt",), original_steps=100), "t5", True)
    assert early.learning_rate == 0.01


def test_pairs_are_tuned_as_in_the_paper() -> None:
    recipe, _ = resolved(Recipe("child", Path("out"), ("a.tsv",), objective="pairs"), "t5", True)
    assert (recipe.optimizer, recipe.schedule, recipe.learning_rate, recipe.dropout) == (
        *("adafactor", "constant", 0.001, 0.1),
    )
    other, _ = resolved(Recipe("child", Path("out"), ("a.tsv",)), "bart", True)
    assert (other.objective, other.optimizer, other.schedule) == ("pairs", "adamw", "constant")


def test_what_was_asked_for_stays() -> None:
    asked = Recipe(
        "child",
        Path("out"),
        ("a.txt",),
        optimizer="adafactor",
        schedule="constant",
        learning_rate=0.5,
        weight_decay=0.3,
        teacher="parent",
        hidden_weight=0.5,
        batch_size=3,
        windows="packed",
    )
    recipe, chosen = resolved(asked, "llama", False)
    assert replace(recipe, objective="auto") == asked
    assert len(chosen) == 1


def test_hidden_states_are_matched_where_the_teacher_runs() -> None:
    distilled = Recipe("child", Path("out"), ("a.txt",), teacher="parent")
    recipe, chosen = resolved(distilled, "llama", False)
    assert recipe.hidden_weight == 10
    assert any("hidden-weight: 10" in line for line in chosen)
    cached = replace(distilled, teacher_cache=Path("cache"), top_k=8)
    assert resolved(cached, "llama", False)[0].hidden_weight == 0
    with pytest.raises(RegroupError, match="keeps no hidden states"):
        resolved(replace(cached, hidden_weight=1.0), "llama", False)
    assert resolved(replace(distilled, teacher=None), "llama", False)[0].hidden_weight is None
    with pytest.raises(RegroupError, match="hidden-weight"):
        resolved(replace(distilled, teacher=None, hidden_weight=1.0), "llama", False)


@pytest.mark.parametrize(
    ("settings", "family", "encoder_decoder", "words"),
    [
        ({"objective": "causal"}, "t5", True, "another kind"),
        ({"objective": "pairs"}, "llama", False, "another kind"),
        ({"objective": "span-corruption"}, "llama", False, "another kind"),
        ({"schedule": "inverse-sqrt"}, "llama", False, "--original-steps"),
        ({"top_k": 4}, "llama", False, "top-k"),
        ({"teacher_cache": Path("c")}, "llama", False, "teacher-cache"),
    ],
)
def test_settings_that_exclude_each_other(
    settings: dict[str, Any], family: str, encoder_decoder: bool, words: str
) -> None:
    with pytest.raises(RegroupError, match=words):
        resolved(Recipe("child", Path("out"), ("a.txt",), **settings), family, encoder_decoder)
