"""OpenVINO, from an export of transformers without quantisation: python openvino_worker.py FOLDER DTYPE."""

# Its packages are in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import shape
from worker import serve

THREADS = 2


def write(folder: Path) -> None:
    """A float32 model. optimum makes int8 of everything over a billion parameters unless it is told not to."""
    import tempfile

    import torch
    from optimum.intel import OVModelForCausalLM
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        checkpoint = Path(name)
        (checkpoint / "config.json").write_text(json.dumps({**shape.CONFIG, "dtype": "float32"}))
        save_file(
            {name: torch.from_numpy(tensor) for name, tensor in shape.weights()},
            checkpoint / "model.safetensors",
            metadata={"format": "pt"},
        )
        model = OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, load_in_8bit=False, compile=False, trust_remote_code=False
        )
        model.save_pretrained(folder)


class OpenVINO:
    def __init__(self, folder: Path, dtype: str) -> None:
        path = folder / "openvino-float32"
        if not (path / "openvino_model.xml").exists():
            write(path)
        core = openvino.Core()
        model = core.read_model(path / "openvino_model.xml")
        # Matrices are what a quantised export would have in fewer bits.
        kinds = {
            node.get_element_type().get_type_name()
            for node in model.get_ops()
            if node.get_type_name() == "Constant" and int(np.prod(list(node.shape))) > 1_000_000
        }
        assert kinds == {"f32"}, kinds
        precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        self.compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "KV_CACHE_PRECISION": precision,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                "INFERENCE_NUM_THREADS": str(THREADS),
                "NUM_STREAMS": "1",
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        self.constants = sorted(kinds)
        self.request = self.compiled.create_infer_request()
        self.names = [port.get_any_name() for port in self.compiled.inputs]

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        self.batch, self.prompt = batch, prompt
        self._restore()
        self._steps(1)

    def _restore(self) -> None:
        """A cache of random keys and values, which are as fast as those of a text."""
        self.request.reset_state()
        generator = np.random.default_rng(0)
        states = (self.batch, shape.KV_HEADS, self.prompt, shape.HEAD_DIM)
        filled = (generator.standard_normal(states, dtype=np.float32) * 0.1).astype(np.float32)
        for state in self.request.query_state():
            state.state = openvino.Tensor(filled)

    def steps(self, count: int) -> list[float]:
        self._restore()
        self._steps(1)
        return self._steps(count, 1)

    def _steps(self, count: int, past: int = 0) -> list[float]:
        tokens, seconds = np.full((self.batch, 1), 5, dtype=np.int64), []
        for step in range(past, past + count):
            start = time.perf_counter()
            length = self.prompt + step
            inputs = {
                "input_ids": tokens,
                "attention_mask": np.ones((self.batch, length + 1), dtype=np.int64),
                "position_ids": np.full((self.batch, 1), length, dtype=np.int64),
                "beam_idx": np.arange(self.batch, dtype=np.int32),
            }
            found = self.request.infer({name: value for name, value in inputs.items() if name in self.names})
            tokens = next(iter(found.values()))[:, -1].argmax(-1).reshape(self.batch, 1).astype(np.int64)
            seconds.append(time.perf_counter() - start)
        return seconds

    def facts(self) -> dict[str, Any]:
        wanted = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS")
        return {
            "version": f"openvino {openvino.__version__}",
            "constants": self.constants,
            **{name.lower(): str(self.compiled.get_property(name)) for name in wanted},
        }


if __name__ == "__main__":
    serve(OpenVINO(Path(sys.argv[1]), sys.argv[2]))
