"""Calibrated conversions that are killed resume at the layer where they stopped, with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import faults
import regroup
import tiny
from helpers import carried_out, digests, layout_of, on_text, refused, run
from regroup.calibration.calibrate import Calibrated, calibrate
from regroup.calibration.layer_converter import LayerConverter
from regroup.calibration.settings import Settings
from regroup.checkpoint import open_checkpoint
from regroup.listener import Listener
from regroup.plans import LayerPlan, Plan, make_plan
from regroup.solver.solve import LayerSolution
from regroup.solver.store import SolutionStore
from regroup.writer.journal import JOURNAL_FILE, SOLVED_FOLDER
from teams import batches

Saved = Callable[[str], Path]
PARENT = Path(regroup.__path__[0]) / "demo" / "parent"
WORDS = ("--kv-heads", 2, "--calibration-tokens", 1024, "--calibration-window", 64, "--device", "cpu")
# Of one method, which is quicker; `auto` is resumed on smaller models.
ONE_METHOD = ("--method", "lowrank", "--grouping", "contiguous")


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may be done about it."""


class Notes(Listener):
    """Keeps the notices."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def notice(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention layers that are solved from now on."""
    names: list[str] = []
    real = LayerConverter.convert

    def spy(self: Any, student: Any, layers: Any, *rest: Any) -> Any:
        names.append(layers[-1].name)
        return real(self, student, layers, *rest)

    monkeypatch.setattr(LayerConverter, "convert", spy)
    return names


def plan_of(folder: Path) -> Plan:
    """All layers but the first attention layer are narrowed, which so has to be passed through on the way."""
    plan = on_text(make_plan(layout_of(folder), 2 if "gpt2" not in folder.name else 3, method="auto"))
    first = plan.layers[0]
    kept = replace(first, num_key_value_heads=first.original_num_key_value_heads)
    return replace(plan, layers=(kept, *plan.layers[1:]))


def outcome(found: Calibrated) -> tuple[Any, ...]:
    return found.plan, found.outcomes, found.kl


@pytest.mark.parametrize("name", ["llama", "t5", "phi_norm"])
@pytest.mark.parametrize("states", [True, False], ids=["hidden states kept", "layers run again"])
def test_a_store_with_some_layers_leads_to_the_same_bits(
    name: str, states: bool, saved: Saved, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of layers that are kept: what is left is solved as if nothing had happened."""
    folder = saved(name)
    checkpoint, layout, plan = open_checkpoint(folder), layout_of(folder), plan_of(folder)
    data = batches(name, 4)

    def calibrated(place: Path) -> Calibrated:
        return calibrate(checkpoint, layout, plan, data, SolutionStore(place), Settings())

    whole = tmp_path / "whole"
    whole.mkdir()
    expected = calibrated(whole)
    order = list(solved)
    assert order == [want.name for want in plan.layers if want.changes]
    for count in range(1, len(order) + 1):
        part = tmp_path / str(count)
        part.mkdir()

        def until(
            self: SolutionStore, layer: str, solution: Any, count: int = count, keep: Any = SolutionStore.keep
        ) -> None:
            if len(self.names()) == count:
                raise KilledError
            keep(self, layer, solution)

        with monkeypatch.context() as patch:
            patch.setattr(SolutionStore, "keep", until)
            if count < len(order):
                with pytest.raises(KilledError):
                    calibrated(part)
            else:
                calibrated(part)
        if not states:
            (part / "states.safetensors").unlink()
        # A file that was being written when the run was killed.
        (part / f"{order[-1]}.part").write_bytes(b"half")
        solved.clear()
        found = calibrated(part)
        # A decoder layer is solved as a whole: the attention layers of one that is not complete are solved again.
        again = [
            layer for layer in order if layout.layers[index_of(layout, layer)].index >= first_left(layout, order, count)
        ]
        assert solved == again
        assert outcome(found) == outcome(expected)
        assert {name: digests(part)[f"{name}.safetensors"] for name in order} == {
            name: digests(whole)[f"{name}.safetensors"] for name in order
        }


def index_of(layout: Any, name: str) -> int:
    return [layer.name for layer in layout.layers].index(name)


def first_left(layout: Any, order: list[str], count: int) -> int:
    """The first decoder layer with an attention layer that is not solved."""
    left = [layout.layers[index_of(layout, name)].index for name in order[count:]]
    return min(left, default=len(layout.layers))


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(Path(__file__).read_text() * 4)
    return path


def killed(target: Path, words: tuple[Any, ...], layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that is killed outright after so many layers, which leaves its hidden folder."""
    keep, remove = SolutionStore.keep, shutil.rmtree

    def until(self: SolutionStore, layer: str, solution: Any) -> None:
        keep(self, layer, solution)
        if len(self.names()) == layers:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(SolutionStore, "keep", until)
        patch.setattr(
            shutil, "rmtree", lambda path, **options: None if ".regroup-" in str(path) else remove(path, **options)
        )
        with pytest.raises(KilledError):
            run("convert", PARENT, target, *words)


def test_the_command_resumes_at_the_layer_where_it_stopped(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*WORDS, *ONE_METHOD, "--calibration", text_file(tmp_path))
    status, _, err = run("convert", PARENT, tmp_path / "expected", *words)
    assert status == 0, err
    names = list(solved)
    killed(tmp_path / "converted", words, 3, monkeypatch)
    (journal,) = tmp_path.glob(f".converted.*/{JOURNAL_FILE}")
    assert len(SolutionStore(journal.parent / SOLVED_FOLDER).names()) == 3
    # Other text is another conversion; the control, on a copy of what was left.
    (tmp_path / "other").mkdir()
    shutil.copytree(journal.parent, tmp_path / "other" / journal.parent.name)
    solved.clear()
    status, _, err = run("convert", PARENT, tmp_path / "converted", *words)
    assert status == 0, err
    assert "3 attention layers are solved" in err
    assert "it resumes from there" in err
    assert solved == names[3:]
    assert digests(tmp_path / "converted") == digests(tmp_path / "expected")
    assert faults.below(tmp_path) == ["converted", "expected", "other", "text.txt"]
    changed = tmp_path / "changed.txt"
    changed.write_text("Other words. " + text_file(tmp_path).read_text())
    solved.clear()
    status, _, err = run("convert", PARENT, tmp_path / "other" / "converted", *words[:-1], changed)
    assert status == 0, err
    assert "it had another plan, so it starts anew" in err
    assert solved == names


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def relabelled(path: Path, source: Path, said: object) -> None:
    """Valid safetensors with what another file holds."""
    save_file(load_file(source), path, {"regroup": json.dumps(said)})


FIRST, SECOND = (f"model.layers.{number}.self_attn" for number in (0, 1))
DAMAGES: list[Callable[[Callable[[str], Path]], object]] = [
    lambda of: cut(of(FIRST), 0),
    lambda of: cut(of(FIRST), 100),
    lambda of: cut(of(FIRST), -1),
    lambda of: shutil.copy(of(SECOND), of(FIRST)),
    lambda of: relabelled(of(FIRST), of(FIRST), {"want": {"name": FIRST}, "outcome": None}),
    lambda of: save_file({}, of(FIRST)),
]


def test_damaged_solutions_are_discarded_and_others_kept(tmp_path: Path) -> None:
    store, solution = SolutionStore(tmp_path), {FIRST: torch.ones(2, 4), SECOND: torch.ones(3)}
    specs = {FIRST: ("F32", (2, 4)), SECOND: ("F32", (3,))}
    for damage in DAMAGES:
        for name, tensor in solution.items():
            store.keep(name, LayerSolution(LayerPlan(name, 4, 4, 2), {name: tensor}, None))
        store.discard_damaged(specs)
        assert store.names() == [FIRST, SECOND]
        damage(store.path)
        store.discard_damaged(specs)
        assert store.names() == [SECOND]
    store.discard_damaged(specs | {SECOND: ("F32", (4,))})
    assert store.names() == []


def test_hidden_states_of_other_batches_are_not_used(tmp_path: Path) -> None:
    store, states = SolutionStore(tmp_path), [torch.ones(2, 3), torch.ones(1, 3)]
    store.keep_states(1, states, states)
    kept = store.load_states(states)
    assert kept is not None
    assert kept[0] == 1
    assert all(map(torch.equal, [*kept[1], *kept[2]], states * 2))
    assert store.load_states(states[:1]) is None
    assert store.load_states([torch.ones(2, 3), torch.ones(1, 4)]) is None
    cut(store.path("states"), 100)
    store.discard_damaged({})
    assert store.load_states(states) is None


def test_what_a_faulty_disk_damaged_is_solved_again(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*WORDS, *ONE_METHOD, "--calibration", text_file(tmp_path))
    status, _, err = run("convert", PARENT, tmp_path / "expected", *words)
    assert status == 0, err
    killed(tmp_path / "converted", words, 3, monkeypatch)
    (folder,) = tmp_path.glob(f".converted.*/{SOLVED_FOLDER}")
    store = SolutionStore(folder)
    shutil.copy(store.path(SECOND), store.path(FIRST))
    cut(store.path("states"), 1000)
    (journal,) = tmp_path.glob(f".converted.*/{JOURNAL_FILE}")
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "finished": [{}, [], 1]}))
    solved.clear()
    status, _, err = run("convert", PARENT, tmp_path / "converted", *words)
    assert status == 0, err
    assert "2 attention layers are solved and 0 of 1 weight files are finished" in err
    assert FIRST in solved
    assert digests(tmp_path / "converted") == digests(tmp_path / "expected")
    assert faults.below(tmp_path) == ["converted", "expected", "text.txt"]


def test_ctrl_c_keeps_what_is_solved(tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PARENT
    plan = on_text(make_plan(layout_of(folder), 2, method="lowrank"))
    data = [{"input_ids": torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)]
    carried_out(folder, plan, tmp_path / "expected", data, device="cpu")
    names = list(solved)
    keep = SolutionStore.keep

    def until(self: SolutionStore, layer: str, solution: Any) -> None:
        if len(self.names()) == 2:
            raise KeyboardInterrupt
        keep(self, layer, solution)

    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(SolutionStore, "keep", until)
        with pytest.raises(KeyboardInterrupt):
            carried_out(folder, plan, tmp_path / "converted", data, device="cpu", listener=notes)
    assert "the same command resumes" in notes.notes[-1]
    solved.clear()
    carried_out(folder, plan, tmp_path / "converted", data, device="cpu")
    assert solved == names[2:]
    assert digests(tmp_path / "converted") == digests(tmp_path / "expected")
    # Before a layer is solved there is nothing to keep.
    with monkeypatch.context() as patch:
        patch.setattr(LayerConverter, "observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            carried_out(folder, plan, tmp_path / "nothing", data, device="cpu")
    assert faults.below(tmp_path) == ["converted", "expected"]


@pytest.mark.parametrize("method", ["lowrank", "text"])
def test_a_solved_layer_is_complete(method: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing of a layer is not made up by other means."""
    folder, keep = saved("llama"), SolutionStore.keep
    plan = make_plan(layout_of(folder), 2, method="lowrank")
    plan, data = (on_text(plan), batches("llama", 4)) if method == "text" else (plan, [])
    lost = layout_of(folder).layers[1].key.weight.tensor

    def without(self: SolutionStore, layer: str, solution: Any) -> None:
        tensors = {name: value for name, value in solution.tensors.items() if name != lost}
        keep(self, layer, replace(solution, tensors=tensors))

    with monkeypatch.context() as patch:
        patch.setattr(SolutionStore, "keep", without)
        with pytest.raises(regroup.RegroupError, match="lacks a tensor") as error:
            carried_out(folder, plan, tmp_path / "converted", data, device="cpu")
    assert lost in str(error.value)
    assert faults.below(tmp_path) == []
    carried_out(folder, plan, tmp_path / "converted", data, device="cpu")  # the control


def test_a_plan_reproduces_its_result(tmp_path: Path) -> None:
    """The plan in a converted model leads to the same bits, with the text wherever it is now, and with no other."""
    text = text_file(tmp_path)
    status, _, err = run("convert", PARENT, tmp_path / "first", *WORDS, "--calibration", text, "--repair", "none")
    assert status == 0, err
    plan = tmp_path / "first" / "regroup_plan.json"
    said = json.loads(plan.read_text())
    assert (said["repair"], said["grouping"], said["layers"][0]["key_method"]) == ("none", "search", "auto")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    text.rename(moved / "moved.txt")
    message = refused("convert", PARENT, tmp_path / "second", "--plan", plan)
    assert "text.txt" in message
    assert "--calibration" in message
    again = ("--plan", plan, "--calibration", moved / "moved.txt", "--device", "cpu")
    status, _, err = run("convert", PARENT, tmp_path / "second", *again)
    assert status == 0, err
    assert digests(tmp_path / "second") == digests(tmp_path / "first")
    message = refused("convert", PARENT, tmp_path / "third", *again, "--calibration-tokens", 4096)
    assert "different calibration tokens" in message
    assert "1024" in message
    (moved / "moved.txt").write_text("Other words. " * 4000)
    assert "not the calibration text of the plan" in refused("convert", PARENT, tmp_path / "third", *again)
    # Next to its text a plan needs no more.
    shutil.copy(plan, moved / "plan.json")
    (moved / "text.txt").write_text(Path(__file__).read_text() * 4)
    status, _, err = run("convert", PARENT, tmp_path / "third", "--plan", moved / "plan.json", "--device", "cpu")
    assert status == 0, err
    assert digests(tmp_path / "third") == digests(tmp_path / "first")
    inputs = tiny.inputs("llama", 1, 5)["input_ids"]
    assert regroup.load(tmp_path / "third", progress=False)(input_ids=inputs).logits.isfinite().all()
