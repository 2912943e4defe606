"""llama.cpp through llama-cpp-python: python llama_cpp_worker.py FOLDER DTYPE FLASH (0 or 1)."""

# Its packages are in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import shape
from worker import serve

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
THREADS = 2
KEPT = 2048  # tokens of the longest prompt
SEQUENCES = 8  # of the largest batch; a state can be read where there are as many as where it was written


def write(path: Path, dtype: str) -> None:
    """A GGUF file of the shape; norms stay float32, as llama.cpp's converter leaves them."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama", use_temp_file=False)
    writer.add_context_length(shape.POSITIONS)
    writer.add_embedding_length(shape.HIDDEN)
    writer.add_block_count(shape.LAYERS)
    writer.add_feed_forward_length(shape.INTERMEDIATE)
    writer.add_head_count(shape.HEADS)
    writer.add_head_count_kv(shape.KV_HEADS)
    writer.add_layer_norm_rms_eps(shape.EPSILON)
    writer.add_rope_freq_base(shape.ROPE_BASE)
    writer.add_rope_dimension_count(shape.HEAD_DIM)
    writer.add_vocab_size(shape.VOCABULARY)
    writer.add_tokenizer_model("none")
    kind = TYPES[dtype]
    for name, tensor in shape.weights():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{NAMES[rest]}"
        else:
            target = OUTER[stem]
        if tensor.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{target}.weight", tensor)
        else:
            writer.add_tensor(f"{target}.weight", gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


class LlamaCpp:
    def __init__(self, folder: Path, dtype: str, flash: bool) -> None:
        self.dtype, self.flash, self.folder = dtype, flash, folder
        path = folder / f"llama-1.1b-{dtype}.gguf"
        if not path.exists():
            write(path, dtype)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        assert self.model
        self.context: Any = None

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        # A prompt takes minutes in float32: that of one sequence is computed once and kept in a file.
        state = self.folder / f"llama-1.1b-{self.dtype}-{'flash' if self.flash else 'plain'}.state"
        if not state.exists():
            self._open(KEPT + 1)
            tokens = np.random.default_rng(0).integers(3, shape.VOCABULARY, KEPT)
            for start in range(0, KEPT, 512):
                piece = [int(token) for token in tokens[start : start + 512]]
                self._decode(piece, range(start, start + len(piece)), [0] * len(piece), [])
            assert llama_cpp.llama_state_seq_save_file(self.context, str(state).encode(), 0, None, 0)
        self._open(max(KEPT, prompt) + steps + 1)
        self.batch, self.prompt = batch, prompt
        memory = llama_cpp.llama_get_memory(self.context)
        count = ctypes.c_size_t()
        for sequence in range(batch):
            assert llama_cpp.llama_state_seq_load_file(
                self.context, str(state).encode(), sequence, (ctypes.c_int32 * 1)(), 1, ctypes.byref(count)
            )
            llama_cpp.llama_memory_seq_rm(memory, sequence, prompt, -1)
        self._steps(1)

    def _open(self, tokens: int) -> None:
        """A context with room for so many tokens of each sequence: a part of the cache for each."""
        if self.context:
            llama_cpp.llama_free(self.context)
        options = llama_cpp.llama_context_default_params()
        room = (tokens + 255) // 256 * 256
        options.n_ctx, options.n_seq_max, options.kv_unified = room * SEQUENCES, SEQUENCES, False
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = THREADS
        options.type_k = options.type_v = int(TYPES[self.dtype])
        options.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context

    def steps(self, count: int) -> list[float]:
        memory = llama_cpp.llama_get_memory(self.context)
        for sequence in range(self.batch):
            llama_cpp.llama_memory_seq_rm(memory, sequence, self.prompt, -1)
        return self._steps(count)

    def _steps(self, count: int) -> list[float]:
        tokens, seconds = [5] * self.batch, []
        for step in range(count):
            start = time.perf_counter()
            rows = list(range(self.batch))
            self._decode(tokens, [self.prompt + step] * self.batch, rows, rows)
            tokens = [
                int(
                    np.ctypeslib.as_array(
                        llama_cpp.llama_get_logits_ith(self.context, row), (shape.VOCABULARY,)
                    ).argmax()
                )
                for row in rows
            ]
            seconds.append(time.perf_counter() - start)
        return seconds

    def _decode(self, tokens: list[int], positions: Any, sequences: list[int], wanted: list[int]) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = 1 if i in wanted else 0
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0, status

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}, built with -march=native",
            "flash_attention": self.flash,
            "kv_cache": self.dtype,
            "threads": THREADS,
        }


if __name__ == "__main__":
    serve(LlamaCpp(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"))
