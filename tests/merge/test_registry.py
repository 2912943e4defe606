"""The registry is the one place where a merge method is named: an entry is enough, and nothing runs as another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regroup
from helpers import carried_out, layout_of, on_text, refused, run, tensors
from regroup.calibration.settings import Settings
from regroup.checkpoint import open_checkpoint
from regroup.merge import pool, sharing
from regroup.merge.registry import METHODS, MergeMethod, method
from regroup.merge.sharing import Sharing
from regroup.plans import LayerPlan, make_plan
from regroup.solver.heads import HeadWeights
from regroup.solver.rewrite import rewrites
from regroup.solver.solve import LayerSolver
from regroup.solver.statistics import weight_statistics
from teams import batches

Saved = Callable[[str], Path]


@pytest.mark.parametrize("name", METHODS)
def test_functions_exist_and_take_what_they_are_given(name: str) -> None:
    entry = METHODS[name]
    n, D = 3, 6
    grams, moments, owner = torch.eye(D).expand(n, D, D), torch.eye(n * D, dtype=torch.float64), [0, 1, 2]
    if entry.pool is not None:
        given: dict[str, Any] = {"std": 0.1, "generator": torch.Generator()} if entry.draws else {}
        assert entry.function("pool")(torch.ones(n, D, 5), **given).shape == (D, 5)
    for role, more in (("share", {}), ("share_rotary", {"pairs": "half", "dim": 4})):
        if getattr(entry, role) is not None:
            found = entry.function(role)(grams, moments, owner, **more)
            assert (found.reduce.shape, found.restore.shape) == ((D, n * D), (n, D, D))
        else:
            with pytest.raises(ValueError, match="has no function"):
                entry.function(role)
    assert METHODS[entry.norms].pool is not None
    assert entry.summary


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_method_converts_and_is_verified(name: str, family: str, saved: Saved, tmp_path: Path) -> None:
    status, _, err = run("convert", saved(family), tmp_path / "made", "--kv-heads", 2, "--method", name)
    assert status == 0, err
    assert run("verify", saved(family), tmp_path / "made")[0] == 0


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "neither pools"),
        ({"share": "lowrank:low_rank"}, "neither pools"),
        ({"pool": "pool:mean", "candidate": True}, "no linear form"),
    ],
)
def test_incomplete_entries_are_refused(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MergeMethod("new", "a method", **facts)
    MergeMethod("new", "a method", pool="pool:mean")  # the control


def median(heads: torch.Tensor) -> torch.Tensor:
    return heads.float().median(0).values.to(heads.dtype)


def test_an_entry_is_all_that_a_pooling_method_needs(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "median", median, raising=False)
    monkeypatch.setitem(METHODS, "median", MergeMethod("median", "the median of the heads", pool="pool:median"))
    folder = saved("llama")
    regroup.convert(folder, tmp_path / "made", kv_heads=2, method="median")
    before, after = tensors(folder), tensors(tmp_path / "made")
    D = layout_of(folder).layers[0].head_dim
    for name, tensor in before.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            expected = tensor.view(2, 3, D, -1).median(1).values.flatten(0, 1)
            assert torch.equal(after[name], expected)
            assert not torch.equal(expected, tensor.view(2, 3, D, -1).mean(1).flatten(0, 1))
        else:
            assert torch.equal(after[name], tensor)
    assert run("verify", folder, tmp_path / "made")[0] == 0
    assert "median" in refused("plan", folder, "--kv-heads", 2, "--method", "mode")


def keep_first(grams: torch.Tensor, moments: torch.Tensor, owner: list[int]) -> Sharing:
    """The first head, and queries as they are: no rotation, so not for RoPE."""
    n, D, _ = grams.shape
    reduce = torch.zeros(D, moments.shape[-1], dtype=torch.float64)
    reduce[:, :D] = torch.eye(D)
    return Sharing(reduce, torch.eye(D, dtype=torch.float64).expand(n, D, D).clone())


def test_an_entry_is_all_that_a_sharing_method_needs(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is solved, tried on text as a candidate, and refused where it has no form for rotated keys."""
    monkeypatch.setattr(sharing, "keep_first", keep_first, raising=False)
    monkeypatch.setattr(sharing, "keep_first_rotary", lambda *given, pairs, dim: keep_first(*given), raising=False)
    entry = MergeMethod("keep-first", "the first head", pool="pool:first", share="sharing:keep_first", candidate=True)
    monkeypatch.setitem(METHODS, "keep-first", entry)
    # A method that can do both pools where nothing has to be solved; alone it has to be solved.
    linear = replace(entry, name="only-share", pool=None, share_rotary="sharing:keep_first_rotary", norms="first")
    monkeypatch.setitem(METHODS, "only-share", linear)
    folder = saved("opt")
    regroup.convert(folder, tmp_path / "first", kv_heads=2, method="first")
    for name in ("keep-first", "only-share"):
        regroup.convert(folder, tmp_path / name, kv_heads=2, method=name)
        for tensor, value in tensors(tmp_path / "first").items():
            torch.testing.assert_close(tensors(tmp_path / name)[tensor], value)
    # On text it wins where all others are worse: they are told to be a thousand times as bad.
    for name in ("mean", "first", "lowrank", "procrustes", "only-share"):
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], handicap=1e3))
    plan = on_text(make_plan(layout_of(folder), 2))
    done = carried_out(folder, plan, tmp_path / "text", batches("opt", 4), settings=Settings(), device="cpu")
    assert {(w.key_method, w.value_method) for w in done.result.plan.layers} == {("keep-first", "keep-first")}
    # Rotated keys: not tried on text.
    rotated = saved("llama")
    done = carried_out(
        rotated, on_text(make_plan(layout_of(rotated), 2)), tmp_path / "rotated", batches("llama", 4), device="cpu"
    )
    assert {w.value_method for w in done.result.plan.layers} == {"keep-first"}
    assert "keep-first" not in {w.key_method for w in done.result.plan.layers}


def test_nothing_runs_as_another(saved: Saved) -> None:
    """Below the checks of a plan, too."""
    folder = saved("llama")
    checkpoint, layer = open_checkpoint(folder), layout_of(folder).layers[0]
    want = LayerPlan(layer.name, 6, 6, 2, "nonsense", "nonsense")
    weights = HeadWeights.read(layer, checkpoint.read)
    solver = LayerSolver(layer, want, weight_statistics(weights, want.order, 2))
    for solve in (solver.keys, solver.values):
        with pytest.raises(ValueError, match="'nonsense' is not a merge method"):
            solve("nonsense")
        with pytest.raises(ValueError, match="has no function"):
            solve("random")
        assert len(solve("lowrank")) == 2
    made, _ = rewrites(layer, want, checkpoint.tensors, std=0.1, seed=0)
    name = layer.key.weight.tensor
    with pytest.raises(ValueError, match="'nonsense' is not a merge method"):
        made[name].run(name, checkpoint.read)
    with pytest.raises(ValueError, match="'auto' is not a merge method"):
        method("auto")
