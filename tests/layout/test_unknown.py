"""What is said of families without a row, against what transformers' own tables and configs say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto

from helpers import refused
from regroup import RegroupError
from regroup.families import FAMILIES
from regroup.families.unknown import sort_of
from regroup.layout import detect

TYPES = sorted(set(transformers.CONFIG_MAPPING.keys()) - FAMILIES.keys())


def names(*tables: str) -> set[str]:
    return {name for table in tables for name in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})}


GENERATE = names("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
MASKED = names("MASKED_LM")
WATCH = names(
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "DEPTH_ESTIMATION",
    "IMAGE_FEATURE_EXTRACTION",
)


def said(config: dict[str, Any]) -> RegroupError:
    with pytest.raises(RegroupError) as error:
        detect(config)
    return error.value


def test_every_type_of_transformers_is_described_correctly() -> None:
    wrong = []
    for model_type in TYPES:
        sort = sort_of({"model_type": model_type}, FAMILIES)
        # transformers knows it: it is no misspelling of another.
        right = sort not in ("misspelt", "no type", "older code")
        if sort == "encoder":
            # BERT and its kin have a decoder class too, for a config that asks for it.
            right &= model_type not in GENERATE or model_type in MASKED
            if model_type in names("CAUSAL_LM"):
                right &= sort_of({"model_type": model_type, "is_decoder": True}, FAMILIES) == "decoder"
        if sort in ("latent", "decoder", "state space", "encoder-decoder"):
            right &= model_type not in MASKED - GENERATE
        if model_type in (MASKED | WATCH) - GENERATE - {"imagegpt"} and sort != "?":
            right &= sort == "encoder"
        message = str(said({"model_type": model_type}))
        if not right or repr(model_type) not in message or "remedy:" not in message:
            wrong.append((model_type, sort))
    assert wrong == []
    assert len(TYPES) > 300


@pytest.mark.slow
def test_sorts_are_those_of_the_default_configs() -> None:
    """With whole configs: latent ranks, text models inside, and encoders beside decoders are seen."""
    wrong = []
    for model_type in TYPES:
        try:
            made: Any = transformers.CONFIG_MAPPING[model_type]()
        except Exception:
            continue  # needs something that is not installed
        config = {**made.to_dict(), "model_type": model_type}
        sort = sort_of(config, FAMILIES)
        expected: set[str] = set()
        if config.get("kv_lora_rank"):
            expected = {"latent"}
        elif model_type in names("IMAGE_TEXT_TO_TEXT") and "text_config" in (made.sub_configs or {}):
            expected = {"wrapper"}
        elif config.get("is_encoder_decoder") and model_type in names("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
            expected = {"encoder-decoder"}
        if expected and sort not in expected:
            wrong.append((model_type, sort, expected))
    assert wrong == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, ("latent attention", "no key/value heads")),
        ({"model_type": "anything_new", "kv_lora_rank": 512}, ("latent attention",)),
        ({"model_type": "kimi_k2"}, ("latent attention",)),
        ({"model_type": "minicpm3"}, ("latent attention",)),
        ({"model_type": "glm_moe_dsa"}, ("latent attention",)),
        ({"model_type": "bert"}, ("encoder", "caches no keys")),
        ({"model_type": "xlm-roberta"}, ("encoder",)),
        ({"model_type": "vit"}, ("encoder",)),
        ({"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}, ("encoder",)),
        ({"model_type": "siglip_vision_model"}, ("encoder",)),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            ("around a text model (llama)", "known here"),
        ),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, ("(mistral)", "without their prefix")),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, ("(gemma3_text)", "not known here")),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "deepseek_v3"}}, ("(deepseek_v3)", "latent")),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, ("(qwen2)",)),
        ({"model_type": "omni", "thinker_config": {"text_config": {"model_type": "qwen2"}}}, ("(qwen2)",)),
        ({"model_type": "qwen2_vl"}, ("(qwen2_vl_text)",)),
        ({"model_type": "mamba"}, ("state-space", "nowhere")),
        ({"model_type": "rwkv"}, ("recurrent", "nowhere")),
        ({"model_type": "jamba"}, ("state-space", "in few of its layers")),
        ({"model_type": "led"}, ("an encoder-decoder that no row describes",)),
        ({"model_type": "new", "is_encoder_decoder": True, "is_decoder": True}, ("no row describes",)),
        ({"model_type": "gptj"}, ("a decoder that no row describes", "adding-a-family")),
        ({"model_type": "olmo3"}, ("a decoder that no row describes",)),
        ({"model_type": "stablelm_epoch"}, ("code of its own", "stablelm")),
        ({"model_type": "phi-msft"}, ("code of its own", "phi")),
        ({"model_type": "mixformer-sequential"}, ("code of its own", "phi")),
        ({"model_type": "chatglm", "multi_query_group_num": 2}, ("code of its own", "glm")),
        ({"model_type": "qwen"}, ("code of its own",)),
        ({"model_type": "btlm"}, ("code of its own",)),
        ({"model_type": "LLaMA"}, ("closest known name is llama",)),
        ({"model_type": "gptneox"}, ("closest known name is gpt_neox",)),
        ({"model_type": "mistrall"}, ("closest known name is mistral",)),
        ({"model_type": "qwen-2"}, ("closest known name is qwen2",)),
        ({"model_type": "my-own-model"}, ("not known", "adding-a-family")),
        ({"model_type": "llama5"}, ("not known", "adding-a-family")),
        ({}, ("names none", "add model_type")),
        ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, ("llama, as its class",)),
        ({"architectures": ["GPT2LMHeadModel"]}, ("gpt2, as its class",)),
        ({"model_type": ["llama"]}, ("not known",)),
    ],
)
def test_what_is_said(config: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    message = str(said(config))
    assert [word for word in words if word not in message] == [], message
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert words[0] in refused("inspect", file)


def test_sorts_do_not_overlap() -> None:
    """A type that has got a family since may stay in its list: adding a family touches one place."""
    from regroup.families import unknown

    lists: list[Any] = [
        *(unknown._ENCODERS, unknown._LATENT, unknown._STATE, unknown._HYBRID, unknown._ENCODER_DECODERS),
        *(unknown._DECODERS, unknown._OLDER, unknown._FLAT_WRAPPERS),
    ]
    seen = [name for one in lists for name in one]
    assert len(seen) == len(set(seen))
