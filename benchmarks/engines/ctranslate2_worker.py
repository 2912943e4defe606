"""CTranslate2: python ctranslate2_worker.py FOLDER DTYPE."""

# Its packages are in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import shape
from ctranslate2.specs import common_spec, transformer_spec
from worker import serve

THREADS = 2


def write(folder: Path) -> None:
    """A model of the shape, float32."""
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.LAYERS,
        shape.HEADS,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_scaling_type=None,
        rotary_base=shape.ROPE_BASE,
        num_heads_kv=shape.KV_HEADS,
    )
    tensors = dict(shape.weights())
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["model.embed_tokens.weight"]
    decoder.projection.weight = tensors["lm_head.weight"]
    decoder.layer_norm.gamma = tensors["model.norm.weight"]
    for number, layer in enumerate(decoder.layer):

        def at(name: str, number: int = number) -> np.ndarray:
            return tensors.pop(f"model.layers.{number}.{name}.weight")

        layer.self_attention.layer_norm.gamma = at("input_layernorm")
        layer.ffn.layer_norm.gamma = at("post_attention_layernorm")
        layer.self_attention.linear[0].weight = np.concatenate([at(f"self_attn.{x}_proj") for x in "qkv"])
        layer.self_attention.linear[1].weight = at("self_attn.o_proj")
        layer.ffn.linear_0.weight = at("mlp.gate_proj")
        layer.ffn.linear_0_noact.weight = at("mlp.up_proj")
        layer.ffn.linear_1.weight = at("mlp.down_proj")
    spec.register_vocabulary([f"t{i}" for i in range(shape.VOCABULARY)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t1", "t2", "t0"
    spec.config.layer_norm_epsilon = shape.EPSILON
    spec.validate()
    folder.mkdir(parents=True)
    spec.save(str(folder))


class CTranslate2:
    def __init__(self, folder: Path, dtype: str) -> None:
        path = folder / "ctranslate2-float32"
        if not path.exists():
            write(path)
        kinds = ctranslate2.get_supported_compute_types("cpu")
        if dtype not in kinds:
            raise SystemExit(
                f"CTranslate2 {ctranslate2.__version__} computes in {sorted(kinds)} on this CPU, not {dtype}"
            )
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=THREADS
        )

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        tokens = np.random.default_rng(0).integers(3, shape.VOCABULARY, prompt)
        self.static, self.batch = [f"t{t}" for t in tokens], batch
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        stamps: dict[int, float] = {}

        def note(result: Any) -> bool:
            stamps.setdefault(result.step, time.perf_counter())
            return False

        self.generator.generate_batch(
            [["t5"]] * self.batch,
            static_prompt=self.static,
            cache_static_prompt=True,
            max_length=count + 1,
            min_length=count + 1,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=note,
        )
        times = [stamps[step] for step in sorted(stamps)]
        assert len(times) == count + 1, (len(times), count)
        return [after - before for before, after in itertools.pairwise(times)]

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"ctranslate2 {ctranslate2.__version__}",
            "compute_type": self.generator.compute_type,
            "threads": THREADS,
        }


if __name__ == "__main__":
    serve(CTranslate2(Path(sys.argv[1]), sys.argv[2]))
