"""``prepare_for_inference``: the same text from packed weights, and the unpacked ones are gone."""

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

import regroup
import tiny
from regroup.attention import prepare
from regroup.attention.cache import KVCache
from regroup.attention.prepare import PackedLinear, prepare_for_inference, unavailable
from regroup.errors import RegroupError

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None, reason=f"weights cannot be packed here: {unavailable(torch.float32)}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40), (8, 40), (2, 3, 40), (2, 1, 40)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_packed_layer_is_the_layer(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    if unavailable(dtype) is not None:
        pytest.skip(str(unavailable(dtype)))
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias).to(dtype)
    states = torch.randn(*shape).to(dtype)
    packed = PackedLinear(layer.weight, layer.bias)
    exact = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    own, ours = ((found.double() - exact).abs().max() for found in (layer(states), packed(states)))
    assert packed(states).shape == (*shape[:-1], 24)
    assert packed(states).dtype == dtype
    assert ours <= 2 * own + 1e-6
    # Views with gaps are read as they are.
    wide = torch.randn(*shape[:-1], 80).to(dtype)[..., ::2]
    torch.testing.assert_close(packed(wide), layer(wide), atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)


def test_a_bias_with_gaps_is_read_right() -> None:
    """oneDNN's operator reads it as if it had none."""
    torch.manual_seed(0)
    weight, states = torch.randn(12, 7), torch.randn(2, 7)
    packed = PackedLinear(weight, weight[:, 0])
    torch.testing.assert_close(packed(states), nn.functional.linear(states, weight, weight[:, 0]))


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "phi3", "gpt2", "t5", "t5_v1_1", "bart", "bloom", "falcon"])
def test_text_stays_the_same(name: str) -> None:
    inputs = tiny.inputs(name, 2, 8)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    stock: Any = tiny.build(name)
    wanted = stock.generate(**inputs, **settings)
    model: Any = prepare_for_inference(tiny.build(name))
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert {type(m).__name__ for m in model.modules() if type(m).__name__.endswith(("Linear", "Conv1D"))} == {
        "PackedLinear"
    }
    if name not in ("bloom", "falcon"):
        regroup.register()
        model.set_attn_implementation("regroup")
    found = model.generate(**inputs, **settings, past_key_values=KVCache.for_model(model))
    assert torch.equal(found, wanted)


def test_a_wrong_weight_shows() -> None:
    inputs = tiny.inputs("llama", 2, 8)
    model: Any = tiny.build("llama")
    wanted = model(**inputs).logits
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.flip(0))
    assert not torch.allclose(prepare_for_inference(model)(**inputs).logits, wanted, atol=1e-2)


def test_unpacked_weights_are_freed_and_shared_ones_stay_shared() -> None:
    model: Any = tiny.build("llama")
    old = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    assert prepare_for_inference(model) is model
    assert all(reference() is None for reference in old)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    layer = nn.Linear(16, 16)
    pair: Any = prepare_for_inference(nn.Sequential(layer, nn.ReLU(), layer))
    assert isinstance(pair[0], PackedLinear)
    tied: Any = prepare_for_inference(tiny.build("qwen3"))
    assert tied.get_input_embeddings().weight.shape == (tiny.VOCAB_SIZE, 48)


def test_a_prepared_model_is_not_saved_or_trained(tmp_path: Path) -> None:
    model: Any = prepare_for_inference(tiny.build("llama"))
    with pytest.raises(RegroupError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    with pytest.raises(RegroupError, match="no gradients"):
        layer(torch.zeros(1, layer.in_features, requires_grad=True))
    with pytest.raises(RegroupError, match="another dtype"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_a_prepared_model_is_not_copied(act: Callable[[Any], Any]) -> None:
    with pytest.raises(RegroupError, match="cannot be copied"):
        act(prepare_for_inference(nn.Sequential(nn.Linear(16, 16))))


@torch.no_grad()
def test_a_prepared_model_is_not_moved_or_converted() -> None:
    model: Any = prepare_for_inference(nn.Sequential(nn.Linear(16, 16)))
    states = torch.randn(2, 16)
    wanted = model(states)
    for act in (model.double, model.bfloat16, lambda: model.to("meta")):
        with pytest.raises(RegroupError, match="cannot be moved or converted"):
            act()
    assert torch.equal(model.float().to("cpu")(states), wanted)  # where it is, as it is
    with pytest.raises(RegroupError, match="do not fit"):
        model(states[:, :8])


@torch.no_grad()
def test_a_second_time_packs_what_has_come_since() -> None:
    model: Any = prepare_for_inference(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    first = model[0]
    assert prepare_for_inference(model) is model
    model.append(nn.Linear(16, 4))
    prepare_for_inference(model)
    assert isinstance(model[2], PackedLinear)
    assert model[0] is first


@torch.no_grad()
def test_layers_that_do_more_are_left_alone() -> None:
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
    assert [type(module) is PackedLinear for module in layer] == [False, False, False, True]


def test_what_cannot_be_packed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Sequential(nn.ReLU()))
    with pytest.raises(RegroupError, match="float64 is not packed"):
        prepare_for_inference(nn.Sequential(nn.Linear(4, 4)).double())
    with pytest.raises(RegroupError, match="CPUs alone"):
        prepare_for_inference(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Linear(4, 4))  # itself, it could not be replaced
    empty = nn.Linear(4, 4)
    empty.weight = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(RegroupError, match="no plain linear layer"):
        prepare_for_inference(nn.Sequential(empty))
    model = nn.Linear(4, 4)
    holder = nn.Sequential(model)
    monkeypatch.setattr(PackedLinear, "forward", lambda self, states: states.new_zeros(*states.shape[:-1], 48))
    with pytest.raises(RegroupError, match="other results"):
        prepare_for_inference(holder)
    assert holder[0] is model
    assert model.weight.requires_grad
    monkeypatch.setattr(prepare, "DTYPES", ())
    with pytest.raises(RegroupError, match="no linear layer can be packed"):
        prepare_for_inference(holder)
