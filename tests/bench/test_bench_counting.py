"""What a step reads by arithmetic, against hooks that see which parameters a built model's step really uses."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import tiny
from regroup.bench.build import Model, _weights, build, describe
from regroup.bench.decode import measure
from regroup.bench.variants import variant
from regroup.bench.work import Work, cache_bytes, step_costs
from regroup.errors import RegroupError

FAMILIES = [
    "llama", "llama_bias", "llama_grouped", "gemma", "phi_norm", "phi3", "starcoder2", "cohere_norm", "olmo2",
    "t5", "t5_v1_1", "umt5", "bart", "marian", "whisper", "opt", "opt_post_norm", "gpt2", "gpt_neox", "bloom",
    "falcon", "gpt_bigcode",
]  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    config = json.loads(tiny.build(name).config.to_json_string())
    return config | {"architectures": [tiny.FAMILIES[name].model_class]}


def second_step(made: Any, model: Model, batch: int, prompt: int, before: Any, after: Any) -> None:
    """One step with a cache of ``prompt`` tokens; ``before`` and ``after`` are called around it."""
    kwargs: dict[str, Any] = {}
    if model.is_encoder_decoder:
        hidden = BaseModelOutput(last_hidden_state=torch.zeros(batch, prompt, model.hidden))
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        kwargs = {"encoder_outputs": hidden}
        name, length = "decoder_input_ids", 1
    else:
        cache, name, length = DynamicCache(config=made.config), "input_ids", prompt
    ids = torch.full((batch, length), 3)
    made(**{name: ids}, past_key_values=cache, use_cache=True, **kwargs)
    before()
    made(**{name: ids[:, :1]}, past_key_values=cache, use_cache=True, **kwargs)
    after()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kv_heads", [None, 1])
@torch.no_grad()
def test_parameters_that_a_step_uses(name: str, kv_heads: int | None) -> None:
    model = describe(config_of(name), kv_heads=kv_heads, layers=None)
    made = build(model, "float32", torch.device("cpu"))
    assert sum(p.numel() for p in made.parameters()) == model.parameters
    used: dict[int, nn.Parameter] = {}

    def saw(module: nn.Module, *_: Any) -> None:
        if not isinstance(module, nn.Embedding):
            used.update({id(p): p for p in module.parameters(recurse=False)})

    hooks: list[Any] = []
    second_step(
        made,
        model,
        2,
        5,
        lambda: hooks.extend(m.register_forward_hook(saw) for m in made.modules()),
        lambda: [hook.remove() for hook in hooks],
    )
    expected = sum(p.numel() for p in used.values())
    assert model.weights.parameters == expected
    assert model.weights.multiplied == sum(p.numel() for p in used.values() if p.dim() > 1)


@pytest.mark.parametrize("name", ["llama", "llama_grouped", "gpt2", "opt", "t5_v1_1"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Products of a step, by PyTorch's own counter, with attention written out."""
    model = describe(config_of(name), kv_heads=None, layers=None)
    made = build(model, "float32", torch.device("cpu"))
    made.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    batch, prompt = 3, 11
    second_step(made, model, batch, prompt, counter.__enter__, lambda: counter.__exit__(None, None, None))
    # The step sees one token more than the prompt; work.new = 2 puts the middle of the new tokens there.
    weights, attention = step_costs(model, Work(batch, prompt, 2 if not model.is_encoder_decoder else 4))
    assert counter.get_total_flops() == weights.flops + attention.flops


@torch.no_grad()
def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    model = describe(config_of("mixtral"), kv_heads=None, layers=None)
    family = tiny.FAMILIES["mixtral"].kwargs
    experts = model.weights.experts
    assert experts is not None
    matrices = 3 * family["hidden_size"] * family["intermediate_size"]
    assert experts.parameters == family["num_hidden_layers"] * family["num_local_experts"] * matrices
    assert (experts.number, experts.chosen) == (4, 2)
    assert model.parameters == experts.parameters + model.weights.parameters + family["vocab_size"] * 48


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_omitted_parameters_would_be_noticed(name: str) -> None:
    """Keys and values of the encoder's output are made once; counting them at each step would show."""
    model = describe(config_of(name), kv_heads=None, layers=None)
    made = build(model, "float32", torch.device("cpu"))
    crossed = [n for n in made.state_dict() if "EncDecAttention.k" in n or "encoder_attn.k_proj" in n]
    memory = 2 * sum(made.state_dict()[n].numel() for n in crossed if n.startswith(("decoder", "model.decoder")))
    assert memory > 0
    assert _weights(made, set()).parameters == model.weights.parameters + memory


@pytest.mark.parametrize("name", ["llama_grouped", "gemma2", "bart", "falcon"])
def test_the_cache_is_as_large_as_predicted(name: str) -> None:
    config = config_of(name)
    for kv_heads in (None, tiny.FAMILIES[name].num_attention_heads, 1):
        model = describe(config, kv_heads=kv_heads, layers=None)
        work = Work(batch=2, prompt=9, new=4)
        timings = measure(model, work, ("regroup", "transformers"))
        assert timings["regroup"].cache_bytes == cache_bytes(model, work)
        assert [len(timing.tokens) for timing in timings.values()] == [3, 3]
    other = cache_bytes(describe(config, kv_heads=1, layers=None), Work(batch=2, prompt=9, new=5))
    assert other != cache_bytes(describe(config, kv_heads=1, layers=None), Work(batch=2, prompt=9, new=4))


@pytest.mark.parametrize("name", ["llama_grouped", "gpt_bigcode", "falcon", "t5", "gemma2", "phi3_grouped"])
def test_variants_have_the_requested_heads_and_layers(name: str) -> None:
    config = config_of(name)
    heads = tiny.FAMILIES[name].num_attention_heads
    for kv_heads, layers in itertools.product((heads, 1), (None, 1)):
        model = describe(config, kv_heads=kv_heads, layers=layers)
        assert {layer.num_key_value_heads for layer in model.attention} == {kv_heads}
        assert model.layers == (layers or tiny.FAMILIES[name].num_hidden_layers)
        assert isinstance(build(model, "float32", torch.device("cpu")), GenerationMixin)
    assert config == config_of(name)


def test_fewer_layers_of_a_converted_model_keep_their_heads() -> None:
    config = variant(config_of("gpt2"), kv_heads=1)
    assert "regroup" in config
    model = describe(config, kv_heads=None, layers=1)
    assert [layer.num_key_value_heads for layer in model.attention] == [1]
    assert describe(config, kv_heads=tiny.FAMILIES["gpt2"].num_attention_heads, layers=None).kv_heads == 6


@pytest.mark.parametrize(("kv_heads", "layers"), [(5, None), (0, None), (None, 0), (None, 4)])
def test_impossible_variants(kv_heads: int | None, layers: int | None) -> None:
    with pytest.raises(RegroupError):
        variant(config_of("llama"), kv_heads=kv_heads, layers=layers)
