"""transformers' generate, as it is by default or with regroup: python transformers_worker.py DTYPE PATH."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import shape
import torch
import transformers
from worker import serve

from regroup.attention.cache import KVCache
from regroup.bench.build import build, describe
from regroup.bench.decode import prepare


class Clock(transformers.generation.streamers.BaseStreamer):
    """When each token was there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    def __init__(self, dtype: str, path: str) -> None:
        self.path = path
        self.model = build(describe(shape.CONFIG, kv_heads=None, layers=None), dtype, torch.device("cpu"))
        self.prepared = (
            prepare(self.model) if path == "regroup" else {"attention": self.model.config._attn_implementation}
        )
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        self.cache: Any = None
        if self.path == "regroup":
            self.cache = KVCache.for_model(self.model, max_length=prompt + steps + 2)
        else:
            self.cache = transformers.DynamicCache(config=self.model.config)
        self.batch, self.prompt = batch, prompt
        states = torch.empty(batch, shape.KV_HEADS, prompt, shape.HEAD_DIM).normal_(0, 0.1).to(self.model.dtype)
        for layer in range(shape.LAYERS):
            self.cache.update(states, states, layer)
        self.ids = torch.randint(3, shape.VOCABULARY, (batch, prompt + 1))
        self.steps(1)

    def steps(self, count: int) -> list[float]:
        surplus = self.cache.get_seq_length() - self.prompt
        if surplus:
            self.cache.crop(-surplus)
        clock = Clock()
        # The first token pays for what generate sets up.
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=count + 1,
            streamer=clock,
        )
        return [after - before for before, after in itertools.pairwise(clock.stamps[1:])]

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "cache": "regroup.KVCache" if self.path == "regroup" else "DynamicCache",
            "threads": torch.get_num_threads(),
            **self.prepared,
        }


if __name__ == "__main__":
    serve(Transformers(sys.argv[1], sys.argv[2]))
