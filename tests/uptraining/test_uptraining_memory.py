"""What a run keeps in memory, and that keeping less changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from regroup.modeling import load
from regroup.opening import open_source
from regroup.uptraining import memory
from regroup.uptraining.memory import fitting_rows, keep_products_alone, let_go, mapped_ranges, row_bytes


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(48).reshape(2, 24)
    outputs = model(input_ids=ids, labels=ids, output_hidden_states=True)
    (outputs.loss + outputs.hidden_states[1].square().mean()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_what_is_computed_again_gives_the_same_gradients(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(shop)
    with open_source(str(shop / "child")) as source:
        layout = source.layout
    model = load(shop / "child", dtype=torch.float32, progress=False).train()
    wanted = gradients(model)
    assert not keep_products_alone(model, recipe, layout)  # it is small
    monkeypatch.setattr(memory, "_LARGE", 0)
    assert keep_products_alone(model, recipe, layout)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    found = gradients(model)
    assert all(torch.equal(left, right) for left, right in zip(wanted, found, strict=True))
    assert not keep_products_alone(model, replace(recipe, gradient_checkpointing=True), layout)


def test_mapped_weights_that_are_let_go_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    model = load(folder, dtype="auto", progress=False)
    before = [parameter.clone() for parameter in model.parameters()]
    ranges = mapped_ranges(model)
    monkeypatch.setattr(memory, "_LARGE", 0)
    let_go(ranges)
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))
    # Memory of the process's own is never among them.
    other = load(folder, dtype=torch.float64, progress=False)
    assert mapped_ranges(other) == []


def test_sequences_at_once_follow_from_their_activations(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(shop)
    with open_source(str(shop / "child")) as source:
        layout = source.layout
    row = row_bytes(recipe, layout)
    assert row_bytes(replace(recipe, dtype="bfloat16"), layout) * 2 == row
    for room, rows in ((8 * row, 8), (7 * row, 4), (3 * row, 3), (2 * row, 2), (row, 1), (1, 1)):
        monkeypatch.setattr(memory, "_CPU_BYTES", room)
        assert fitting_rows(recipe, layout, 8) == rows
