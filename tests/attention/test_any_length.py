"""Graphs of any length: traced, exported or compiled at one length, and run at others, beside PyTorch's SDPA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from transformers import PreTrainedModel

import regroup
import tiny
from regroup.attention import grouped_query_attention
from regroup.attention.cpu import build as cpu_build

# What PyTorch's own compilers and exporters import is deprecated by PyTorch itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "error::torch.jit.TracerWarning"
)

scaled_dot_product_attention: Any = functional.scaled_dot_product_attention
# Queries and keys: traced at the first, run at all.
LENGTHS = {
    "prefill": [(16, 16), (24, 24), (90, 90)],
    "chunk": [(5, 30), (6, 44), (70, 900)],
    "decode": [(1, 30), (1, 44), (1, 2000)],
}
MASKS = ["none", "padding", "added"]


class Attention(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return grouped_query_attention(query, key, value, mask=mask, **self.arguments)


def make(queries: int, keys: int, mask: str) -> tuple[Tensor, ...]:
    torch.manual_seed(keys)
    # A width that no length equals: compilers take sizes that are equal at first for one size.
    made = torch.randn(2, 8, queries, 12), torch.randn(2, 2, keys, 12), torch.randn(2, 2, keys, 12)
    if mask == "padding":
        seen = torch.rand(2, 1, 1, keys) > 0.2
        seen[1], seen[0, ..., -1] = False, True  # a sequence of nothing, and one with its last key
        return (*made, seen)
    return made if mask == "none" else (*made, torch.randn(1, 8, queries, keys))


def pytorch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, window: int | None = None, late: int = 0
) -> Tensor:
    """Causal attention by PyTorch, in float64 and dense; ``late`` moves the diagonal, to be wrong."""
    T, S = query.shape[2], key.shape[2]
    rows, columns = torch.arange(T)[:, None] + S - T + late, torch.arange(S)
    seen = (columns <= rows) if window is None else (columns <= rows) & (columns > rows - window)
    added = torch.zeros(T, S, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    if mask is not None:
        added = added.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else added + mask.double()
    inputs = (query.double(), key.double(), value.double())
    return scaled_dot_product_attention(*inputs, attn_mask=added, enable_gqa=True)


def check(graph: Callable[..., Any], lengths: list[tuple[int, int]], mask: str, window: int | None = None) -> None:
    for queries, keys in lengths:
        given = make(queries, keys, mask)
        wanted = pytorch(*given, window=window)
        assert (graph(*given).double() - wanted).abs().max() < 1e-5, (queries, keys)
        # Negative control: a diagonal that is one off would be seen.
        assert (wanted - pytorch(*given, window=window, late=-1 if keys > queries else 1)).abs().max() > 1e-3


def dims(case: str, mask: str, how: str) -> dict[str, dict[int, Any]]:
    """Which dimensions an exporter keeps open: as one name, as two, or as it finds."""
    T: Any = Dim("T", min=2, max=4096)
    S: Any = T if case == "prefill" else Dim("S", min=2, max=4096)
    if how == "automatic":
        T = S = Dim.AUTO
    found: dict[str, dict[int, Any]] = {"query": {2: T}, "key": {2: S}, "value": {2: S}, "mask": {2: T, 3: S}}
    if case == "decode":
        del found["query"][2], found["mask"][2]
    if mask == "padding":
        found["mask"] = {3: S}
    return {name: found[name] for name in list(found)[: 3 if mask == "none" else 4]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", LENGTHS)
def test_exported(case: str, mask: str) -> None:
    """With PyTorch's own operators alone: a file that is loaded without this package."""
    for how, strict in (("named", False), ("automatic", case == "chunk")):  # strict: by the compiler, which is slow
        given = make(*LENGTHS[case][0], mask)
        program = torch.export.export(
            Attention(is_causal=True), given, dynamic_shapes=dims(case, mask, how), strict=strict
        )
        assert not [node for node in program.graph.nodes if "regroup" in str(node.target)]
        check(program.module(), LENGTHS[case], mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", LENGTHS)
def test_traced(case: str, mask: str, tmp_path: Path) -> None:
    """``torch.jit.trace``, without a warning that a branch was taken for good; saved and loaded."""
    traced: Any = torch.jit.trace(Attention(is_causal=True), make(*LENGTHS[case][0], mask), check_trace=False)
    assert "regroup::" not in str(traced.graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    check(torch.jit.load(tmp_path / "traced.pt"), LENGTHS[case], mask)


@pytest.mark.parametrize("case", LENGTHS)
def test_traced_symbolically(case: str) -> None:
    graph = make_fx(Attention(is_causal=True), tracing_mode="symbolic")(*make(*LENGTHS[case][0], "padding"))
    check(graph, LENGTHS[case], "padding")


@pytest.mark.parametrize("mask", ["none", pytest.param("padding", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", LENGTHS)
def test_compiled(case: str, dynamic: bool | None, mask: str) -> None:
    """The second length opens the sizes, and no later one needs another graph."""
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(Attention(is_causal=True), backend=count, fullgraph=True, dynamic=dynamic)
    check(compiled, LENGTHS[case], mask)
    assert len(graphs) == (1 if dynamic else 2)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "arguments", [{"window": 5, "softcap": 3.0}, {"window": 5}, {"softcap": 3.0}, {"scale": 0.2}], ids=str
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_arguments(arguments: dict[str, Any], compiled: bool) -> None:
    module = Attention(is_causal=True, **arguments)
    given = make(7, 30, "padding")
    graphs: list[Any] = []
    if compiled:
        torch.compiler.reset()
        graphs.append(torch.compile(module, backend="eager", fullgraph=True, dynamic=True))
    else:
        graphs.append(torch.export.export(module, given, dynamic_shapes=dims("chunk", "padding", "named")).module())
        graphs.append(torch.jit.trace(module, given, check_trace=False))
    for queries, keys in ((9, 44), (70, 80)):
        given = make(queries, keys, "padding")
        wanted = grouped_query_attention(*given[:3], mask=given[3], is_causal=True, **arguments, backend="reference")
        for graph in graphs:
            torch.testing.assert_close(graph(*given), wanted, rtol=0, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_training() -> None:
    """Forward and backward, at lengths that follow each other, and with a head width that is open too."""
    torch.compiler.reset()
    compiled = torch.compile(Attention(is_causal=True), backend="aot_eager", fullgraph=True, dynamic=True)
    for length, width in ((16, 16), (24, 16), (90, 32)):
        leaves = [torch.randn(1, heads, length, width, requires_grad=True) for heads in (8, 2, 2)]
        got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        for mine, theirs in zip(got, torch.autograd.grad(out.square().sum(), leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    torch.compiler.reset()


def test_compiled_decoding_keeps_the_kernel() -> None:
    """Of a process's own graph the kernel stays a part, for any context."""
    if cpu_build.build().unsupported_reason:
        pytest.skip("there is no compiler")
    seen = []

    def look(graph: Any, _: Any) -> Any:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(Attention(is_causal=True), backend=look, fullgraph=True, dynamic=True)
    check(compiled, LENGTHS["decode"], "none")
    assert len(seen) == 1
    assert any("cpu_decode" in target for target in seen[0])
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["export", "compile"])
def test_under_autocast(how: str) -> None:
    """Mixed dtypes, as rotary positions leave them, with lengths open."""
    torch.compiler.reset()

    def halves(queries: int, keys: int) -> tuple[Tensor, ...]:
        query, key, value = make(queries, keys, "none")
        return query, key, value.bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        module: Any = Attention(is_causal=True)
        if how == "export":
            module = torch.export.export(
                module, halves(16, 16), dynamic_shapes=dims("prefill", "none", "named")
            ).module()
        else:
            module = torch.compile(module, backend="eager", fullgraph=True)
        for length in (16, 24, 90):
            given = halves(length, length)
            out = module(*given)
            assert out.dtype == torch.bfloat16
            assert (out.double() - pytorch(*given)).abs().max() < 0.05
    torch.compiler.reset()


@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("case", LENGTHS)
def test_onnx_by_torchscript(case: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that ``torch.onnx.export(dynamo=False)`` makes, which needs no ONNX until it is written.

    PyTorch's own form for ONNX has no grouped heads. Here the operators are of ONNX alone; the lengths are inputs.
    """
    from torch.onnx._internal.torchscript_exporter import utils

    given = make(*LENGTHS[case][0], mask)
    names = ["query", "key", "value", "mask"][: len(given)]
    axes = {name: {2: "keys"} for name in names[1:3]} | ({"query": {2: "queries"}} if case != "decode" else {})
    axes |= {"mask": {3: "keys"}} if mask != "none" else {}
    made: list[Any] = []
    stock = utils._model_to_graph

    def keep(*args: Any, **kwargs: Any) -> Any:
        made.append(stock(*args, **kwargs))
        raise KeyboardInterrupt  # before the file is written, for which the onnx package would be needed

    monkeypatch.setattr(utils, "_model_to_graph", keep)
    with pytest.raises(KeyboardInterrupt):
        torch.onnx.export(
            Attention(is_causal=True).eval(), given, "unwritten.onnx", dynamo=False, input_names=names,
            dynamic_axes=axes, opset_version=17,
        )  # fmt: skip
    nodes = [node.kind() for node in made[0][0].nodes()]
    assert nodes
    assert {kind.partition("::")[0] for kind in nodes} == {"onnx"}
    assert "onnx::Shape" in nodes or case == "decode"


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("case", LENGTHS)
def test_onnx_computes(case: str, mask: str, dynamo: bool, tmp_path: Path) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    given = make(*LENGTHS[case][0], mask)
    shapes = dims(case, mask, "named")
    names = {"input_names": list(shapes)}
    where = tmp_path / "attention.onnx"
    opened: Any = {"dynamic_shapes": shapes} if dynamo else {
        "dynamic_axes": {name: {axis: f"{name}{axis}" for axis in axes} for name, axes in shapes.items()},
        "opset_version": 17,
    }  # fmt: skip
    torch.onnx.export(Attention(is_causal=True).eval(), given, where, dynamo=dynamo, **names, **opened)
    session = onnxruntime.InferenceSession(where)

    def graph(*inputs: Tensor) -> Tensor:
        fed = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    check(graph, LENGTHS[case], mask)


@torch.no_grad()
def test_a_model_that_is_traced_without_padding_minds_it() -> None:
    """The example has a mask of ones: that nothing is hidden must not become a part of the graph."""
    regroup.register()
    module: Any = Model(tiny.build("mistral", attn_implementation="regroup"))
    ids = tiny.inputs("mistral", 2, 9)["input_ids"]
    ones = torch.ones_like(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own branches
        traced: Any = torch.jit.trace(module, (ids[:, :4], ones[:, :4]), check_trace=False)  # within the window
    padded = ones.clone()
    padded[0, :3] = 0
    for mask in (ones, padded):
        got, wanted = traced(ids, mask), module(ids, mask)
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
    assert (traced(ids, ones) - traced(ids, padded))[padded.bool()].abs().max() > 0.01


class Model(nn.Module):
    """Logits of a model, or of an encoder-decoder, by ids and padding alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        crossed = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **crossed).logits


MODELS = [("llama_grouped", True), ("llama_grouped", False), ("mistral", False), ("gemma2", True), ("t5", True)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "padded", "how"),
    [
        pytest.param(*model, how, marks=[] if (*model, how) == ("llama_grouped", False, "export") else pytest.mark.slow)
        for model in MODELS
        for how in ("export", "jit", "compile")
    ],
)
def test_models(name: str, padded: bool, how: str) -> None:
    """At two more lengths, beside the model with transformers' own implementation, uncompiled."""
    regroup.register()
    torch.compiler.reset()

    def make_ids(length: int) -> tuple[Tensor, ...]:
        ids = tiny.inputs(name, 2, length, seed=length)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return (ids, mask) if padded else (ids,)

    module: Any = Model(tiny.build(name, attn_implementation="regroup"))
    graph: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own branches
        if how == "export":
            length: Any = Dim("length", min=2, max=24)
            shapes = {"ids": {1: length}, "mask": {1: length}} if padded else {"ids": {1: length}}
            graph = torch.export.export(module, make_ids(8), dynamic_shapes=shapes).module()
        elif how == "jit":
            graph = torch.jit.trace(module, make_ids(8), check_trace=False)
        else:
            graph = torch.compile(module, backend="eager", fullgraph=True)
        plain = Model(tiny.build(name, attn_implementation="eager"))
        for length in (8, 11, 15):
            given = make_ids(length)
            wanted, got = plain(*given), graph(*given)
            kept = given[1].bool() if padded else torch.ones_like(given[0], dtype=torch.bool)
            torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=2e-4)
            assert (got[kept] - wanted.roll(1, 1)[kept]).abs().max() > 0.01
    torch.compiler.reset()
