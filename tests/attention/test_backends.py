"""The choice of a backend, errors, memory, and compiled calls."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_attention import plain
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import regroup
from regroup.attention import BACKENDS, explain, grouped, grouped_query_attention, make_call, registry
from regroup.attention.backends import cpu, flex, packed
from regroup.attention.cpu import build as cpu_build
from regroup.attention.registry import Backend, Preference, register
from regroup.errors import RegroupError


def tensors(
    batch: int = 2, heads: int = 8, groups: int = 2, queries: int = 1, keys: int = 64, width: int = 16, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    value_width = more.pop("value_width", width)
    query = torch.randn(batch, heads, queries, width, generator=draw)
    key = torch.randn(batch, groups, keys, width, generator=draw)
    value = torch.randn(batch, groups, keys, value_width, generator=draw)
    return query.to(**more), key.to(**more), value.to(**more)


def test_it_is_exported() -> None:
    assert regroup.grouped_query_attention is grouped_query_attention


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "unsupported_reason", lambda: "there is no compiler")


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize(
    ("shape", "arguments", "backend"),
    [
        ({}, {}, "packed"),
        ({"groups": 8}, {}, "packed"),
        ({"queries": 100, "keys": 100}, {"is_causal": True}, "sdpa"),
        ({"queries": 5, "keys": 5}, {"is_causal": True}, "sdpa"),
        ({"queries": 100, "keys": 101}, {"is_causal": True}, "packed"),
        ({"queries": 100, "keys": 100}, {"is_causal": True, "window": 20}, "packed"),
        ({"queries": 100, "keys": 100}, {"is_causal": True, "window": 100}, "sdpa"),
        ({"queries": 100, "keys": 90}, {}, "sdpa"),
        ({"queries": 100, "keys": 90, "value_width": 24}, {}, "packed"),
        ({"queries": 100, "keys": 90, "value_width": 24, "groups": 8}, {}, "sdpa"),
        ({"queries": 100, "keys": 100}, {"is_causal": True, "softcap": 3.0}, "packed"),
    ],
)
def test_the_choice_of_auto(shape: dict[str, int], arguments: dict[str, Any], backend: str) -> None:
    choice = explain(*tensors(**shape), **arguments)
    assert choice.backend == backend
    assert set(choice.others) == set(BACKENDS) - {"auto", backend}
    assert all(choice.others.values())
    assert str(choice).startswith(f"{backend}: ")
    by_hand = grouped_query_attention(*tensors(**shape), **arguments, backend=backend)
    assert torch.equal(grouped_query_attention(*tensors(**shape), **arguments), by_hand)


def test_the_compiled_kernel_is_chosen_for_decoding() -> None:
    query, key, value = tensors(keys=900, groups=4)
    reason = cpu.unsupported_reason(make_call(query, key, value))
    assert explain(query, key, value).backend == ("packed" if reason else "cpu")
    assert explain(query.requires_grad_(), key, value).backend == "packed"
    with torch.no_grad():
        assert explain(query, key, value).backend == ("packed" if reason else "cpu")
    assert explain(*tensors(keys=2)).backend == "packed"


def test_short_vectors_leave_arithmetic_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 32 query rows share a KV head, there are KV heads for all threads, and no soft cap."""
    cases: list[tuple[bool, int, int, dict[str, Any], bool]] = [
        (True, 4, 64, {}, True),
        (False, 4, 64, {}, False),
        (True, 3, 64, {}, False),
        (True, 4, 1, {}, False),
        (True, 4, 64, {"softcap": 3.0}, False),
    ]
    for short, queries, batch, arguments, wanted in cases:
        monkeypatch.setattr(packed, "has_short_vectors", lambda short=short: short)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        given = tensors(batch=batch, groups=1, queries=queries, keys=1000)
        choice = explain(*given, **arguments)
        assert ("arithmetic takes longer" in choice.why) is wanted


def the_backend(name: str, **changes: Any) -> Backend:
    parts: dict[str, Any] = {
        "preferences": (Preference(70, lambda call: call.query_length == 3, "three queries"),),
        "unsupported_reason": lambda call: "no windows" if call.window else None,
        "run": lambda call: torch.full_like(call.query, 7.0),
        "not_preferred": "it is for three queries",
    }
    return Backend(name=name, **(parts | changes))


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name, in_order = dict(registry.BY_NAME), list(registry.IN_ORDER)
    for module in (registry, grouped):
        monkeypatch.setattr(module, "BY_NAME", by_name)
        monkeypatch.setattr(module, "IN_ORDER", in_order)


@pytest.mark.usefixtures("_own_registry")
def test_registering_is_all_that_a_backend_needs() -> None:
    register(the_backend("sevens"))
    few, more = tensors(queries=3), tensors(queries=4)
    assert (grouped_query_attention(*few) == 7).all()
    assert explain(*few).why == "three queries"
    assert explain(*few, window=2).others["sevens"] == "no windows"
    assert explain(*more).others["sevens"] == "it is for three queries"
    assert (grouped_query_attention(*more, backend="sevens") == 7).all()
    with pytest.raises(RegroupError, match="no windows"):
        grouped_query_attention(*more, window=2, backend="sevens")


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run": None}, TypeError),
        ({"unsupported_reason": "never"}, TypeError),
        ({"not_preferred": ""}, TypeError),
        ({"preferences": (Preference(1, lambda call: True, ""),)}, TypeError),
        ({"preferences": (Preference("first", lambda call: True, "why"),)}, TypeError),  # pyright: ignore[reportArgumentType]
        ({"name": "packed"}, ValueError),
        ({"name": "auto"}, ValueError),
    ],
)
def test_an_incomplete_backend_is_not_registered(changes: dict[str, Any], error: type[Exception]) -> None:
    before = list(registry.BY_NAME), list(registry.IN_ORDER)
    with pytest.raises(error, match="attention backend"):
        register(the_backend(**({"name": "incomplete"} | changes)))
    assert (list(registry.BY_NAME), list(registry.IN_ORDER)) == before
    with pytest.raises(TypeError, match="run"):
        Backend("incomplete", (), lambda call: None, not_preferred="")  # pyright: ignore[reportCallIssue]


def test_priorities_decide() -> None:
    priorities = [preference.priority for preference, _ in registry.IN_ORDER]
    assert priorities == sorted(priorities, reverse=True)
    assert {backend.name for _, backend in registry.IN_ORDER} == set(registry.BY_NAME)
    assert registry.IN_ORDER[-1][1].name == "reference"


def test_a_named_backend_that_cannot_serve_says_why() -> None:
    query, key, value = tensors(queries=4, keys=9)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("sdpa", {"window": 2}, "SDPA has no window"),
        ("sdpa", {"softcap": 1.0}, "SDPA has no soft cap"),
        ("sdpa", {"is_causal": True}, "4 queries and 9 keys"),
        ("sdpa", {"mask": torch.ones(9).bool(), "bias": torch.zeros(9)}, "one mask"),
        ("sdpa", {"bias": torch.zeros(9, requires_grad=True)}, "trained"),
        ("flex", {"bias": torch.zeros(9, requires_grad=True)}, "gradients"),
        ("triton", {}, "Triton"),
    ]
    for backend, arguments, why in cases:
        with pytest.raises(RegroupError, match=f"the {backend} backend cannot serve this call") as raised:
            grouped_query_attention(query, key, value, **arguments, backend=backend)
        assert why in str(raised.value)
        assert "explain" in str(raised.value)
    with pytest.raises(RegroupError, match="unknown attention backend"):
        grouped_query_attention(query, key, value, backend="fastest")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.zeros(2, 8, 16)}, "four dimensions"),
        ({"query": torch.zeros(2, 7, 3, 16)}, "do not divide"),
        ({"query": torch.zeros(2, 8, 3, 15)}, "head_dim"),
        ({"query": torch.zeros(1, 8, 3, 16)}, "batch"),
        ({"query": torch.zeros(2, 8, 3, 16, dtype=torch.bfloat16)}, "dtype"),
        ({"query": torch.zeros(2, 8, 3, 16, dtype=torch.int64)}, "dtype"),
        ({"query": torch.zeros(2, 8, 3, 16, device="meta")}, "devices"),
        ({"query": torch.zeros(2, 0, 3, 16)}, "no heads"),
        ({"key": torch.zeros(2, 0, 9, 16), "value": torch.zeros(2, 0, 9, 16)}, "no heads"),
        ({"query": None}, "not a tensor"),
        ({"key": torch.zeros(2, 4, 9, 16)}, "number of KV heads"),
        ({"value": torch.zeros(2, 2, 8, 16)}, "number of keys"),
        ({"mask": torch.ones(2, 9).bool()}, "does not match"),
        ({"mask": torch.ones(2, 3, 9).bool()}, "does not match"),
        ({"mask": torch.ones(1, 2, 8, 3, 9).bool()}, "does not match"),
        ({"mask": torch.ones(8).bool()}, "does not match"),
        ({"mask": torch.ones(2, 2, 3, 9).bool()}, "does not match"),
        ({"mask": torch.ones(9, dtype=torch.int64)}, "dtype"),
        ({"mask": torch.ones(3, 9).to_sparse()}, "not a dense tensor"),
        ({"mask": [[True] * 9]}, "not a tensor"),
        ({"mask": torch.ones(9, dtype=torch.bool, device="meta")}, "devices"),
        ({"bias": torch.ones(9).bool()}, "dtype"),
        ({"bias": torch.ones(4, 3, 9)}, "does not match"),
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"window": True}, "window"),
        ({"window": "4"}, "window"),
        ({"window": np.float64(4)}, "window"),
        ({"window": np.int64(0)}, "window"),
        ({"window": torch.tensor(2.0)}, "window"),
        ({"window": torch.tensor([2])}, "window"),
        ({"window": torch.tensor(2, device="meta")}, "window"),
        ({"dropout_p": 1.5}, "dropout"),
        ({"dropout_p": -0.1}, "dropout"),
        ({"dropout_p": float("nan")}, "dropout"),
        ({"dropout_p": "0.1"}, "dropout_p is not a number"),
        ({"dropout_p": None}, "dropout_p is not a number"),
        ({"is_causal": "no"}, "is_causal"),
        ({"is_causal": 1}, "is_causal"),
        ({"is_causal": torch.tensor(True)}, "is_causal"),
        ({"softcap": 0.0}, "soft cap"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "1"}, "scale is not a number"),
        ({"scale": 1j}, "scale is not a number"),
        ({"scale": float("inf")}, "scale"),
        ({"softcap": float("nan")}, "soft cap"),
        ({"query": torch.zeros(2, 8, 10, 16), "is_causal": True}, "more queries than keys"),
    ],
)
def test_inconsistent_arguments_are_refused(change: dict[str, Any], says: str) -> None:
    query, key, value = tensors(queries=3, keys=9)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value} | change
    for backend in ("auto", "reference", "packed"):
        with pytest.raises(RegroupError, match=says):
            grouped_query_attention(**arguments, backend=backend)


def test_a_padding_mask_in_the_form_of_transformers_is_explained() -> None:
    with pytest.raises(RegroupError, match=r"mask\[:, None, None, :\]"):
        grouped_query_attention(*tensors(queries=3, keys=9), mask=torch.ones(2, 9, dtype=torch.bool))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made: that does not share the memory of what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = [item for item in args if isinstance(item, Tensor)]
        old = {item.untyped_storage().data_ptr() for item in flat}
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in old:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


# Batch, heads, KV heads, keys, width: one KV head of one sequence is 2048 · 64 numbers, all scores of a query 65,536.
LONG = {"batch": 2, "heads": 16, "groups": 2, "keys": 2048, "width": 64}
SCORES = 2 * 16 * 2048
REPEATED = SCORES * 64


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", ["", "mask", "bias", "mask and bias", "window", "softcap", "width"])
def test_decoding_makes_nothing_larger_than_the_scores(layout: str, dtype: torch.dtype, arguments: str) -> None:
    query, key, value = tensors(**LONG, dtype=dtype, value_width=48 if arguments == "width" else 64)
    if layout == "tokens first":
        key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (key, value))
    given = {
        "mask": {"mask": torch.ones(2, 1, 1, 2048, dtype=torch.bool)},
        "bias": {"bias": torch.zeros(1, 16, 1, 2048)},
        "mask and bias": {"mask": torch.ones(2, 1, 1, 2048, dtype=torch.bool), "bias": torch.zeros(1, 16, 1, 2048)},
        "window": {"window": 100},
        "softcap": {"softcap": 2.0},
    }.get(arguments, {})
    call = make_call(query, key, value, is_causal=True, **given)
    with Largest() as largest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_WIDENED", SCORES)
        packed.run(call)
        if arguments not in ("softcap", "width"):
            assert largest.elements <= (100 * 64 if arguments == "window" else SCORES)
        packed._products(call, 0, 1)
    assert 0 < largest.elements <= SCORES


def test_repeated_heads_would_be_seen() -> None:
    query, key, value = tensors(**LONG)
    with Largest() as largest:
        scaled_dot_product_attention(query, key.repeat_interleave(8, 1), value.repeat_interleave(8, 1))
    assert largest.elements == REPEATED
    with Largest() as largest:
        scaled_dot_product_attention(query, key, value[..., :48], enable_gqa=True)
    assert largest.elements >= REPEATED // 64 * 48


@pytest.mark.parametrize("queries", [2, 5])
def test_a_few_queries_do_not_copy_a_bias_for_each_head(queries: int) -> None:
    query, key, value = tensors(**LONG, queries=queries)
    bias = torch.zeros(1, 16, 1, 2048)
    with Largest() as largest:
        grouped_query_attention(query, key, value, is_causal=True, bias=bias, backend="packed")
    # One sequence's worth: the bias and the causal mask of a piece, not of the batch.
    assert largest.elements <= 16 * queries * 2048


def test_prefill_stays_within_a_piece() -> None:
    query, key, value = tensors(batch=1, heads=4, groups=2, queries=3000, keys=3000, width=16)
    bias = torch.zeros(1, 4, 1, 3000)
    with Largest() as largest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_PIECE", 1 << 18)
        variants: list[dict[str, Any]] = [{}, {"softcap": 4.0}, {"window": 64}]
        for more in variants:
            grouped_query_attention(query, key, value, is_causal=True, bias=bias, backend="packed", **more)
    assert largest.elements <= 1 << 18 < 4 * 3000 * 3000


# PyTorch's own compiler imports what PyTorch itself calls deprecated.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@compiles
@pytest.mark.parametrize("backend", ["auto", "packed", "reference", "sdpa"])
@pytest.mark.parametrize("trains", [False, True])
def test_one_graph_serves_a_growing_context(backend: str, trains: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return grouped_query_attention(query, key, value, mask=mask, backend=backend)

    compiled = torch.compile(step, backend=count, fullgraph=True)
    for keys in range(20, 30):
        query, key, value = tensors(keys=keys)
        query.requires_grad_(trains)
        mask = (torch.arange(keys) > 3)[None]
        assert torch.allclose(compiled(query, key, value, mask), step(query, key, value, mask), atol=1e-6)
    assert len(graphs) <= 2, "a graph for the first length, one for all others"


@compiles
@pytest.mark.parametrize("more", [{"window": 4}, {"softcap": 3.0}, {"is_causal": True, "window": 7}, {"bias": True}])
def test_compiled_prefill(more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    query, key, value = tensors(queries=9, keys=12)
    more = more | ({"bias": torch.randn(8, 9, 12)} if "bias" in more else {})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return grouped_query_attention(query, key, value, **more)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    wanted = torch.autograd.grad(attend(*leaves).sum(), leaves)
    for mine, theirs in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


FLEX = [
    dict(zip(("positions", "extras"), case, strict=True))
    for case in itertools.product(
        [{}, {"is_causal": True}, {"is_causal": True, "window": 5}, {"window": 3, "softcap": 2.0}],
        ["", "dead", "bias", "added"],
    )
]


def flexed(positions: dict[str, Any], extras: str) -> tuple[Tensor, Tensor]:
    query, key, value = tensors(queries=7, keys=19, heads=6, groups=2)
    given: dict[str, Any] = dict(positions)
    if extras == "dead":
        given["mask"] = torch.arange(2).view(2, 1, 1, 1).bool() & (torch.arange(19) > 2)
    if extras == "bias":
        given["bias"] = torch.linspace(-2, 2, 6 * 19).view(1, 6, 1, 19)
    if extras == "added":
        given["mask"] = torch.linspace(-2, 2, 2 * 7 * 19).view(2, 1, 7, 19)
    return grouped_query_attention(query, key, value, **given, backend="flex"), plain(query, key, value, **given)


@compiles
@pytest.mark.parametrize("case", FLEX, ids=str)
def test_what_flex_is_asked_for(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled: the same functions of scores and positions, without the minute that compiling takes."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    out, wanted = flexed(**case)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@compiles
def test_flex_compiled() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        out, wanted = flexed({"is_causal": True, "window": 5, "softcap": 2.0}, "dead")
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)


def test_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of docs/attention.md, one after the other; what follows ``# prints`` is printed."""
    monkeypatch.setattr(cpu_build, "unsupported_reason", lambda: "no C++ compiler")
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    for block in blocks:
        exec(compile(block, "docs/attention.md", "exec"), names)
    printed = capsys.readouterr().out
    said = re.findall(r"# prints (.*)", page)
    assert said
    assert all(line in printed for line in said)


def test_the_page_lists_the_priorities() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    listed = [(int(priority), name) for priority, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.M)]
    assert listed == list(dict.fromkeys((each.priority, backend.name) for each, backend in registry.IN_ORDER))
