"""``prepare_for_inference``: the same text from both kinds of fast layers; packed ones keep no second weight."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import regroup
import tiny
from regroup.attention import prepare
from regroup.attention.cache import KVCache
from regroup.attention.cpu import linear_layers
from regroup.attention.cpu.build import unsupported_reason
from regroup.attention.cpu.linear_layers import DirectLinear, PackedLinear, fast_layer, packed_unsupported_reason
from regroup.attention.prepare import prepare_for_inference
from regroup.errors import RegroupError


def take(layer: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be prepared with one kind of layer, or skip where it cannot be had."""
    why = packed_unsupported_reason(dtype) if layer is PackedLinear else unsupported_reason()
    if why is not None:
        pytest.skip(why)
    monkeypatch.setattr(prepare, "fast_layer", lambda dtype: (layer, "a test wants it"))


@pytest.fixture(params=[DirectLinear, PackedLinear])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    take(request.param, torch.float32, monkeypatch)
    return request.param


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    take(PackedLinear, torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40), (8, 40), (2, 3, 40), (2, 1, 40), (3, 50, 40)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DirectLinear, PackedLinear])
@torch.no_grad()
def test_a_fast_layer_is_the_layer(
    kind: type[DirectLinear | PackedLinear],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(kind, dtype, monkeypatch)
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias).to(dtype)
    states = torch.randn(*shape).to(dtype)
    packed = kind(layer.weight, layer.bias)
    exact = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    own, ours = ((found.double() - exact).abs().max() for found in (layer(states), packed(states)))
    assert packed(states).shape == (*shape[:-1], 24)
    assert packed(states).dtype == dtype
    assert ours <= 2 * own + 1e-6
    # Views with gaps are read as they are.
    wide = torch.randn(*shape[:-1], 80).to(dtype)[..., ::2]
    torch.testing.assert_close(packed(wide), layer(wide), atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that operators make; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, found.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_once", [1, 7 * 40, 100 * 40])
@torch.no_grad()
def test_a_large_weight_is_widened_a_few_rows_at_a_time(
    bias: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers whose sums are exact in any order, so that blocks give the bits of the whole."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-4, 5, (999, 41), generator=generator).bfloat16()
    layer = DirectLinear(numbers[:, :40], numbers[:, 40] if bias else None)
    states = torch.randint(-4, 5, (2, 35, 40), generator=generator).bfloat16()
    with Largest() as before:
        wanted = layer(states)
    assert before.nbytes == 4 * max(999 * 40, 70 * 999)
    exact = nn.functional.linear(states.double(), layer.weight.double(), numbers[:, 40].double() if bias else None)
    assert torch.equal(wanted, exact.bfloat16())
    monkeypatch.setattr(linear_layers, "_WIDENED", at_once)
    with Largest() as blocks:
        assert torch.equal(layer(states), wanted)
    rows = max(1, at_once // 40)
    # The result itself in bfloat16, the input in float32, some rows of the weight, and their results.
    assert blocks.nbytes <= max(2 * 70 * 999, 4 * 70 * 40, 4 * rows * 40, 4 * 70 * rows)
    with torch.enable_grad():
        followed = states.clone().requires_grad_()
        layer(followed).backward(torch.ones_like(wanted))
    assert followed.grad is not None
    assert torch.equal(followed.grad, layer.weight.float().sum(0).bfloat16().expand(2, 35, 40))


@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused(either: type[DirectLinear | PackedLinear]) -> None:
    """As by ``nn.Linear``, for sizes that divide and are divided by what would fit too."""
    layer = either(torch.randn(6, 8), None)
    for states in (torch.randn(4, 4), torch.randn(4, 16), torch.randn(2, 4, 2), torch.tensor(1.0)):
        with pytest.raises((RuntimeError, RegroupError)):
            layer(states)
    torch.testing.assert_close(layer(torch.ones(8)), layer.forward(torch.ones(1, 8))[0])


@torch.no_grad()
def test_autocast_is_that_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few rows, which the kernel would compute in float32, and for many."""
    take(DirectLinear, torch.float32, monkeypatch)
    layer = nn.Linear(16, 8)
    fast = DirectLinear(layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        for states in (torch.randn(2, 16), torch.randn(100, 16)):
            assert fast(states).dtype == layer(states).dtype == torch.bfloat16


@torch.no_grad()
def test_a_fast_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    take(DirectLinear, torch.float32, monkeypatch)
    layer = DirectLinear(torch.randn(6, 8), None)
    graphs: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled: Any = torch.compile(layer, fullgraph=True, backend=look)
    for rows, wanted in ((2, True), (100, False)):
        states = torch.randn(rows, 8)
        assert torch.equal(compiled(states), layer(states))
        assert ("cpu_linear" in graphs[-1]) is wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(torch.randn(2, 8)).dtype == torch.bfloat16


@torch.no_grad()
def test_a_bias_with_gaps_is_read_right(either: type[DirectLinear | PackedLinear]) -> None:
    """oneDNN's operator reads it as if it had none."""
    torch.manual_seed(0)
    weight, states = torch.randn(12, 7), torch.randn(2, 7)
    packed = either(weight, weight[:, 0])
    torch.testing.assert_close(packed(states), nn.functional.linear(states, weight, weight[:, 0]))


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "phi3", "gpt2", "t5", "t5_v1_1", "bart", "bloom", "falcon"])
def test_text_stays_the_same(name: str, either: type[nn.Module]) -> None:
    inputs = tiny.inputs(name, 2, 8)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    stock: Any = tiny.build(name)
    wanted = stock.generate(**inputs, **settings)
    model: Any = prepare_for_inference(tiny.build(name))
    assert any(isinstance(module, either) for module in model.modules())
    assert {type(m).__name__ for m in model.modules() if type(m).__name__.endswith(("Linear", "Conv1D"))} == {
        either.__name__
    }
    if name not in ("bloom", "falcon"):
        regroup.register()
        model.set_attn_implementation("regroup")
    found = model.generate(**inputs, **settings, past_key_values=KVCache.for_model(model))
    assert torch.equal(found, wanted)


def test_a_wrong_weight_shows(either: type[nn.Module]) -> None:
    inputs = tiny.inputs("llama", 2, 8)
    model: Any = tiny.build("llama")
    wanted = model(**inputs).logits
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.flip(0))
    assert not torch.allclose(prepare_for_inference(model)(**inputs).logits, wanted, atol=1e-2)


@pytest.mark.usefixtures("packing")
def test_unpacked_weights_are_freed_and_shared_ones_stay_shared() -> None:
    model: Any = tiny.build("llama")
    old = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    assert prepare_for_inference(model) is model
    assert all(reference() is None for reference in old)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layer = nn.Linear(16, 16)
    pair: Any = prepare_for_inference(nn.Sequential(layer, nn.ReLU(), layer))
    assert isinstance(pair[0], PackedLinear)
    assert pair[2] is pair[0]
    tied: Any = prepare_for_inference(tiny.build("qwen3"))
    assert tied.get_input_embeddings().weight.shape == (tiny.VOCAB_SIZE, 48)


@pytest.mark.usefixtures("packing")
def test_a_packed_model_is_not_saved_or_trained(tmp_path: Path) -> None:
    model: Any = prepare_for_inference(tiny.build("llama"))
    with pytest.raises(RegroupError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    with pytest.raises(RegroupError, match="no gradients"):
        layer(torch.zeros(1, layer.in_features, requires_grad=True))
    with pytest.raises(RegroupError, match="another dtype"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_a_packed_model_is_not_copied(act: Callable[[Any], Any]) -> None:
    with pytest.raises(RegroupError, match="cannot be copied"):
        act(prepare_for_inference(nn.Sequential(nn.Linear(16, 16))))


@pytest.mark.usefixtures("packing")
@torch.no_grad()
def test_a_packed_model_is_not_moved_or_converted() -> None:
    model: Any = prepare_for_inference(nn.Sequential(nn.Linear(16, 16)))
    states = torch.randn(2, 16)
    wanted = model(states)
    for act in (model.double, model.bfloat16, lambda: model.to("meta")):
        with pytest.raises(RegroupError, match="cannot be moved or converted"):
            act()
    assert torch.equal(model.float().to("cpu")(states), wanted)  # where it is, as it is
    with pytest.raises(RegroupError, match="do not match"):
        model(states[:, :8])


@torch.no_grad()
def test_a_second_time_takes_what_has_come_since(either: type[nn.Module]) -> None:
    model: Any = prepare_for_inference(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    first = model[0]
    assert prepare_for_inference(model) is model
    model.append(nn.Linear(16, 4))
    prepare_for_inference(model)
    assert isinstance(model[2], either)
    assert model[0] is first


@torch.no_grad()
def test_layers_that_do_more_are_left_alone(either: type[nn.Module]) -> None:
    """A hook, another ``forward``, and a parent that reads the weight past the layer."""
    layer: Any = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    seen: list[Any] = []
    layer[0].register_forward_hook(lambda *given: seen.append(given))
    layer[1].register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    stock = layer[2].forward
    layer[2].forward = lambda states: stock(states) * 2
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, encoder).eval()
    states = torch.randn(2, 5, 16)
    wanted = model(states)
    prepare_for_inference(model)
    assert torch.allclose(model(states), wanted, atol=1e-5)
    assert len(seen) == 2
    assert [type(module) is either for module in layer] == [False, False, False, True]


class Quantised(torch.Tensor):
    """A weight that is more than its numbers."""


@torch.no_grad()
def test_weights_that_are_no_plain_tensors_are_left_alone(either: type[nn.Module]) -> None:
    model: Any = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantised), requires_grad=False)
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse(), requires_grad=False)
    prepare_for_inference(model)
    assert [type(module) is either for module in model] == [False, False, True]


@torch.no_grad()
def test_a_transposed_weight_is_stored_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 keeps (in, out): a square one that was stored as (out, in) would be loaded without a word."""
    take(DirectLinear, torch.float32, monkeypatch)
    stock: Any = tiny.build("gpt2")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model: Any = prepare_for_inference(stock)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    again: Any = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    layer = model.transformer.h[0].attn.c_proj
    states = torch.randn(2, layer.in_features)
    wanted = layer(states)
    for parameter in model.parameters():
        parameter.zero_()
    model.load_state_dict(before)
    assert torch.equal(layer(states), wanted)


def test_what_cannot_be_prepared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Sequential(nn.ReLU()))
    with pytest.raises(RegroupError, match="float64 is not supported"):
        prepare_for_inference(nn.Sequential(nn.Linear(4, 4)).double())
    with pytest.raises(RegroupError, match="only for CPUs"):
        prepare_for_inference(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Linear(4, 4))  # itself, it could not be replaced
    empty = nn.Linear(4, 4)
    empty.weight = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Sequential(empty))
    model = nn.Linear(4, 4)
    holder = nn.Sequential(model)
    monkeypatch.setattr(linear_layers, "has_short_vectors", lambda: False)
    monkeypatch.setattr(linear_layers, "unsupported_reason", lambda: "there is no compiler")
    monkeypatch.setattr(PackedLinear, "forward", lambda self, states: states.new_zeros(*states.shape[:-1], 48))
    with pytest.raises(RegroupError, match="wrong results"):
        prepare_for_inference(holder)
    assert holder[0] is model
    assert model.weight.requires_grad
    monkeypatch.setattr(linear_layers, "DTYPES", ())
    with pytest.raises(RegroupError, match="no linear layer can be replaced"):
        prepare_for_inference(holder)


def test_which_layer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel where it is best or alone, oneDNN's layout elsewhere, neither where there is neither."""
    for best, missing, without, wanted in (
        (True, None, None, DirectLinear),
        (False, None, None, PackedLinear),
        (False, None, "no oneDNN", DirectLinear),
        (False, "no compiler", None, PackedLinear),
        (False, "no compiler", "no oneDNN", None),
    ):
        monkeypatch.setattr(linear_layers, "has_short_vectors", lambda best=best: best)
        monkeypatch.setattr(linear_layers, "unsupported_reason", lambda missing=missing: missing)
        monkeypatch.setattr(linear_layers, "packed_unsupported_reason", lambda dtype, without=without: without)
        layer, why = fast_layer(torch.bfloat16)
        assert layer is wanted
        for reason in (missing, without):
            assert layer is not None or (reason is not None and reason in why)


def test_a_model_with_the_kernel_is_saved_copied_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(DirectLinear, torch.float32, monkeypatch)
    inputs = tiny.inputs("llama", 2, 8)
    model: Any = tiny.build("llama")
    with torch.no_grad():
        wanted = model(**inputs).logits
    weight = model.model.layers[0].mlp.up_proj.weight
    prepare_for_inference(model)
    assert model.model.layers[0].mlp.up_proj.weight is weight
    model.save_pretrained(tmp_path / "saved")
    again: Any = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.double()(**inputs).logits.float(), wanted, atol=1e-5, rtol=1e-5)
    layer = DirectLinear(torch.randn(4, 4), None)
    states = torch.randn(2, 4, requires_grad=True)
    layer(states).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, layer.weight.sum(0).expand(2, 4))
