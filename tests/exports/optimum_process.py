"""Ask a model that optimum exported: onnx|openvino FOLDER IDS.json ANSWER.npz, in an environment that has optimum.

It needs transformers 4, so it shares no environment, and no code, with regroup.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES = {
    "onnx": ("optimum.onnxruntime", "ORTModelForCausalLM", {}, ("optimum-onnx", "onnxruntime")),
    "openvino": (
        "optimum.intel",
        "OVModelForCausalLM",
        # Its default is the fastest precision of the processor, and a cache in 8 bits.
        {"ov_config": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}, "load_in_8bit": False},
        ("optimum-intel", "openvino"),
    ),
}


def answer(kind: str, folder: str, ids: list[int]) -> dict[str, Any]:
    """Logits (1, positions, vocabulary), the ids of a greedy continuation of 24 tokens, and versions."""
    import torch

    module, name, options, packages = _CLASSES[kind]
    model = getattr(importlib.import_module(module), name).from_pretrained(folder, export=True, **options)
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False)
    positions = torch.arange(len(ids))[None]
    logits = model(input_ids=prompt, attention_mask=mask, position_ids=positions).logits
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in (*packages, "transformers"))
    return {"logits": np.asarray(logits, dtype=np.float32), "greedy": made[0, len(ids) :].numpy(), "versions": versions}


if __name__ == "__main__":
    _, kind, folder, asked, out = sys.argv
    np.savez(out, **answer(kind, folder, json.loads(Path(asked).read_text(encoding="utf-8"))))
