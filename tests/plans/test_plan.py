"""Plans: every constraint with its remedy, JSON there and back, and edits by hand that go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regroup
from helpers import convert_heads, layout_of, refused, run
from regroup import RegroupError
from regroup.layout import Layout
from regroup.plans import LayerPlan, Plan, group_members, key_value_sources, make_plan, parse_layers

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def llama(saved: Saved) -> Layout:
    return layout_of(saved("llama"))  # 3 layers, 6 heads


@pytest.fixture(scope="module")
def bart(saved: Saved) -> Layout:
    return layout_of(saved("bart"))  # 3 decoder layers, 6 heads, self- and cross-attention


def counts(plan: Plan) -> list[int]:
    return [layer.num_key_value_heads for layer in plan.layers]


def test_plans_of_older_releases_are_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """They called the original model the parent; everything else about them is the same, their hash included."""
    plan = make_plan(layout_of(saved("llama")), 2)
    path = tmp_path / "plan.json"
    path.write_text(plan.dumps().replace("original_num_key_value_heads", "parent_num_key_value_heads"))
    assert "parent_num" in path.read_text()
    assert Plan.load(path) == plan
    path.write_text(plan.dumps().replace("original_num_key_value_heads", "grandparent_num_key_value_heads"))
    with pytest.raises(RegroupError, match="fields that this version does not know"):
        Plan.load(path)


def test_json_round_trip(bart: Layout, tmp_path: Path) -> None:
    plan = make_plan(bart, 3, layers="cross.1:1", method="random", tensor_parallel=3, seed=7)
    layers = (replace(plan.layers[0], query_order=(5, 4, 3, 2, 1, 0), key_method="first"), *plan.layers[1:])
    plan = replace(plan, layers=layers)
    path = tmp_path / "plan.json"
    path.write_text(plan.dumps())
    again = Plan.load(path)
    assert again == plan
    assert again.digest() == plan.digest()
    assert len(plan.dumps().splitlines()) == len(plan.layers) + 9  # a line a layer
    assert json.loads(plan.dumps())["layers"][1]["query_order"] is None


def test_digest_is_stable_and_sees_every_field(llama: Layout) -> None:
    plan = make_plan(llama, 2)
    assert plan.digest() == make_plan(llama, 2).digest()
    # Written down, so that a change of the format is noticed: hashes in model cards would no longer be found.
    assert Plan("llama", "0" * 16, (LayerPlan("x", 4, 4, 2),)).digest() == "f3d2f1d461f3a0d1"
    others = [make_plan(llama, 3), make_plan(llama, 2, seed=1), make_plan(llama, 2, method="first")]
    others += [make_plan(llama, 2, tensor_parallel=2), replace(plan, fingerprint="0" * 16)]
    others += [replace(plan, layers=(replace(plan.layers[0], query_order=(0, 1, 2, 3, 4, 5)), *plan.layers[1:]))]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 7


def test_fingerprint_sees_what_a_plan_relies_on(llama: Layout, bart: Layout) -> None:
    assert llama.fingerprint() != bart.fingerprint()
    for change in ({"num_key_value_heads": 3}, {"head_dim": 12}, {"name": "x"}, {"num_attention_heads": 12}):
        changed = replace(llama, layers=(replace(llama.layers[0], **change), *llama.layers[1:]))
        assert changed.fingerprint() != llama.fingerprint()
    assert replace(llama, dtype="BF16").fingerprint() == llama.fingerprint()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", [3, 6, 6]),
        ("0-2:1", [1, 1, 1]),
        ("0:1,1-2:2", [1, 2, 2]),
        (" 2:1 , 0:2", [2, 6, 1]),
        ("self.1:3", [6, 3, 6]),
    ],
)
def test_layers_of_a_decoder(text: str, expected: list[int], llama: Layout) -> None:
    assert counts(make_plan(llama, layers=text)) == expected
    with_rest = counts(make_plan(llama, 2, layers=text))
    assert with_rest == [2 if want == 6 else want for want in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", [3, 3, 6, 6, 6, 6]),
        ("self.0-2:1", [1, 6, 1, 6, 1, 6]),
        ("cross.1-2:2,self.0:3", [3, 6, 6, 2, 6, 2]),
    ],
)
def test_layers_of_an_encoder_decoder(text: str, expected: list[int], bart: Layout) -> None:
    assert counts(make_plan(bart, layers=text)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "cannot be read") for text in ("", "0", "0:", ":3", "0-:3", "a:3", "0:-3", "0;1:3", "0:3,", "0:3.5")),
        *((text, "do not exist") for text in ("3:2", "0-3:2", "2-1:2", "99999999999:1", "cross.0:2")),
        *((text, "named twice") for text in ("0:2,0:2", "0-1:2,1-2:3", "0:2,self.0:3")),
        ("encoder.0:2", "encoder layers are not converted"),
    ],
)
def test_layers_that_cannot_be(text: str, words: str, llama: Layout) -> None:
    with pytest.raises(RegroupError, match=words):
        parse_layers(text, llama)


def test_a_layer_that_does_not_exist_is_refused(llama: Layout) -> None:
    with pytest.raises(RegroupError, match="a layer that does not exist"):
        make_plan(llama, layers={"model.layers.3.self_attn": 2})
    assert counts(make_plan(llama, layers={"model.layers.2.self_attn": 2})) == [6, 6, 2]


@pytest.mark.parametrize(
    "asked",
    [{"calibrate": "text.txt"}, {"calibration": 3}, {"kv_heads": "2"}, {"kv_heads": True}, {"plan": {}}],
)
def test_keywords_that_are_misspelt_or_of_another_type_are_errors(
    asked: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    """Otherwise a conversion without text would take the place of one with text."""
    more: dict[str, Any] = {"kv_heads": 2} | asked
    for function in (regroup.plan, lambda *_, **more: regroup.convert(saved("llama"), tmp_path / "converted", **more)):
        with pytest.raises(TypeError, match=next(iter(asked))):
            function(saved("llama"), **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "size", [{"tokens": 0}, {"window": 1}, {"window": 0}, {"batch": 0}, {"batch": -1}, {"tokens": 2**63}]
)
def test_sizes_of_calibration_text_out_of_range_are_refused(size: dict[str, int], llama: Layout) -> None:
    """A plan that was edited by hand can name any."""
    text = regroup.CalibrationText("text.txt", tokens=1, window=2, batch=1)
    make_plan(llama, 2, calibration=text).check(llama)
    with pytest.raises(RegroupError, match="out of range"):
        make_plan(llama, 2, calibration=replace(text, **size))


def edited(plan: Plan, index: int = 1, **changes: Any) -> Plan:
    layers = tuple(replace(x, **changes) if i == index else x for i, x in enumerate(plan.layers))
    return replace(plan, layers=layers)


@pytest.mark.parametrize("wanted", [0, -1, 4, 5])
def test_heads_that_do_not_divide(wanted: int, llama: Layout) -> None:
    with pytest.raises(RegroupError, match=r"divided into[\s\S]*divisor of 6[\s\S]*remedy: +choose one of 1, 2, 3, 6"):
        make_plan(llama, wanted)


def test_more_heads_than_the_parent(llama: Layout, saved: Saved) -> None:
    with pytest.raises(RegroupError, match=r"more KV heads[\s\S]*at most 6[\s\S]*got: +12[\s\S]*remedy"):
        make_plan(llama, 12)
    with pytest.raises(RegroupError, match=r"at most 6[\s\S]*remedy: +choose one of 1, 2, 3, 4, 6$"):
        make_plan(layout_of(saved("llama_grouped")), 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 12}, "otherwise than it is"),
        ({"original_num_key_value_heads": 3}, "otherwise than it is"),
        ({"num_key_value_heads": 4}, "divided into"),
        ({"num_key_value_heads": 12}, "more KV heads"),
        ({"key_method": "median"}, "merge method is not known"),
        ({"value_method": ""}, "merge method is not known"),
        ({"query_order": ()}, "not a permutation"),
        ({"query_order": (0, 1, 2, 3, 4)}, "not a permutation"),
        ({"query_order": (0, 1, 2, 3, 4, 4)}, "not a permutation"),
        ({"query_order": (1, 2, 3, 4, 5, 6)}, "not a permutation"),
        ({"name": "model.layers.7.self_attn"}, "not the checkpoint's, or in another order"),
    ],
)
def test_every_constraint_has_a_remedy(changes: dict[str, Any], words: str, llama: Layout) -> None:
    with pytest.raises(RegroupError, match=words) as error:
        edited(make_plan(llama, 2), **changes).check(llama)
    assert error.value.details["remedy"]
    assert error.value.details["layer"] == "model.layers.1.self_attn"


def test_plans_of_another_checkpoint(llama: Layout, bart: Layout) -> None:
    plan = make_plan(llama, 2)
    for other in (make_plan(bart, 2), replace(plan, fingerprint="0" * 16)):
        with pytest.raises(RegroupError, match="another checkpoint") as error:
            other.check(llama)
        assert error.value.details["remedy"]
    plan.check(llama)


def test_layers_that_were_moved_renamed_or_removed(llama: Layout) -> None:
    """The fingerprint is the checkpoint's own, so that only the names tell; the first one that differs is said."""
    plan = make_plan(llama, 2)
    names = [layer.name for layer in plan.layers]
    cases = [
        (plan.layers[::-1], names[0], names[0], names[2]),
        ((plan.layers[0], plan.layers[2], plan.layers[1]), names[1], names[1], names[2]),
        (edited(plan, 2, name="x").layers, names[2], names[2], "x"),
        (edited(plan, 2, name="").layers, names[2], names[2], ""),
        (plan.layers[:2], names[2], names[2], "no more layers"),
        ((*plan.layers, plan.layers[0]), names[0], "no more layers", names[0]),
    ]
    for layers, layer, expected, got in cases:
        with pytest.raises(RegroupError, match="in another order") as error:
            replace(plan, layers=layers).check(llama)
        details = error.value.details
        assert (details["layer"], details["expected"], details["got"]) == (layer, expected, got)
        assert details["remedy"]


@pytest.mark.parametrize(
    ("degree", "groups", "accepted"),
    [
        *(
            (1, 3, True),
            (2, 2, True),
            (2, 6, True),
            (2, 1, True),
            (3, 3, True),
            (3, 1, True),
            (6, 2, True),
            (6, 3, True),
        ),
        *((2, 3, False), (3, 2, False), (4, 2, False), (0, 2, False), (-1, 2, False), (12, 6, False)),
    ],
)
def test_tensor_parallel_degrees(degree: int, groups: int, accepted: bool, llama: Layout) -> None:
    if accepted:
        assert make_plan(llama, groups, tensor_parallel=degree).tensor_parallel == degree
        return
    with pytest.raises(RegroupError, match=r"device[\s\S]*layer: +model.layers.0") as error:
        make_plan(llama, groups, tensor_parallel=degree)
    remedy = str(error.value.details["remedy"])
    choices = [int(word) for word in remedy.removeprefix("choose one of ").split(", ")]
    for choice in choices:  # the remedy works
        if 6 % max(degree, 1) or degree < 1:
            make_plan(llama, 1, tensor_parallel=choice)
        else:
            make_plan(llama, choice, tensor_parallel=degree)


def test_something_has_to_be_asked_for(llama: Layout) -> None:
    with pytest.raises(RegroupError, match=r"no number[\s\S]*remedy"):
        make_plan(llama)


def test_contiguous_groups_by_brute_force() -> None:
    for H in range(1, 17):
        for parent in (g for g in range(1, H + 1) if H % g == 0):
            for groups in (g for g in range(1, parent + 1) if H % g == 0):
                sources = key_value_sources(range(H), parent, groups)
                assert len(sources) == groups == len(group_members(range(H), groups))
                for head in range(H):
                    group, own = head // (H // groups), head // (H // parent)
                    share = sources[group].count(own) / len(sources[group])
                    used = [h // (H // parent) for h in range(H) if h // (H // groups) == group]
                    assert share == used.count(own) / len(used)
    assert key_value_sources(range(8), 4, 2) == [[0, 1], [2, 3]]
    assert key_value_sources(range(12), 6, 4)[0] == [0, 0, 1]
    assert key_value_sources([3, 1, 2, 0], 4, 2) == [[3, 1], [2, 0]]


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 13), st.integers(), st.floats(), st.text(max_size=5)),
    *(st.lists(st.integers(-1, 6), max_size=7), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
    *(st.sampled_from(["mean", "first", "random"]), st.permutations(range(6))),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tampered_plans_are_accepted_or_refused(data: st.DataObject, llama: Layout, tmp_path: Path) -> None:
    """Whatever is edited: a plan that holds every constraint, or a message; never another exception."""
    tree = json.loads(make_plan(llama, 2).dumps())
    for _ in range(data.draw(st.integers(1, 2))):
        whole = data.draw(st.sampled_from([tree, *(x for x in tree.get("layers") or [] if isinstance(x, dict))]))
        if not isinstance(whole, dict) or not whole:
            continue
        key = data.draw(st.sampled_from([*sorted(whole), "surprise"]))
        if data.draw(st.booleans()):
            whole[key] = data.draw(VALUES)
        else:
            whole.pop(key, None)
        if not isinstance(tree.get("layers"), list):
            break
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(tree))
    try:
        plan = Plan.load(path)
        plan.check(llama)
    except RegroupError:
        return
    for layer in plan.layers:
        assert layer.num_attention_heads % layer.num_key_value_heads == 0
        assert layer.num_key_value_heads <= layer.original_num_key_value_heads
        assert sorted(layer.order) == list(range(6))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "7", "{}", "[" * 100_000, "\ufeff{}"),
        *(
            '{"format": "regroup-plan/2"}',
            '{"format": "regroup-plan/1"}',
            '{"format": ["regroup-plan/1"], "layers": [{}]}',
        ),
        *(f'{{"format": "regroup-plan/1", "layers": {layers}}}' for layers in ("[]", "{}", "[1]", "[{}]", "null")),
    ],
)
def test_files_that_are_no_plans(text: str, saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RegroupError, match=r"plan\.json"):
        Plan.load(path)
    assert "plan.json" in refused("convert", saved("llama"), tmp_path / "child", "--plan", path)
    assert not (tmp_path / "child").exists()


def test_plans_from_nowhere(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / "bytes.json"):
        assert "cannot be read" in refused("convert", saved("llama"), tmp_path / "child", "--plan", path)


def test_a_plan_on_disk_is_carried_out(saved: Saved, tmp_path: Path) -> None:
    source, path = saved("llama"), tmp_path / "deep" / "plan.json"
    words = ("--kv-heads", 3, "--layers", "1:1", "--method", "mean")
    status, out, _ = run("plan", source, *words, "-o", path)
    assert (status, out) == (0, "")
    status, printed, _ = run("plan", source, *words)
    assert printed == path.read_text()
    assert run("convert", source, tmp_path / "child", "--plan", path)[0] == 0
    assert [x.num_key_value_heads for x in layout_of(tmp_path / "child").layers] == [3, 1, 3]
    assert (tmp_path / "child" / "regroup_plan.json").read_text() == path.read_text()
    for plan in (path, str(path), Plan.load(path)):
        conversion = regroup.convert(source, tmp_path / f"child-{id(plan)}", plan=plan)
        assert conversion.result.plan.digest() == Plan.load(path).digest()
    assert "another checkpoint" in refused("convert", saved("bart"), tmp_path / "other", "--plan", path)
    message = refused("convert", source, tmp_path / "other", "--plan", path, "--kv-heads", 2)
    assert "both given" in message


def test_uniform_and_changes(llama: Layout) -> None:
    assert make_plan(llama, 2).uniform == 2
    assert make_plan(llama, layers="0:1").uniform is None
    plan = LayerPlan("x", 4, 4, 4)
    assert not plan.changes
    assert not replace(plan, query_order=(0, 1, 2, 3)).changes
    assert replace(plan, query_order=(1, 0, 2, 3)).changes
    assert replace(plan, num_key_value_heads=2).changes


def test_further_grouping_of_mixed_layers(saved: Saved, tmp_path: Path) -> None:
    heads = {f"layers.{i}.self_attn": g for i, g in enumerate((3, 6, 2))}
    convert_heads(saved("llama"), tmp_path / "child", heads)
    layout = layout_of(tmp_path / "child")
    assert counts(make_plan(layout, layers="1:3")) == [3, 3, 2]
    with pytest.raises(RegroupError, match=r"more KV heads[\s\S]*layers\.2"):
        make_plan(layout, 3)


def test_plans_without_predictions_are_what_they_were(tmp_path: Path) -> None:
    """The digest of a plan written before there were predictions, with every field of then."""
    plan = Plan(
        *("bart", "0123456789abcdef"),
        (
            LayerPlan("a.self", 6, 6, 3, "first", "random", (5, 4, 3, 2, 1, 0)),
            LayerPlan("a.cross", 6, 6, 1),
            LayerPlan("b", 6, 3, 3, "lowrank", "procrustes"),
        ),
        *(3, 7),
    )
    assert plan.digest() == "4501d2d2bedf2729"
    tree = json.loads(plan.dumps())
    assert set(tree) == {"format", "family", "fingerprint", "tensor_parallel", "seed", "layers"}
    assert set(tree["layers"][1]) == {
        *("name", "num_attention_heads", "original_num_key_value_heads", "num_key_value_heads"),
        *("key_method", "value_method", "query_order"),
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**tree, "kv_budget": None, "predicted_kl": None}))
    assert Plan.load(path) == plan  # null and left out are the same


def test_predictions_there_and_back(llama: Layout, tmp_path: Path) -> None:
    plan = make_plan(llama, 2)
    layers = tuple(replace(x, predicted_kl=kl) for x, kl in zip(plan.layers, (0.1 + 0.2, None, 1e-17), strict=True))
    full = replace(plan, layers=layers, kv_budget="25%", predicted_kl=0.3)
    path = tmp_path / "plan.json"
    path.write_text(full.dumps())
    assert Plan.load(path) == full
    Plan.load(path).check(llama)
    tree = json.loads(full.dumps())
    assert (tree["kv_budget"], tree["predicted_kl"]) == ("25%", 0.3)
    assert ["predicted_kl" in layer for layer in tree["layers"]] == [True, False, True]
    others = [replace(full, kv_budget="50%"), replace(full, predicted_kl=0.2), replace(full, layers=plan.layers)]
    assert len({plan.digest(), full.digest(), *(other.digest() for other in others)}) == 5
    tree["predicted_kl"] = 0  # as a person may write it
    path.write_text(json.dumps(tree))
    assert Plan.load(path).digest() == replace(full, predicted_kl=0.0).digest()


@pytest.mark.parametrize(
    ("place", "field", "text", "words"),
    [
        *(("layer", "predicted_kl", text, "wrong type") for text in ('"0.1"', "true", "[]", "{}")),
        *(("plan", "predicted_kl", text, "wrong type") for text in ('"0.1"', "false", "[0.1]")),
        *(("plan", "kv_budget", text, "wrong type") for text in ("25", "0.25", "true", "[]")),
        *(("layer", "predicted_kl", text, "not a finite") for text in ("NaN", "Infinity", "-Infinity", "1e999")),
        *(("plan", "predicted_kl", text, "not a finite") for text in ("NaN", "1e999", "1" + "0" * 400)),
        *(("layer", "predicted_kl", text, "is negative") for text in ("-0.1", "-1", "-1e-9")),
        ("plan", "predicted_kl", "-0.1", "is negative"),
        ("layer", "kv_budget", '"25%"', "does not know"),
        ("plan", "predicted_kI", "0.1", "does not know"),
    ],
)
def test_predictions_that_cannot_be(
    place: str, field: str, text: str, words: str, llama: Layout, tmp_path: Path
) -> None:
    tree = json.loads(make_plan(llama, 2).dumps())
    (tree if place == "plan" else tree["layers"][0])[field] = "HERE"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(tree).replace('"HERE"', text))
    with pytest.raises(RegroupError, match=rf"{words}[\s\S]*plan\.json"):
        Plan.load(path)
