"""What a folder holds that is no plain checkpoint: an adapter, quantised weights, a wrapped model, another format.

It is recognised by the files next to the weights and by the names and dtypes of tensors. transformers would load some
of it as a different model, and some with random weights. The error says what it is and how to make a plain checkpoint
of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import parse_json
from .header import DTYPE_BITS, TensorEntry

ADAPTER_CONFIG = "adapter_config.json"
_MERGE = (
    "merge it first, with peft: `AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()`, then "
    "`save_pretrained` into a new folder"
)
_ORIGINAL = "start from the unquantised checkpoint"

# Parts of names that peft gives to what it adds (LoRA and its kin, IA³, LoHa, LoKr, OFT, VeRA, prompts).
_ADAPTERS = re.compile(
    r"(^|\.)(lora_[A-Z]\w*|lora_embedding_[AB]|lora_magnitude_vector|lora_A|lora_B|base_layer|ia3_l|hada_\w+|lokr_\w+"
    r"|oft_[rsR]\w*|boft_\w+|vera_\w+|fourierft_\w+|modules_to_save|original_module|prompt_embeddings)(\.|$)"
)

# What wrappers put before, or inside, the names of a model's tensors: (pattern, what it is, what undoes it).
_WRAPPERS = (
    (
        re.compile(r"(^|\.)_orig_mod\."),
        "_orig_mod.",
        "torch.compile",
        "save the model that was compiled (`model._orig_mod.save_pretrained(…)`)",
    ),
    (
        re.compile(r"(^|\.)_fsdp_wrapped_module\."),
        "_fsdp_wrapped_module.",
        "FSDP",
        "gather a full state under its own names (`get_model_state_dict` with `full_state_dict=True`)",
    ),
    (
        re.compile(r"(^|\.)_checkpoint_wrapped_module\."),
        "_checkpoint_wrapped_module.",
        "torch's activation checkpointing",
        "save the model without the wrapper",
    ),
    (
        re.compile(r"^_forward_module\."),
        "_forward_module.",
        "Lightning or DeepSpeed",
        "export the model from the trainer's checkpoint",
    ),
    (
        re.compile(r"^module\."),
        "module.",
        "DistributedDataParallel, FSDP or DeepSpeed",
        "save the model inside (`model.module.save_pretrained(…)`)",
    ),
    (
        re.compile(r"^base_model\.model\."),
        "base_model.model.",
        "peft",
        "unload it (`merge_and_unload()`), then `save_pretrained`",
    ),
    (
        re.compile(r"^(model\.)?language_model\."),
        "language_model.",
        "a model of text and images or sound, whose text model this is",
        "save the text model alone: its tensors without the prefix (`model.language_model.` becomes `model.`) and none "
        "of the others, with its `text_config` as config.json",
    ),
)

# Names of tensors that quantised checkpoints have with, or instead of, a weight: (pattern, method).
_QUANTISERS = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\."), "bitsandbytes"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 in blocks"),
    (re.compile(r"\.(weight_packed|weight_zero_point|weight_g_idx|weight_global_scale)$"), "compressed-tensors"),
    (re.compile(r"\.(weight_scale|weight_scale_2|input_scale|act_scale|input_global_scale|output_scale)$"), "scales"),
    (re.compile(r"\.(W_q|codebooks|codes|Qidxs|SU|SV)$|\.(weight|[a-z_]+_proj)_(blocks|scales)$"), "codes"),
    (re.compile(r"\.(scales|biases)$"), "scales"),
)
_KV_SCALES = re.compile(r"\.(k_scale|v_scale|q_scale|kv_scale|prob_scale|k_zero_point|v_zero_point)$")
# A matrix in one of these is no matrix of numbers; buffers such as masks and positions are integers too.
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
_QUANTISED_FILES = {
    "quantize_config.json": "GPTQ (AutoGPTQ's quantize_config.json)",
    "quant_config.json": "AWQ (quant_config.json)",
    "hf_quant_config.json": "NVIDIA ModelOpt (hf_quant_config.json)",
}

# Weights that other programs write: (pattern of the file, what it is, what makes a checkpoint of it).
_FOREIGN = (
    ("zero_to_fp32.py", "a training state of DeepSpeed", "run `python zero_to_fp32.py . out` in it"),
    ("**/mp_rank_*", "a training state of DeepSpeed or Megatron", "export it with the trainer's own tool"),
    ("**/*.distcp", "a distributed checkpoint of PyTorch", "join it with torch.distributed.checkpoint.format_utils"),
    ("consolidated*.safetensors", "weights in Mistral's own names", "look for the Hugging Face form of the model"),
    ("consolidated*.pth", "weights in Meta's own names", "look for the Hugging Face form of the model"),
    ("*.gguf", "weights in GGUF, llama.cpp's format", "make a folder of it: regroup export FILE FOLDER --to hf"),
    ("tf_model*.h5", "weights of TensorFlow", "look for a safetensors revision"),
    ("flax_model*.msgpack", "weights of Flax", "look for a safetensors revision"),
    ("model*.onnx", "an ONNX graph", "look for a safetensors revision"),
)


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter in it, alone or next to full weights.

    With peft installed, transformers loads full weights together with the adapter next to them: the weights alone are
    another model, and the adapter does not fit heads that were merged.

    Raises:
        RegroupError: there is an ``adapter_config.json``.
    """
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        return
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = {}
    found = found if isinstance(found, dict) else {}
    kind, base = found.get("peft_type", "of unknown kind"), found.get("base_model_name_or_path")
    full = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    raise RegroupError(
        "the folder holds an adapter next to the weights" if full else "this is an adapter, not a model",
        file=file,
        expected="a checkpoint without an adapter",
        got=f"an adapter ({kind})" + (f" for {base}" if base else ""),
        remedy=f"{_MERGE}; or remove {ADAPTER_CONFIG} to leave the adapter out, which is another model wherever peft "
        "is installed"
        if full
        else _MERGE,
    )


def refuse_other_forms(folder: Path | None, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse weights that are quantised, wrapped or unmerged.

    Args:
        folder: of the weights, for the other files in it; None for a hub repository of which only headers are known.
        config: the parsed config.json.
        tensors: name to dtype and shape.

    Raises:
        RegroupError: what it is, how it was recognised, and what to do.
    """
    _refuse_unmerged(folder, tensors)
    _refuse_quantised(folder, config, tensors)
    if not isinstance(config.get("text_config"), dict):  # whose own refusal says more
        _refuse_wrapped(folder, tensors)


def foreign_weights(folder: Path) -> RegroupError | None:
    """What a folder without a checkpoint's weights holds instead, as a refusal; None if that is not known."""
    for pattern, what, remedy in _FOREIGN:
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return RegroupError(
                f"the folder holds {what}, not a checkpoint",
                file=found,
                expected="model.safetensors or model.safetensors.index.json",
                remedy=remedy,
            )
    return None


def _refuse_unmerged(folder: Path | None, tensors: Mapping[str, TensorEntry]) -> None:
    found = _first(tensors, _ADAPTERS)
    if found is not None:
        raise RegroupError(
            "the weights hold an adapter that was not merged",
            file=folder,
            tensor=found,
            expected="the plain weights of a model",
            got="peft's parameters (such as base_layer, lora_A and lora_B)",
            remedy="merge it first: load it with peft as it was trained, call `merge_and_unload()`, then "
            "`save_pretrained` into a new folder",
        )


def _refuse_quantised(folder: Path | None, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    scales = _first(tensors, _KV_SCALES)
    kinds = [(kind, name) for pattern, kind in _QUANTISERS if (name := _first(tensors, pattern)) is not None]
    coded = next((name for name, entry in tensors.items() if _is_coded(name, entry)), None)
    named = _method(config) or next(
        (what for name, what in _QUANTISED_FILES.items() if folder is not None and (folder / name).exists()), None
    )
    if named is None and coded is None and not kinds:
        if scales is not None:
            raise RegroupError(
                "the weights hold scales of a quantised KV cache",
                file=folder,
                tensor=scales,
                expected="the plain weights of a model",
                got="scales that fit the present KV heads alone",
                remedy="start from the checkpoint that they were measured on, or save this one without them, and "
                "measure them again on the converted model",
            )
        return
    tensor = coded or (kinds[0][1] if kinds else None)
    what = named or (kinds[0][0] if kinds else None)
    dtype = tensors[coded].dtype if coded is not None else None
    got = ", ".join(x for x in (what, f"a weight stored as {dtype}" if dtype else None) if x)
    raise RegroupError(
        "the weights are quantised",
        file=folder,
        tensor=tensor,
        expected="weights in F16, BF16, F32 or F64, and nothing that says otherwise",
        got=got,
        remedy=_ORIGINAL
        if tensor is not None
        else f"{_ORIGINAL}; or, where these are plain weights after all, remove what says that they are quantised",
    )


def _refuse_wrapped(folder: Path | None, tensors: Mapping[str, TensorEntry]) -> None:
    for pattern, prefix, what, remedy in _WRAPPERS:
        found = _first(tensors, pattern)
        if found is not None:
            raise RegroupError(
                f"the names of the weights carry a prefix of {what}",
                file=folder,
                tensor=found,
                expected=f"names without {prefix}",
                remedy=f"{remedy}; or rename the tensors: read each file with safetensors.torch.load_file, take "
                f"{prefix!r} out of the names, and write it with save_file (metadata={{'format': 'pt'}})",
            )


def _method(config: Mapping[str, Any]) -> str | None:
    for key in ("quantization_config", "compression_config", "quantization"):
        value = config.get(key)
        if value:
            method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, dict) else None
            name = {"quantization": "MLX"}.get(key) if method is None else str(method)
            return f"{name} ({key} in config.json)" if name else f"{key} in config.json"
    return None


def _is_coded(name: str, entry: TensorEntry) -> bool:
    if entry.dtype.startswith("F") and DTYPE_BITS[entry.dtype] <= 8:
        return True
    return entry.dtype in _CODES and len(entry.shape) >= 2 and name.endswith("weight")


def _first(names: Iterable[str], pattern: re.Pattern[str]) -> str | None:
    return next((name for name in names if pattern.search(name)), None)
