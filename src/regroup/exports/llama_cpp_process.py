"""Ask llama.cpp, in a process that may die: FILE.gguf ASKED.json ANSWER.npz (see ``llama_cpp.ask``)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_F32 = 0  # GGML's number for the type: a KV cache of 16 bits would be another model


def answer(file: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What ``llama_cpp.ask`` returns, as arrays; text as its bytes."""
    module = importlib.import_module("llama_cpp")
    found: dict[str, Any] = {}
    if "texts" in asked:
        model = module.Llama(file, vocab_only=True, verbose=False)
        ids = [list(model.tokenize(text.encode(), add_bos=True, special=True)) for text in asked["texts"]]
        found["lengths"] = np.array([len(one) for one in ids], dtype=np.int64)
        found["ids"] = np.array([number for one in ids for number in one], dtype=np.int64)
    if "rows" not in asked:
        return found
    model = module.Llama(
        file, n_ctx=512, logits_all=True, type_k=_F32, type_v=_F32, flash_attn=False, n_gpu_layers=0, verbose=False
    )
    rows = []
    for ids in asked["rows"]:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], dtype=np.float32))
    found["logits"] = np.stack(rows)
    if asked.get("prompt") is not None:
        prompt = model.tokenize(asked["prompt"].encode(), add_bos=True, special=False)
        model.reset()
        model.eval(prompt)
        made: list[int] = []
        while len(made) < asked["new_tokens"]:
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            if made[-1] == model.token_eos():
                break
            model.eval(made[-1:])
        kept = [number for number in made if number != model.token_eos()]
        found["prompt_ids"], found["greedy_ids"] = prompt, np.array(made, dtype=np.int64)
        found["greedy_text"] = np.frombuffer(model.detokenize(kept, prev_tokens=prompt), dtype=np.uint8)
    return found


if __name__ == "__main__":
    question = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    np.savez(sys.argv[3], **answer(sys.argv[1], question))
