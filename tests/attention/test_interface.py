"""``attn_implementation="regroup"`` writes, token for token, what ``"eager"`` writes with the default cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import regroup
import tiny
from regroup.attention import interface
from regroup.attention.cache import KVCache
from regroup.attention.cpu.linear_layers import fast_layer
from regroup.errors import RegroupError

Converted = Callable[[str, str], Path]
STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260k"

# Families whose attention does not go through the interface.
OUTSIDE = {"bloom", "falcon", "falcon_sequential", "falcon_alibi"}
INSIDE = sorted(set(tiny.FAMILIES) - OUTSIDE)
NEW = 12

regroup.register()


def prompt(name: str, *, padded: bool = True) -> dict[str, Tensor]:
    """Three sequences, two of them padded: on the left for decoders, on the right for encoders."""
    inputs = tiny.inputs(name, 3, 9)
    inputs.pop("decoder_input_ids", None)
    if padded and "attention_mask" in inputs:
        causal = tiny.FAMILIES[name].kind == "causal"
        for row, count in ((0, 5), (1, 2)):
            part = slice(0, count) if causal else slice(-count, None)
            inputs["attention_mask"][row, part] = 0
            inputs["input_ids"][row, part] = 0
    return inputs


def write(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str, **kwargs: Any) -> Tensor:
    """Token ids (rows, length) that a model writes: greedy or with beams, always ``NEW`` of them."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.generation_config.max_length = None
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    generate: Any = model.generate
    return generate(**inputs, **settings)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the operator is asked for, call by call."""
    seen: list[dict[str, Any]] = []
    operator = interface.grouped_query_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        seen.append({"query": query, "key": key, "value": value, **kwargs})
        return operator(query, key, value, **kwargs)

    monkeypatch.setattr(interface, "grouped_query_attention", spy)
    return seen


@pytest.mark.filterwarnings("ignore")  # transformers' own, about generation flags of Whisper
@pytest.mark.parametrize("kind", ["all", "mixed", "one"])
@pytest.mark.parametrize("name", INSIDE)
def test_text_is_that_of_eager(converted: Converted, calls: list[dict[str, Any]], name: str, kind: str) -> None:
    """Multi-head, grouped (another number of KV heads in each layer) and multi-query, padded."""
    model: Any = tiny.build(name) if kind == "all" else regroup.load(converted(name, kind), progress=False)
    inputs = prompt(name)
    wanted = write(model, inputs, "eager")
    assert not calls
    cache = KVCache.for_model(model, max_length=9 + NEW)
    assert torch.equal(write(model, inputs, "regroup", past_key_values=cache), wanted)
    assert len(calls) >= NEW * tiny.FAMILIES[name].num_hidden_layers
    if kind == "one":
        decoding = [call for call in calls if call["query"].shape[2] == 1]
        assert {call["key"].shape[1] for call in decoding} == {1}
        assert decoding[0]["query"].shape[1] > 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama_grouped", "mistral", "gemma2", "qwen2", "t5", "bart", "whisper"])
@pytest.mark.parametrize("limit", [None, 9 + NEW])
def test_beams_are_those_of_eager(name: str, limit: int | None) -> None:
    model, inputs = tiny.build(name), prompt(name)
    wanted = write(model, inputs, "eager", num_beams=3)
    cache = KVCache.for_model(model, max_length=limit)
    assert torch.equal(write(model, inputs, "regroup", num_beams=3, past_key_values=cache), wanted)


@pytest.mark.parametrize("name", ["llama_grouped", "mistral", "phi3", "gemma2"])
def test_caches_of_transformers_serve_too(name: str) -> None:
    model, inputs = tiny.build(name), prompt(name)
    wanted = write(model, inputs, "eager")
    assert torch.equal(write(model, inputs, "regroup"), wanted)
    static = write(model, inputs, "regroup", cache_implementation="static", disable_compile=True)
    assert torch.equal(static, wanted)
    # And the other way: this cache gives other implementations what they expect.
    for other in ("eager", "sdpa") if name != "gemma2" else ("eager",):
        assert torch.equal(write(model, inputs, other, past_key_values=KVCache.for_model(model)), wanted)


@pytest.mark.parametrize("name", ["llama_grouped", "mistral", "t5"])
def test_speculation_takes_tokens_back(name: str) -> None:
    model, inputs = tiny.build(name), prompt(name, padded=False)
    inputs = {key: value[:1] for key, value in inputs.items()}
    wanted = write(model, inputs, "eager")
    cache = KVCache.for_model(model)
    assert torch.equal(write(model, inputs, "regroup", prompt_lookup_num_tokens=3, past_key_values=cache), wanted)


@pytest.mark.parametrize("name", ["llama_grouped", "mistral", "gemma2", "gpt2"])
def test_decoding_without_padding_has_no_mask(calls: list[dict[str, Any]], name: str) -> None:
    model = tiny.build(name)
    write(model, prompt(name, padded=False), "regroup", past_key_values=KVCache.for_model(model))
    decoding = [call for call in calls if call["query"].shape[2] == 1]
    assert len(decoding) == (NEW - 1) * tiny.FAMILIES[name].num_hidden_layers
    assert all(call["mask"] is None and call["bias"] is None for call in decoding)
    calls.clear()
    write(model, prompt(name), "regroup", past_key_values=KVCache.for_model(model))  # negative control
    masks = [call["mask"] for call in calls if call["query"].shape[2] == 1]
    assert any(mask is not None for mask in masks)
    assert all(mask is None or mask.shape[1:3] == (1, 1) for mask in masks)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_full_window_is_handed_over_as_it_lies(calls: list[dict[str, Any]], name: str) -> None:
    """With padding and without: no copy of the window at any token."""
    window = tiny.FAMILIES[name].kwargs["sliding_window"]
    for padded in (True, False):
        model = tiny.build(name)
        cache: Any = KVCache.for_model(model)
        write(model, prompt(name, padded=padded), "regroup", past_key_values=cache)
        places = {layer.blocks[0].data_ptr() for layer in cache.layers if layer.is_sliding}
        sliding = [call for call in calls if call["key"].shape[2] == window and call["query"].shape[2] == 1]
        assert sliding
        assert {call["key"].data_ptr() for call in sliding} <= places
        calls.clear()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
def test_t5_makes_no_bias_of_zeros(
    monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]], name: str, converted: Converted
) -> None:
    """Nothing as large as the scores is made for cross-attention, and none of it reaches the operator."""
    model: Any = regroup.load(converted(name, "one"), progress=False)
    crossed: list[Tensor] = []
    stock = interface.attention_forward

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "EncDec" in names[module]:
            crossed.append(kwargs["position_bias"])
        return stock(module, *args, **kwargs)

    names = {module: path for path, module in model.named_modules()}
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "regroup", spy)
    write(model, prompt(name), "regroup", past_key_values=KVCache.for_model(model))
    length = prompt(name)["input_ids"].shape[1]
    decoding = [call for call in calls if call["query"].shape[2] == 1]
    self_attention = [call for call in decoding if call["is_causal"] is False and call["key"].shape[2] != length]
    assert all(call["bias"].shape[2] == 1 for call in self_attention)
    assert len(crossed) == NEW * 2
    assert all(bias.untyped_storage().nbytes() == bias.element_size() for bias in crossed)
    assert sum(call["bias"] is None for call in decoding) == NEW * 2


def test_heads_in_a_wrong_order_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build("llama_grouped"), prompt("llama_grouped")
    wanted = write(model, inputs, "eager")
    operator = interface.grouped_query_attention
    monkeypatch.setattr(
        interface, "grouped_query_attention", lambda q, k, v, **kw: operator(q, k.flip(1), v.flip(1), **kw)
    )
    assert not torch.equal(write(model, inputs, "regroup"), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_grouped", "mistral", "gemma2"])
def test_a_conversation_goes_on(calls: list[dict[str, Any]], name: str) -> None:
    """Several tokens after those in the cache: the last query is the newest token, without a mask where it can be."""
    model = tiny.build(name, attn_implementation="regroup")
    ids = tiny.inputs(name, 2, 14)["input_ids"]
    cache = KVCache.for_model(model)
    found = [model(part, past_key_values=cache).logits for part in ids.split([3, 5, 6], 1)]
    if name == "llama_grouped":
        assert all(call["mask"] is None and call["is_causal"] for call in calls)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(torch.cat(found, 1), model(ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama_grouped", "gemma2", "t5", "bart"])
def test_gradients_are_those_of_eager(name: str) -> None:
    inputs = tiny.inputs(name, 2, 9)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    found = []
    for implementation in ("eager", "regroup"):
        model = tiny.build(name, attn_implementation=implementation)
        model.train()  # dropout is 0 in the tiny configurations
        model(**inputs, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient, atol=1e-4, rtol=1e-3, msg=path)


def test_gradients_with_left_padding_are_those_of_sdpa() -> None:
    """A query that is padding sees nothing: zeros here and in SDPA; eager spreads it over all keys, and differs."""
    given = tiny.inputs("llama_grouped", 2, 9)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][0, :4] = 0
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    found = {}
    for implementation in ("eager", "sdpa", "regroup"):
        model = tiny.build("llama_grouped", attn_implementation=implementation)
        for forgiven in (False, True):  # the first label after the padding is predicted from padding
            kept = labels.clone()
            kept[0, 4] = -100 if forgiven else kept[0, 4]
            model.zero_grad()
            loss: Any = model(**given, labels=kept).loss
            loss.backward()
            total = sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
            found[implementation, forgiven] = loss.item(), total
    for forgiven in (False, True):
        assert found["regroup", forgiven] == pytest.approx(found["sdpa", forgiven], rel=1e-4)
    assert found["eager", True] == pytest.approx(found["regroup", True], rel=1e-4)
    assert found["eager", False] != pytest.approx(found["regroup", False], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama_grouped", "mistral"])
def test_dropout_in_training_is_that_of_sdpa(name: str) -> None:
    inputs = tiny.inputs(name, 2, 9)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    losses = []
    for implementation, rate in (("sdpa", 0.3), ("regroup", 0.3), ("regroup", 0.0)):
        model = tiny.build(name, attn_implementation=implementation).train()
        modules: Any = list(model.modules())
        for module in modules:
            for attribute in ("dropout", "attention_dropout"):
                if type(module).__name__.endswith("Attention") and isinstance(getattr(module, attribute, 0), float):
                    setattr(module, attribute, rate)
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = rate
        torch.manual_seed(0)
        losses.append(model(**inputs, labels=labels).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


def test_what_is_not_computed_is_refused() -> None:
    config = transformers.GptOssConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "regroup"
    sinks: Any = transformers.GptOssForCausalLM(config).eval()
    with pytest.raises(RegroupError, match="attention sinks"):
        sinks(torch.tensor([[3, 4, 5]]))


def test_dropout_beside_a_soft_cap() -> None:
    """transformers' SDPA has no soft cap; eager has, and drops the same weights for the same seed."""
    losses = []
    for implementation, rate in (("eager", 0.3), ("regroup", 0.3), ("regroup", 0.0)):
        model: Any = tiny.build("gemma2", attn_implementation=implementation).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = rate
        torch.manual_seed(0)
        given = tiny.inputs("gemma2", 2, 9)
        losses.append(model(**given, labels=given["input_ids"]).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", INSIDE)
def test_asked_for_weights_it_does_as_sdpa_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of the same form, without weights, and a warning in every family, also where SDPA has none."""
    said: list[str] = []
    monkeypatch.setattr(interface.logger, "warning_once", said.append, raising=False)
    given, forms = tiny.inputs(name, 1, 4), []
    for implementation in ("sdpa", "regroup"):
        try:
            model: Any = tiny.build(name, attn_implementation=implementation)
        except ValueError:  # transformers has no SDPA for a family with a soft cap
            assert name.startswith("gemma2")
            forms.append({"attentions": ()})
            continue
        assert not said
        output = model(**given, output_attentions=True)
        forms.append({key: value for key, value in output.items() if "attentions" in key})
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True
    assert forms[1] == forms[0]
    assert forms[0]
    assert any('attn_implementation="eager"' in text for text in said)
    said.clear()
    tiny.build(name, attn_implementation="regroup")(**given)
    assert not said
    weights = tiny.build(name, attn_implementation="eager")(**given, output_attentions=True)
    assert any(weights[key] for key in forms[0])


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_families_outside_are_refused(converted: Converted, name: str) -> None:
    """Their attention would add a mask of bools to its scores."""
    with pytest.raises(RegroupError, match="interface"):
        regroup.load(converted(name, "all"), progress=False, attn_implementation="regroup")
    if name == "bloom":
        config = transformers.BloomConfig(**tiny.FAMILIES[name].kwargs)
        config._attn_implementation = "regroup"
        model: Any = transformers.BloomForCausalLM(config).eval()
        with pytest.raises(RegroupError, match="modeling_bloom"):
            model(**tiny.inputs(name, 1, 4))


def test_load_knows_the_name(converted: Converted) -> None:
    model = regroup.load(converted("llama", "one"), progress=False, attn_implementation="regroup")
    assert model.config._attn_implementation == "regroup"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_text_is_the_same(packed: bool) -> None:
    """Without a graph break, and with one graph for the prompt and one for all tokens."""
    model, inputs = tiny.build("llama_grouped"), prompt("llama_grouped", padded=False)
    wanted = write(model, inputs, "eager")
    if packed:
        layer, why = fast_layer(torch.float32)
        if layer is None:
            pytest.skip(why)
        regroup.prepare_for_inference(model)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.set_attn_implementation("regroup")
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = KVCache.for_model(model, max_length=9 + NEW)
    assert torch.equal(write(model, inputs, "regroup", past_key_values=cache), wanted)
    assert len(graphs) <= 3
    torch.compiler.reset()


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k checkpoint is not beside the project")
def test_a_real_story_is_told_as_eager_tells_it() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES)
    model = regroup.load(STORIES, progress=False)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    inputs = dict(tokenizer("Once upon a time", return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    settings = {"max_new_tokens": 200, "min_new_tokens": 0}
    wanted = write(model, inputs, "eager", **settings)
    cache = KVCache.for_model(model, max_length=256)
    found = write(model, inputs, "regroup", past_key_values=cache, **settings)
    assert tokenizer.decode(found[0]) == tokenizer.decode(wanted[0])
    assert found.shape[1] > 100
