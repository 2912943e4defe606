"""Switches of a config that change attention: with equal heads in each group, the converted model answers as before.

The original runs as transformers' own class, with every switch that its config class knows; the converted model as
``regroup.load`` gives it, in the stock class where that holds it and in ours where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import naive
import regroup
import tiny
from helpers import convert_heads, head_map, logits, refused

Saved = Callable[[str], Path]

SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 5}),  # parts of unequal size
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 1}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt_bigcode", {"scale_attn_weights": False, "attention_softmax_in_fp32": False}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("opt", {"enable_bias": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.25}),
    ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    ("gemma2", {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "sliding_window": 4}),
    ("olmo", {"clip_qkv": 0.5}),
    ("llama", {"pretraining_tp": 2, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 3}),
    ("mixtral", {"sliding_window": 3}),
    ("phi3", {"sliding_window": 3}),
    ("starcoder2", {"sliding_window": 3, "use_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "attention_bias": True}),
    ("falcon", {"alibi": True, "parallel_attn": True, "bias": False}),
    ("falcon", {"rope_theta": 500.0, "parallel_attn": False}),
    (
        "t5",
        {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    ),
    ("t5", {"tie_word_embeddings": False}),
    ("umt5", {"feed_forward_proj": "relu"}),
    ("bart", {"scale_embedding": True}),
    ("mbart", {"scale_embedding": False, "activation_function": "relu"}),
    ("marian", {"scale_embedding": True, "static_position_embeddings": True}),
    ("whisper", {"scale_embedding": True}),
]


def original(name: str, switches: dict[str, Any]) -> Any:
    facts = tiny.FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, facts.config_class)(**{**facts.kwargs, **switches})
    model = getattr(transformers, facts.model_class)(config)
    tiny.randomize(model, std=facts.weight_std, seed=0)
    return model.eval()


@pytest.mark.parametrize(("name", "switches"), SWITCHES, ids=[f"{n}-{'-'.join(s)}" for n, s in SWITCHES])
def test_equal_heads_lose_nothing_whatever_is_switched(name: str, switches: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("some", "mixed"):
        heads, model = head_map(name, kind), original(name, switches)
        before = logits(model, name)
        # The switch does something, or at least the model is another: it is not left out on the way.
        naive.tie_groups(model, heads)
        expected: Tensor = logits(model, name)
        assert (before - expected).abs().max() > 1e-3  # the heads did differ, so a wrong one would show
        model.save_pretrained(tmp_path / kind)
        convert_heads(tmp_path / kind, tmp_path / f"{kind}-out", heads)
        found = logits(regroup.load(tmp_path / f"{kind}-out", progress=False), name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_slow_sum_leaves_the_bias_out_as_the_stock_class_does() -> None:
    """The other side of the test above: the biases that are left out are not zero."""
    fast, slow = (logits(original("bloom", {"slow_but_exact": s, "pretraining_tp": 2}), "bloom") for s in (False, True))
    assert (fast - slow).abs().max() > 1e-2


def test_what_cannot_be_right_with_the_slow_sum_is_refused(tmp_path: Path) -> None:
    original("bloom", {"slow_but_exact": True, "pretraining_tp": 2}).save_pretrained(tmp_path / "in")
    (tmp_path / "t.txt").write_text("a b c " * 100)
    message = refused("convert", tmp_path / "in", tmp_path / "o", "--kv-heads", 3, "--calibration", tmp_path / "t.txt")
    assert "slow_but_exact" in message
    assert "slow_but_exact" in refused("export", tmp_path / "in", tmp_path / "o", "--to", "vllm")
    assert not (tmp_path / "o").exists()
