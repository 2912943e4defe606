"""``regroup inspect --similarity``: numbers against singular values of the weights, pictures, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

import tiny
from helpers import config_of, copy, everything, head_map, layout_of, refused, run, tensors, write
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint
from regroup.solver.similarity import LayerSimilarity, compare_heads

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]
NORMED = {"qwen3", "phi_norm", "stablelm_norm", "olmo2", "cohere_norm"}


def compared(folder: Path) -> list[LayerSimilarity]:
    return compare_heads(open_checkpoint(folder), layout_of(folder))


def tail(rows: Tensor, keep: int) -> tuple[float, float]:
    """Energy of all but the largest singular values, and of all."""
    powers = torch.linalg.svdvals(rows).square()
    return float(powers[keep:].sum()), float(powers.sum())


def by_hand(state: dict[str, Tensor], layer: int, heads: list[int], D: int, half: bool = True) -> tuple[float, ...]:
    """Lost and total, of keys and of values, when these heads of a multi-head Llama share one."""

    def weight(part: str) -> Tensor:
        return state[f"model.layers.{layer}.self_attn.{part}_proj.weight"].double()

    q, k, v = (weight(part).unflatten(0, (-1, D)) for part in "qkv")
    o = weight("o").unflatten(1, (-1, D))
    values = tail(torch.cat([o[:, h] @ v[h] for h in heads]), D)
    keys = [0.0, 0.0]
    for f in range(D // 2):
        i, j = (f, f + D // 2) if half else (2 * f, 2 * f + 1)
        size = [(q[h, i].square().sum() + q[h, j].square().sum()).sqrt() for h in heads]
        rows = torch.stack([s * torch.complex(k[h, i], k[h, j]) for s, h in zip(size, heads, strict=True)])
        lost, total = tail(rows, 1)
        keys = [keys[0] + lost, keys[1] + total]
    return (*keys, *values)


def test_numbers_are_those_of_singular_values(saved: Saved) -> None:
    folder, D = saved("llama"), tiny.FAMILIES["llama"].head_dim
    state, found = tensors(folder), compared(folder)
    assert [(layer.name, layer.index) for layer in found] == [(f"model.layers.{i}.self_attn", i) for i in range(3)]
    for layer in found:
        assert layer.key is not None
        assert layer.value is not None
        assert layer.both is not None
        for a in range(6):
            for b in range(6):
                expected = by_hand(state, layer.index, [a, b], D) if a != b else (0.0, 1.0, 0.0, 1.0)
                shares = expected[0] / expected[1], expected[2] / expected[3]
                got = float(layer.key.pairs[a, b]), float(layer.value.pairs[a, b])
                assert got == pytest.approx(shares, rel=1e-9)
                assert float(layer.both.pairs[a, b]) == pytest.approx(sum(shares) / 2, rel=1e-9)
        assert list(layer.key.contiguous) == [3, 2, 1]
        for groups in (3, 2, 1):
            sums = torch.zeros(4, dtype=torch.float64)
            for g in range(groups):
                members = list(range(6 // groups * g, 6 // groups * (g + 1)))
                sums += torch.tensor(by_hand(state, layer.index, members, D), dtype=torch.float64)
            assert layer.key.contiguous[groups] == pytest.approx(float(sums[0] / sums[1]), rel=1e-9)
            assert layer.value.contiguous[groups] == pytest.approx(float(sums[2] / sums[3]), rel=1e-9)
    # Other pairs of dimensions, and heads of another layer, give other numbers.
    assert found[0].key is not None
    lost, total, _, _ = by_hand(state, 0, [0, 1], D, half=False)
    assert float(found[0].key.pairs[0, 1]) != pytest.approx(lost / total, rel=1e-3)
    lost, total, _, _ = by_hand(state, 1, [0, 1], D)
    assert float(found[0].key.pairs[0, 1]) != pytest.approx(lost / total, rel=1e-3)


@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_every_family_is_compared_or_says_why_not(name: str, saved: Saved) -> None:
    if name == "olmo":
        with pytest.raises(RegroupError, match=r"no layer of this model.*\n[\s\S]*clip_qkv"):
            compared(saved(name))
        return
    found, family = compared(saved(name)), tiny.FAMILIES[name]
    assert len(found) == len(family.attention_modules)
    for layer in found:
        G = family.num_key_value_heads
        assert layer.num_key_value_heads == G
        assert layer.value is not None
        assert layer.value_obstacle is None
        assert (layer.key is None, layer.both is None) == (name in NORMED, name in NORMED)
        assert (layer.key_obstacle is not None) == (name in NORMED)
        for part in (layer.key, layer.value, layer.both):
            if part is None:
                continue
            assert part.pairs.shape == (G, G)
            assert list(part.contiguous) == [g for g in range(G - 1, 0, -1) if G % g == 0]
            shares = list(part.contiguous.values())
            # Fewer heads, greater loss.
            assert shares == sorted(shares)
            assert 0 < part.least <= part.median <= float(part.pairs.max()) <= 0.5
            assert float(part.pairs[part.most_similar]) == part.least


def test_a_grouped_parent_counts_every_query_head(saved: Saved, tmp_path: Path) -> None:
    """The same model with its KV heads repeated: pairs that were of heads apart are the same."""
    state, config = tensors(saved("llama_grouped")), config_of(saved("llama_grouped"))
    repeated = {
        name: tensor.unflatten(0, (6, 6)).repeat_interleave(2, 0).flatten(0, 1)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else tensor
        for name, tensor in state.items()
    }
    twice = compared(write(tmp_path / "twice", config | {"num_key_value_heads": 12}, repeated))
    for once, double in zip(compared(saved("llama_grouped")), twice, strict=True):
        assert once.key is not None
        assert once.value is not None
        assert double.key is not None
        assert double.value is not None
        for g in (3, 2, 1):
            assert once.key.contiguous[g] == pytest.approx(double.key.contiguous[g], rel=1e-9)
            assert once.value.contiguous[g] == pytest.approx(double.value.contiguous[g], rel=1e-9)
        assert double.key.contiguous[6] == pytest.approx(0, abs=1e-9)
        assert double.key.least < 1e-12


def test_a_copied_head_is_found(saved: Saved, tmp_path: Path) -> None:
    folder, D = copy(saved("llama"), tmp_path / "x"), tiny.FAMILIES["llama"].head_dim
    state = tensors(folder)
    for part in "kv":
        weight = state[f"model.layers.1.self_attn.{part}_proj.weight"]
        weight[D : 2 * D] = weight[:D]
    write(folder, config_of(folder), state)
    before, after = compared(saved("llama")), compared(folder)
    changed = after[1].both
    assert changed is not None
    assert changed.most_similar == (0, 1)
    assert changed.least < 1e-12
    others = changed.pairs[torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)]
    assert float(others.sort().values[1]) > 1e-2
    for number in (0, 2):
        old, new = before[number].both, after[number].both
        assert old is not None
        assert new is not None
        assert torch.equal(old.pairs, new.pairs)
        assert old.least > 1e-2


@pytest.mark.parametrize("name", ["llama", "bart", "qwen3"])
def test_pictures(name: str, saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "plots"
    status, out, message = run("inspect", saved(name), "--similarity", "-o", folder)
    assert status == 0, message
    assert "overview.png" in message
    modules = head_map(name, "all")
    kinds = ["cross" if "encoder_attn" in module else "self" for module in modules]
    per_layer = len(set(kinds))
    names = [f"layer-{number // per_layer:02}-{kind}.png" for number, kind in enumerate(kinds)]
    assert everything(folder) == sorted([*names, "overview.png"])
    for path in folder.iterdir():
        height, width, _ = imread(path).shape
        assert 300 < height < 3000
        assert 600 < width < 4000
        assert imread(path).std() > 0.05
    assert imread(folder / names[0]).shape == imread(folder / names[-1]).shape
    assert "to 3" in out
    assert ("keys are not compared: a norm follows the key projection (every layer)" in out) == (name == "qwen3")


def test_without_a_folder_plots_go_beside_the_shell(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("inspect", saved("llama"), "--similarity")[0] == 0
    assert "regroup-similarity/overview.png" in everything(tmp_path)


def test_json_has_the_numbers_and_writes_nothing_unasked(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("inspect", saved("qwen3"), "--similarity", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["similarity"] == [layer.to_json() for layer in compared(saved("qwen3"))]
    assert facts["similarity"][0]["key"] is None
    assert facts["similarity"][0]["key_obstacle"] == "a norm follows the key projection"
    assert facts["family"] == "qwen3"
    assert everything(tmp_path) == []
    assert run("inspect", saved("qwen3"), "--similarity", "--json", "-o", tmp_path / "x")[0] == 0
    assert (tmp_path / "x" / "overview.png").exists()
    assert "similarity" not in json.loads(run("inspect", saved("qwen3"), "--json")[1])


def test_layers_with_one_kv_head(converted: Converted, tmp_path: Path) -> None:
    """Left out where others have more, and refused where there is nothing else."""
    mixed = converted("llama", "mixed")
    heads = list(head_map("llama", "mixed").values())
    assert [layer.num_key_value_heads for layer in compared(mixed)] == [g for g in heads if g > 1]
    status, out, _ = run("inspect", mixed, "--similarity", "-o", tmp_path / "plots")
    assert status == 0
    assert (f"they have one KV head: {heads.count(1)}" in out) == (1 in heads)
    message = refused("inspect", converted("llama", "one"), "--similarity", "-o", tmp_path / "none")
    assert "one KV head in every layer" in message
    assert not (tmp_path / "none").exists()


def test_what_has_no_weights(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    for source in (tmp_path, tmp_path / "config.json", saved("llama") / "config.json"):
        message = refused("inspect", source, "--similarity", "-o", tmp_path / "plots")
        for words in ("needs weights", "a config without weights", "remedy:"):
            assert words in message
    assert everything(tmp_path) == ["config.json"]


def test_folders_that_cannot_be(saved: Saved, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "exists as a file" in refused("inspect", saved("llama"), "--similarity", "-o", file)
    assert "is a file" in refused("inspect", saved("llama"), "--similarity", "-o", file / "below")
    assert file.read_text() == "mine"
    assert "add --similarity" in refused("inspect", saved("llama"), "-o", tmp_path / "plots")
    assert everything(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_to(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    message = refused("inspect", saved("llama"), "--similarity", "-o", tmp_path / "plots")
    assert "cannot be written to" in message
    assert everything(tmp_path) == []


def test_a_picture_is_complete_or_absent(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("inspect", saved("llama"), "--similarity", "-o", tmp_path)
    assert run(*arguments)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:100])
        raise OSError(28, "No space left on device")

    # A second run replaces them.
    (tmp_path / "overview.png").write_bytes(b"old")
    assert run(*arguments)[0] == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(*arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_weights_that_are_not_finite(part: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "x")
    state = tensors(folder)
    state[f"model.layers.2.self_attn.{part}_proj.weight"][3, 4] = float("nan")
    write(folder, config_of(folder), state)
    message = refused("inspect", folder, "--similarity", "-o", tmp_path / "plots")
    assert "not a finite number" in message
    assert "model.layers.2.self_attn" in message
    assert not (tmp_path / "plots").exists()
