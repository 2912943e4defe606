"""Runs of a few steps: what is learned, what a break costs, and what lies in the folder at the end."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import runs
import tiny
from helpers import assert_same_tensors, config_of, copy, edit_json, everything, tensors
from regroup.errors import RegroupError
from regroup.modeling import load, load_tokenizer
from regroup.uptraining import run as run_module
from regroup.uptraining import states
from regroup.uptraining.objective import make_objective
from regroup.uptraining.run import uptrain
from regroup.uptraining.stream import open_stream
from regroup.uptraining.trainer import UptrainTrainer


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nothing interrupts, with a teacher: its output and its record."""
    output = tmp_path_factory.mktemp("whole") / "run"
    held_out = str(shop / "held-out.txt")
    given = {"output": output, "teacher": str(shop / "parent"), "held_out": held_out, "eval_every": 6}
    record = uptrain(runs.recipe(shop, **given)).record
    assert record is not None
    return output, record


class StopError(Exception):
    """Stands for whatever ends a process."""


def broken_off(monkeypatch: pytest.MonkeyPatch, recipe: Any, step: int) -> None:
    """Run until the loss of ``step`` was computed, and no further."""
    observe = UptrainTrainer._observe

    def stop(trainer: UptrainTrainer) -> Any:
        if trainer.state.global_step + 1 == step:
            raise StopError
        return observe(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(UptrainTrainer, "_observe", stop)
        with pytest.raises(StopError):
            uptrain(recipe)


# ---- what is learned -------------------------------------------------------------------------------------------------


def assert_trained_by_hand(
    record: Any,
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    result: Path,
) -> None:
    """Three steps of AdamW in a plain loop lead to the losses of a run and to the weights that it left."""
    decay = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    wanted = []
    for _, batch in zip(range(3), batches, strict=False):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert record is not None
    assert runs.losses(record) == pytest.approx(wanted, rel=1e-5)
    trained = tensors(result)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-5)


def test_cross_entropy_is_that_of_a_loop_written_by_hand(shop: Path, tmp_path: Path) -> None:
    recipe = runs.recipe(
        shop, output=tmp_path / "run", steps=3, schedule="constant", warmup=0.0, weight_decay=0.1, clip_norm=0.5
    )
    found = uptrain(recipe)
    model: Any = load(shop / "child", dtype=torch.float32)
    model.train()
    tokenizer = load_tokenizer(shop / "child")
    objective = make_objective("causal", tokenizer, window=32, isolate=True)
    stream = open_stream(recipe.data, tokenizer, objective, vocab_size=96)

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    assert_trained_by_hand(found.record, model, stream.batches(8), loss_of, tmp_path / "run/model")


def test_distillation_brings_the_student_nearer_to_its_teacher(whole: tuple[Path, dict[str, Any]]) -> None:
    results = whole[1]["results"]
    assert results["last_eval_kl"] < 0.7 * results["first_eval_kl"]
    assert results["last_eval_loss"] < results["first_eval_loss"]
    assert len([entry for entry in results["history"] if "eval_loss" in entry]) == 3
    assert results["teacher_flops"] > 0.2 * results["student_flops"]
    assert (results["steps"], results["tokens"], results["spikes"]) == (12, 12 * 8 * 32, 0)


def test_distillation_is_that_of_a_loop_written_by_hand(shop: Path, tmp_path: Path) -> None:
    given = {"teacher": str(shop / "parent"), "hidden_weight": 3.0, "distill_weight": 0.6, "clip_norm": 0.5}
    recipe = runs.recipe(shop, output=tmp_path / "run", steps=3, schedule="constant", warmup=0.0, **given)
    found = uptrain(recipe)
    model: Any = load(shop / "child", dtype=torch.float32)
    original: Any = load(shop / "parent", dtype=torch.float32)
    model.train()
    original.eval()
    tokenizer = load_tokenizer(shop / "child")
    stream = open_stream(
        recipe.data, tokenizer, make_objective("causal", tokenizer, window=32, isolate=True), vocab_size=96
    )

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        own = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            other = original(**inputs, output_hidden_states=True)
        asked = batch["labels"][:, 1:] != -100
        log_p, log_q = (out.logits[:, :-1][asked].log_softmax(-1) for out in (own, other))
        kl = functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        entropy = functional.nll_loss(log_p, batch["labels"][:, 1:][asked])
        pairs = zip(own.hidden_states[1:], other.hidden_states[1:], strict=True)
        kept = [(s[:, :-1][asked], t[:, :-1][asked]) for s, t in pairs]
        shares = [
            (s - t).norm(dim=-1) ** 2 / (s.detach().norm(dim=-1) ** 2 / 2 + t.norm(dim=-1) ** 2 / 2) for s, t in kept
        ]
        return 0.6 * kl + 0.4 * entropy + 3.0 * torch.stack(shares).mean()

    assert_trained_by_hand(found.record, model, stream.batches(8), loss_of, tmp_path / "run/model")


def test_hidden_states_can_be_left_out(shop: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    given = {"teacher": str(shop / "parent"), "hidden_weight": 0}
    record = uptrain(runs.recipe(shop, output=tmp_path / "run", **given)).record
    assert record is not None
    assert all("hidden_distance" not in entry for entry in record["results"]["history"])
    distances = [e["hidden_distance"] for e in whole[1]["results"]["history"] if "hidden_distance" in e]
    assert distances[-1] < 0.8 * distances[0]
    assert runs.losses(record)[0] < runs.losses(whole[1])[0]


def test_a_teacher_of_another_width_is_refused(shop: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(**{**tiny.FAMILIES["llama"].kwargs, "num_hidden_layers": 1})).save_pretrained(wide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shop / "parent" / name, wide / name)
    with pytest.raises(RegroupError, match="hidden states are of another shape") as error:
        uptrain(runs.recipe(shop, output=tmp_path / "run", teacher=str(wide)))
    assert "--hidden-weight 0" in str(error.value)
    done = uptrain(runs.recipe(shop, output=tmp_path / "run", teacher=str(wide), hidden_weight=0, steps=1))
    assert done.record is not None


def test_micro_batches_change_nothing(shop: Path, tmp_path: Path) -> None:
    teacher = {"teacher": str(shop / "parent"), "distill_weight": 0.5, "steps": 4}
    # Three windows at a time: two whole pieces and one of two.
    one, other = (
        uptrain(runs.recipe(shop, output=tmp_path / str(micro), micro_batch=micro, **teacher)).record
        for micro in (8, 3)
    )
    assert one is not None
    assert other is not None
    assert runs.losses(one) == pytest.approx(runs.losses(other), rel=1e-5)
    torch.testing.assert_close(tensors(tmp_path / "8/model"), tensors(tmp_path / "3/model"), rtol=1e-3, atol=1e-4)


def test_the_cache_replaces_the_teacher(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "teacher": str(shop / "parent"),
        "top_k": 8,
        "teacher_cache": tmp_path / "cache",
        "steps": 3,
        "temperature": 2.0,
    }
    first = uptrain(runs.recipe(shop, output=tmp_path / "a", **given)).record

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the teacher was asked")

    from regroup.uptraining.teacher import Teacher

    monkeypatch.setattr(Teacher, "model", property(refuse))
    second = uptrain(runs.recipe(shop, output=tmp_path / "b", micro_batch=4, **given)).record
    assert first is not None
    assert second is not None
    assert runs.losses(first) == pytest.approx(runs.losses(second), rel=1e-5)
    assert second["results"]["teacher_flops"] == 0
    with pytest.raises(RegroupError, match="belongs to another run"):
        uptrain(runs.recipe(shop, output=tmp_path / "c", **{**given, "seed": 1}))


# ---- breaks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 12])
def test_resuming_gives_the_same_bits(
    step: int, whole: tuple[Path, dict[str, Any]], shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = str(shop / "held-out.txt")
    given = {"output": tmp_path / "run", "teacher": str(shop / "parent"), "held_out": held_out, "eval_every": 6}
    recipe = runs.recipe(shop, **given)
    broken_off(monkeypatch, recipe, step)
    # Settings that do not change what is learned may change.
    done = uptrain(runs.recipe(shop, **given, keep=1, workers=1))
    assert done.resumed_from == {1: None, 7: 4, 12: 8}[step]
    assert_same_tensors(tensors(tmp_path / "run/model"), tensors(whole[0] / "model"))
    assert done.record is not None
    assert runs.losses(done.record) == runs.losses(whole[1])
    assert [path.name for _, path in states.complete(tmp_path / "run")] == ["checkpoint-12"]


def test_dropout_and_t5s_optimizer_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.pair(tmp_path, "bart")
    pairs = "".join(f"the cat {n}\tthe hat is flat {n * 7}\n" for n in range(120))
    (tmp_path / "train.tsv").write_text(pairs, encoding="utf-8")
    given = {
        "data": (str(tmp_path / "train.tsv"),),
        "optimizer": "adafactor",
        "schedule": "inverse-sqrt",
        "original_steps": 100,
        "steps": 4,
        "save_every": 2,
    }
    assert uptrain(runs.recipe(tmp_path, output=tmp_path / "a", **given)).recipe.dropout == 0.1
    broken_off(monkeypatch, runs.recipe(tmp_path, output=tmp_path / "b", **given), 4)
    uptrain(runs.recipe(tmp_path, output=tmp_path / "b", **given))
    assert_same_tensors(tensors(tmp_path / "a/model"), tensors(tmp_path / "b/model"))
    # With no dropout it would have been another model.
    uptrain(runs.recipe(tmp_path, output=tmp_path / "c", dropout=0.0, **given))
    with pytest.raises(AssertionError):
        assert_same_tensors(tensors(tmp_path / "a/model"), tensors(tmp_path / "c/model"))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "gpt_neox")]


@pytest.mark.parametrize("name", ["t5_v1_1", *SLOW])
def test_families_whose_tensors_change_names_resume_too(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    original, _ = runs.pair(tmp_path, name, "mixed")
    runs.text(tmp_path)
    given = {"steps": 3, "save_every": 1, "teacher": str(original), "held_out": str(tmp_path / "held-out.txt")}
    given |= {"optimizer": "auto"}
    whole = uptrain(runs.recipe(tmp_path, output=tmp_path / "a", **given))
    assert whole.record is not None
    results = whole.record["results"]
    assert results["last_eval_kl"] < results["first_eval_kl"]
    if name == "t5_v1_1":
        assert (whole.recipe.objective, whole.recipe.optimizer) == ("span-corruption", "adafactor")
    broken_off(monkeypatch, runs.recipe(tmp_path, output=tmp_path / "b", **given), 3)
    assert uptrain(runs.recipe(tmp_path, output=tmp_path / "b", **given)).resumed_from == 2
    assert_same_tensors(tensors(tmp_path / "a/model"), tensors(tmp_path / "b/model"))
    assert tensors(tmp_path / "a/model").keys() == tensors(tmp_path / "child").keys()
    assert config_of(tmp_path / "a/model") == config_of(tmp_path / "child")
    load(tmp_path / "a/model")


def test_a_finished_run_is_not_done_again(whole: tuple[Path, dict[str, Any]], shop: Path) -> None:
    output, record = whole
    held_out = str(shop / "held-out.txt")
    given = {"output": output, "teacher": str(shop / "parent"), "held_out": held_out, "eval_every": 6}
    before = everything(output)
    assert uptrain(runs.recipe(shop, **given)).record == json.loads(json.dumps(record))
    assert everything(output) == before


def test_a_break_before_the_result_is_written(
    whole: tuple[Path, dict[str, Any]], shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    held_out = str(shop / "held-out.txt")
    given = {"output": output, "teacher": str(shop / "parent"), "held_out": held_out, "eval_every": 6}
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "model")
    monkeypatch.setattr(UptrainTrainer, "train", lambda *arguments, **options: pytest.fail("trained again"))
    again = uptrain(runs.recipe(shop, **given))
    assert_same_tensors(tensors(output / "model"), tensors(whole[0] / "model"))
    assert again.record is not None
    assert again.record["results"]["last_eval_loss"] == whole[1]["results"]["last_eval_loss"]


def test_what_was_half_written_is_never_resumed_from(shop: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = runs.recipe(shop, output=tmp_path / "run", steps=6, save_every=2)
    broken_off(monkeypatch, recipe, 5)
    output = tmp_path / "run"
    # As a kill leaves them: in the middle of writing, and of removing.
    shutil.copytree(output / "checkpoint-4", output / ".saving/checkpoint-5")
    shutil.copytree(output / "checkpoint-4", output / ".removed-checkpoint-1")
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    (output / "checkpoint-5/uptrain_state.json").unlink()
    assert uptrain(recipe).resumed_from == 4
    assert [name for name in everything(output) if name.startswith(".")] == []


@pytest.mark.parametrize("where", ["optimizer", "model", "rename"])
def test_a_full_disk_leaves_the_last_state(where: str, shop: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = runs.recipe(shop, output=tmp_path / "run", steps=6, save_every=2)
    full = {
        "optimizer": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64: file write failed"),
        "model": OSError(errno.ENOSPC, "No space left on device"),
        "rename": OSError(errno.ENOSPC, "No space left on device"),
    }[where]
    target = {
        "optimizer": "transformers.trainer.Trainer._save_optimizer_and_scheduler",
        "model": "transformers.trainer.Trainer._save",
        "rename": "regroup.uptraining.states.write_text",
    }[where]
    count = 0
    import transformers.trainer

    original = states.write_text if where == "rename" else getattr(transformers.trainer.Trainer, target.split(".")[-1])

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == (3 if where == "rename" else 2):  # run.json is written in the same way
            raise full
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(RegroupError, match=r"could not be saved(.|\n)*resume from checkpoint-2"):
            uptrain(recipe)
    assert [path.name for _, path in states.complete(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run/.saving").exists()
    assert uptrain(recipe).resumed_from == 2


def test_a_loss_that_is_not_a_number_stops_the_run(shop: Path, tmp_path: Path, monkeypatch: Any) -> None:
    step = UptrainTrainer.training_step

    def poisoned(trainer: UptrainTrainer, model: Any, *arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == 4:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.nan
                model.get_input_embeddings().weight[:] = math.nan
        return step(trainer, model, *arguments, **options)

    monkeypatch.setattr(UptrainTrainer, "training_step", poisoned)
    with pytest.raises(RegroupError, match=r"not a number(.|\n)*step 5(.|\n)*checkpoint-4"):
        uptrain(runs.recipe(shop, output=tmp_path / "run", steps=6, save_every=2))
    assert not (tmp_path / "run/model").exists()


# ---- the result ------------------------------------------------------------------------------------------------------


def test_the_result_looks_like_the_source(whole: tuple[Path, dict[str, Any]], shop: Path) -> None:
    model, converted = whole[0] / "model", shop / "child"
    assert set(everything(model)) == set(everything(converted)) | {"README.md"}
    assert config_of(model) == config_of(converted)
    before, after = tensors(converted), tensors(model)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert "## Uptraining" in (model / "README.md").read_text(encoding="utf-8")
    assert "continue training before use" not in (model / "README.md").read_text(encoding="utf-8")
    stock = AutoModelForCausalLM.from_pretrained(model)
    assert_same_tensors({n: p for n, p in stock.state_dict().items() if n in after}, after)
    assert (whole[0] / "curve.png").stat().st_size > 10_000
    states_of = [load(path) for _, path in states.complete(whole[0])]
    assert len(states_of) == 2


def test_tensorboard_gets_the_losses(shop: Path, tmp_path: Path) -> None:
    uptrain(runs.recipe(shop, output=tmp_path / "run", steps=1, report_to=("tensorboard",)))
    assert list((tmp_path / "run/logs").glob("events.*"))


# ---- what is refused before the first step ---------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(shop: Path, tmp_path: Path) -> None:
    done = uptrain(runs.recipe(shop, output=tmp_path / "run"), dry_run=True)
    assert (done.model, done.record) == (None, None)
    assert any("3,072 tokens" in line for line in done.lines)
    assert everything(tmp_path) == []


def test_other_settings_do_not_continue_a_run(whole: tuple[Path, dict[str, Any]], shop: Path) -> None:
    with pytest.raises(RegroupError, match=r"run with other settings(.|\n)*learning_rate: 0.001 → 0.002") as error:
        uptrain(runs.recipe(shop, output=whole[0], learning_rate=2e-3))
    assert "--output" in str(error.value)


def test_two_processes_do_not_run_in_one_folder(shop: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    recipe = runs.recipe(shop, output=output, steps=1)
    # A lock belongs to the opened file, so that one process stands for two here.
    with states.begun(output, {"format": 1, "digest": uptrain(recipe, dry_run=True).recipe.digest()}):
        with pytest.raises(RegroupError, match="another process is running"):
            uptrain(recipe)
        assert everything(output) == ["run.json"]
        assert uptrain(recipe, dry_run=True).model is None
    assert uptrain(recipe).model is not None
    with states.locked(output / "run.json"):  # a run that has ended holds no lock
        pass


def test_a_run_locks_its_folder_until_it_ends(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    recipe = runs.recipe(shop, output=output, steps=2, save_every=1)
    observe = UptrainTrainer._observe
    refused = []

    def second(trainer: UptrainTrainer) -> Any:
        with pytest.raises(RegroupError, match="another process is running") as error:
            uptrain(recipe)
        refused.append(error)
        return observe(trainer)

    monkeypatch.setattr(UptrainTrainer, "_observe", second)
    assert uptrain(recipe).model is not None
    assert len(refused) == 2
    monkeypatch.undo()
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-2")
    broken_off(monkeypatch, recipe, 2)
    assert uptrain(recipe).resumed_from == 1


def test_a_folder_that_appears_meanwhile_is_refused(shop: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Another process begins, and is killed, while this one reads its data: what it found is not what is there."""
    recipe = runs.recipe(shop, output=tmp_path / "run", steps=4, save_every=2)
    prepare = run_module.prepare

    def meanwhile(recipe: Any, **options: Any) -> Any:
        ready = prepare(recipe, **options)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "prepare", prepare)
            broken_off(monkeypatch, recipe, 4)
        return ready

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare", meanwhile)
        with pytest.raises(RegroupError, match="meanwhile"):
            uptrain(recipe)
    assert [step for step, _ in states.complete(tmp_path / "run")] == [2]
    assert uptrain(recipe).resumed_from == 2


def test_an_occupied_folder_is_refused(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").write_text("")
    with pytest.raises(RegroupError, match=r"holds something else(.|\n)*love.txt"):
        uptrain(runs.recipe(shop, output=tmp_path / "letters"))
    with pytest.raises(RegroupError, match="is a file"):
        uptrain(runs.recipe(shop, output=tmp_path / "letters/love.txt"))


def test_a_teacher_of_another_vocabulary_is_refused(shop: Path, tmp_path: Path) -> None:
    other = copy(shop / "parent", tmp_path / "other")
    edit_json(other / "config.json", vocab_size=128)
    with pytest.raises(RegroupError, match=r"another vocabulary(.|\n)*96 tokens(.|\n)*128"):
        uptrain(runs.recipe(shop, output=tmp_path / "run", teacher=str(other)))
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(shop: Path, tmp_path: Path) -> None:
    other = copy(shop / "parent", tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = text["model"]["vocab"]
    words["a"], words["t"] = words["t"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(RegroupError, match="tokenizer"):
        uptrain(runs.recipe(shop, output=tmp_path / "run", teacher=str(other)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 65}, r"longer than the model's positions(.|\n)*--window 64"),
        ({"teacher_cache": "cache"}, r"largest logits alone(.|\n)*--top-k"),
        ({"top_k": 96}, "not that many tokens"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], words: str, shop: Path, tmp_path: Path) -> None:
    given = {"teacher": str(shop / "parent"), **changes}
    with pytest.raises(RegroupError, match=words):
        uptrain(runs.recipe(shop, output=tmp_path / "run", **given), dry_run=True)


def test_a_full_disk_is_refused(shop: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("regroup.uptraining.checks.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(RegroupError, match="too little room"):
        uptrain(runs.recipe(shop, output=tmp_path / "run"))


def test_the_end_of_the_data_ends_the_run(shop: Path, tmp_path: Path) -> None:
    done = uptrain(runs.recipe(shop, output=tmp_path / "run", steps=40, save_every=100))
    assert any("it ends where the data end" in line for line in done.lines)
    assert done.record is not None
    steps = done.record["results"]["steps"]
    assert 20 < steps < 40
    assert done.record["results"]["data_ended"]
    assert (tmp_path / f"run/checkpoint-{steps}").is_dir()
