"""What kind of model a config of an unknown family describes, and what can be done with it.

A ``model_type`` that has no row yet is distinguished from one for which grouping KV heads does nothing. Facts were read
from the transformers classes of the same ``model_type``; types that it does not have, from their makers' configs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from ..errors import RegroupError

Sort = Literal[
    "no type",
    "older code",
    "latent",
    "wrapper",
    "encoder",
    "state space",
    "encoder-decoder",
    "decoder",
    "misspelt",
    "?",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Encoders by themselves, and models of them alone: everything is computed at once and nothing is cached.
_ENCODERS = _names(
    """
    albert bert big_bird bros camembert canine convbert data2vec-audio data2vec-text data2vec-vision deberta deberta-v2
    distilbert dpr electra embedding_gemma2 ernie esm esmc eurobert flaubert flava fnet funnel gte ibert
    jina_embeddings_v3 layoutlm layoutlmv2 layoutlmv3 layoutxlm lilt longformer luke lxmert markuplm megatron-bert
    mobilebert modernbert modernvbert mpnet mra neomme nomic_bert nystromformer openai_privacy_filter perceiver rembert
    roberta roberta-prelayernorm roc_bert roformer splinter squeezebert tapas ultrabert ultravbert visual_bert xlm
    xlm-roberta xlm-roberta-xl xmod yoso new nomic_bert_moe
    aimv2 align altclip blip_2_qformer bridgetower chinese_clip clap clip clipseg clvp groupvit instructblip_qformer
    instructblipvideo_qformer metaclip_2 omdet-turbo owlv2 owlvit pe_audio pe_video pe_audio_video siglip siglip2 tipsv2
    videoprism vilt vision-text-dual-encoder xclip jev
    audio-spectrogram-transformer beit bit convnext convnextv2 cvt decision_transformer deit dinat dinov2
    dinov2_with_registers dinov3_convnext dinov3_vit donut-swin efficientnet efficientloftr focalnet hgnet_v2 hiera
    hubert ijepa levit lightglue mgp-str mlcd mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 patchtsmixer patchtst
    pixio pixtral poolformer pvt pvt_v2 radio regnet resnet segformer seggpt sew sew-d superglue superpoint swiftformer
    swin swin2sr swinv2 textnet timesfm timesfm2_5 timesformer timm_backbone timm_wrapper unispeech unispeech-sat
    videomae videomt vit vit_mae vit_msn vitdet vitmatte vitpose vitpose_backbone vivit vjepa2 wav2vec2 wav2vec2-bert
    wav2vec2-conformer wavlm yolos eomt eomt_dinov3 glpn
    chmv2 conditional_detr d_fine dab-detr deformable_detr deimv2 depth_anything depth_pro detr dpt edgetam
    edgetam_video grounding-dino lasr_ctc lw_detr lw_detr_vit mask2former maskformer maskformer-swin mm-grounding-dino
    oneformer parakeet_ctc granite_speech5_ctc prompt_depth_anything rf_detr rf_detr_dinov2 rt_detr rt_detr_resnet
    rt_detr_v2 sam sam2 sam2_hiera_det_model sam2_video sam3 sam3_lite_text sam3_tracker sam3_tracker_video sam3_video
    sam3_vit_model sam_hq sapiens2 sapiens2_head table-transformer tipsv2_dpt tvp upernet zoedepth
    """
)
_ENCODER_ENDS = (
    "_vision",
    "_vision_model",
    "_vision_encoder",
    "_encoder",
    "_audio_encoder",
    "_audio_model",
    "_audio",
    "_image_model",
    "_vqgan",
    "_vqmodel",
)
_CONTRASTIVE_TEXT = re.compile(
    r"(aimv2|align|altclip|bridgetower|chinese_clip|clip|clipseg|flava|groupvit|metaclip_2|owlv2|owlvit|siglip2?|tipsv2"
    r"|videoprism|xclip|sam3_lite_text)_text_model"
)
# Attention over a latent that all heads share and that is cached in place of keys and values.
_LATENT = _names(
    """
    axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl_v2 deepseekv2 deepseekv3 dots3_note_text
    glm4_moe_lite glm5_next_text glm_moe_dsa hy_v4 kimi_k2 kimi_linear longcat_flash minicpm3 mistral4
    mistral_large4_text youtu
    """
)
# A state of fixed size in the place of a cache that grows, in every layer or in most.
_STATE = _names("falcon_mamba mamba mamba2 rwkv rwkv5 rwkv6 rwkv7 retnet xlstm")
_HYBRID = _names(
    """
    bamba falcon_h1 granitemoehybrid jamba lfm2 lfm2_moe lfm3 nemotron_h olmo_hybrid phi4flash plamo2 qwen3_5_moe_text
    qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma zamba zamba2
    """
)
_ENCODER_DECODERS = _names(
    """
    bigbird_pegasus blenderbot blenderbot-small canary canary_decoder cohere_asr dia dia_decoder fsmt led longt5
    moonshine moonshine_streaming mvp nllb-moe nougat pegasus_x plbart pop2piano prophetnet rag seamless_m4t
    seamless_m4t_v2 speech_to_text speecht5 switch_transformers t5gemma t5gemma2 udop umt5_encoder
    """
)
# Decoders with heads that can be grouped, or are already, without a row in ``families``.
_DECODERS = _names(
    """
    afmoe apertus arcee aria_text beam biogpt bitnet codegen cohere2 cohere2_moe cohere_compass_text cpmant ctrl cwm
    dbrx deepseek_v4 diffllama doge dots1 emu3_text_model ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint
    gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4v_text gpt-sw3 gpt_neo
    gpt_neox_japanese gpt_oss gptj granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax imagegpt inkling2_text inkling_text internlm3 iquestcoder jais2
    jetmoe kolibri1 laguna llama4_text mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    mllama_text_model modernbert-decoder mpt nanochat nemotron olmo3 olmoe openai-gpt persimmon phimoe qwen2_5_vl_text
    qwen2_vl_text qwen3_moe qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 solar_open step3p5 trocr vaultgemma xglm
    xlnet zaya
    """
)
# Published with code of their own: what the same model is called in transformers, or None where it has no such class.
_OLDER: dict[str, str | None] = {
    "stablelm_epoch": "stablelm",
    "stablelm_alpha": None,
    "phi-msft": "phi",
    "mixformer-sequential": "phi",
    "phi3small": None,
    "chatglm": "glm",
    "qwen": None,
    "baichuan": None,
    "internlm": "llama",
    "internlm2": None,
    "Yi": "llama",
    "aquila": "llama",
    "xverse": "llama",
    "btlm": None,
    "jais": None,
    "gpt_refact": None,
    "codeshell": None,
    "exaone": None,
    "openelm": None,
    "orion": None,
    "minicpm": None,
    "skywork": "llama",
    "telechat": None,
    "hf_olmo": "olmo",
    "replit_lm": None,
}
# Where a wrapper's config holds that of its text model.
_INNER = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "vlm_config")
# Wrappers whose config does not, or did not when they were first published, and the type of their text model.
_FLAT_WRAPPERS: dict[str, str | None] = {
    "EvollaModel": None,
    "aya_vision": "cohere2",
    "chameleon": None,
    "cogvlm": None,
    "cohere2_vision": "cohere2",
    "evolla": None,
    "fuyu": "persimmon",
    "git": None,
    "granite4_vision": "granite4_vision_text",
    "idefics": None,
    "kyutai_speech_to_text": None,
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "minicpmv": None,
    "mllama": "mllama_text_model",
    "molmo": None,
    "molmo2": "molmo2_text",
    "phi3_v": "phi3",
    "phi4_multimodal": None,
    "phi4mm": None,
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_audio": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
}


def sort_of(config: Mapping[str, Any], known: Collection[str]) -> Sort:
    """What kind of model a config of no known family describes.

    Args:
        config: the parsed config.json.
        known: the model types that have a row.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        return "no type"
    if name in _OLDER:
        return "older code"
    if config.get("kv_lora_rank") or name in _LATENT:
        return "latent"
    if name in _ENCODERS:
        return "decoder" if config.get("is_decoder") else "encoder"
    if inner_type(config) is not None or name in _FLAT_WRAPPERS:
        return "wrapper"
    if name.endswith(_ENCODER_ENDS) or _CONTRASTIVE_TEXT.fullmatch(name):
        return "encoder"
    if name in _STATE or name in _HYBRID:
        return "state space"
    if name in _ENCODER_DECODERS or config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if name in _DECODERS:
        return "decoder"
    return "misspelt" if closest(name, known) is not None else "?"


def inner_type(config: Mapping[str, Any]) -> str | None:
    """The model_type of the text model inside a wrapper, or None where there is none."""
    for key in _INNER:
        part = config.get(key)
        if isinstance(part, dict):
            deeper = inner_type(part)
            name = part.get("model_type")
            if deeper is not None or (isinstance(name, str) and name):
                return deeper or name
    own = config.get("model_type")
    return _FLAT_WRAPPERS.get(own) if isinstance(own, str) else None


def closest(name: str, known: Collection[str]) -> str | None:
    """The known type that a misspelling may have meant: other signs, or another letter or two, but the same numbers."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def digits(text: str) -> list[str]:
        return re.findall(r"\d+", text)

    for one in sorted(known):
        if plain(one) == plain(name):
            return one
    near = difflib.get_close_matches(name.lower(), [k for k in sorted(known) if digits(k) == digits(name)], 1, 0.84)
    return near[0] if near else None


def unknown_family(config: Mapping[str, Any], known: Collection[str]) -> RegroupError:
    """The refusal of a config whose family has no row: what it is, and what can be done."""
    name, sort = config.get("model_type"), sort_of(config, known)
    types = f"model_type one of {', '.join(sorted(known))}"
    got = f"model_type {name!r}"
    if sort == "no type":
        what = "the model family is not known: config.json names none"
        remedy = f"add model_type{_from_class(config, known)}; its makers' repository says which it is"
    elif sort == "older code":
        now = _OLDER[str(name)]
        what = "this model family is not known: it was published with code of its own, which is not run here"
        remedy = "look for a revision in one of the families above" + (
            f": transformers has such models as {now}" if now else ""
        )
    elif sort == "latent":
        what = "this model has no key/value heads to merge: multi-head latent attention caches one latent for all heads"
        remedy = "none is needed: its cache is small already"
    elif sort == "wrapper":
        inner = inner_type(config)
        what = f"this is a model around a text model ({inner or 'of its own'}), which alone could be converted"
        if inner in known:
            remedy = (
                f"save the text model alone in a folder of its own: its part of config.json (such as text_config, with "
                f"architectures) as config.json, and its tensors without their prefix; {inner} is known here"
            )
        else:
            other = sort_of({"model_type": inner}, known) if inner else "?"
            why = {
                "latent": " has no key/value heads to merge (multi-head latent attention)",
                "state space": " has attention in few layers or none (a state-space model)",
            }.get(other, " is not known here either; docs/adding-a-family.md says what a new family needs")
            remedy = f"none: {inner or 'its text model'}{why}"
    elif sort == "encoder":
        what = "this model is an encoder: it computes everything at once and caches no keys or values"
        remedy = "none is needed: there is no cache to make smaller"
    elif sort == "state space":
        few = "in few of its layers only" if name in _HYBRID else "nowhere"
        what = f"this is a state-space or recurrent model: attention with key/value heads is {few}"
        remedy = (
            "none: a state of fixed size stands in the cache's place"
            if few == "nowhere"
            else "none yet: its few attention layers could be converted, but no row describes them "
            "(docs/adding-a-family.md)"
        )
    elif sort == "misspelt":
        near = closest(str(name), known)
        what = "this model family is not known"
        remedy = f"the closest known name is {near}: set model_type to it, if that is what the model is"
    else:
        kind = {"decoder": "a decoder", "encoder-decoder": "an encoder-decoder"}.get(sort)
        what = "this model family is not known" + (f": {kind} that no row describes yet" if kind else "")
        remedy = (
            "docs/adding-a-family.md says what a new family needs; a fine-tune that only renamed its model_type can "
            "have it set back"
        )
    return RegroupError(what, file="config.json", expected=types, got=got, remedy=remedy)


def _from_class(config: Mapping[str, Any], known: Collection[str]) -> str:
    """What the name of the class says of the model type."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return ""
    stem = re.sub(r"(For\w+|LMHeadModel|Model|MTModel)$", "", names[0])
    near = closest(stem, known)
    return f": {near}, as its class {names[0]} suggests" if near else ""
