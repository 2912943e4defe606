"""A sampler for a checkpoint: the model loaded in the dtype and with the layers that decode fastest here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..attention.prepare import prepare_for_inference
from ..checkpoint import open_checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..devices import device_named, free_memory
from ..errors import RegroupError
from ..modeling import load, load_tokenizer
from ..modeling.lm_head import require_head
from .sampler import Sampler
from .vocabulary import Vocabulary

# Windows of one batch: enough for products that are not bound by reading weights.
BATCH = 32
# Below this, calls cost more than products, and bfloat16 gains nothing.
_SMALL = 64 << 20


def open_sampler(
    folder: str | Path,
    *,
    seed: int,
    stream: str,
    start: str = "bos",
    temperature: float = 1.0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    check: bool = True,
) -> Sampler:
    """A sampler for a checkpoint folder.

    Args:
        folder: the checkpoint. Its tokenizer says which tokens there are; without one its config has to do.
        seed, stream, start, temperature, check: see ``Sampler``.
        device: by default a GPU where there is one.
        dtype: by default see ``sampling_dtype``.
        batch: texts that are sampled together; by default ``BATCH``, or as many as fit into half the free memory.

    Raises:
        RegroupError: the checkpoint cannot be loaded, has no output head, or listens.
    """
    folder, place = Path(folder), device_named(device)
    require_head(folder)
    wanted = dtype or sampling_dtype(folder, place)
    try:
        model: Any = load(folder, dtype=wanted, attn_implementation="regroup", progress=False)
    except RegroupError:
        # Families without a choice of attention; whatever else is wrong is said by the second attempt.
        model = load(folder, dtype=wanted, progress=False)
    if model.main_input_name != "input_ids":
        raise RegroupError("models that listen or look do not write from nothing", file=folder)
    model = model.to(place).eval().requires_grad_(False)
    size = model.get_output_embeddings().weight.shape[0]
    if place == "cpu":
        with contextlib.suppress(RegroupError):  # it only makes things faster
            prepare_for_inference(model)
    tokenizer = None
    with contextlib.suppress(RegroupError):
        tokenizer = load_tokenizer(folder)
    vocabulary = Vocabulary.of_folder(folder, size, tokenizer)
    return Sampler(
        model,
        vocabulary,
        seed=seed,
        stream=stream,
        start=start,
        temperature=temperature,
        batch=batch or _batch(model, place),
        check=check,
    )


def sampling_dtype(folder: Path, device: str) -> torch.dtype:
    """The dtype to sample in: bfloat16 on a CPU that multiplies it faster, otherwise the checkpoint's.

    Text does not have to be the same to the last bit of a probability: large models are sampled in bfloat16 on such a
    CPU even if they are stored in float32. On CPUs without such products float16 and bfloat16 are widened.
    """
    checkpoint = open_checkpoint(folder)
    stored = {TORCH_DTYPES[info.dtype] for info in checkpoint.tensors.values() if info.dtype in TORCH_DTYPES}
    kind = next((d for d in (torch.float32, torch.bfloat16, torch.float16) if d in stored), torch.float32)
    if device != "cpu":
        return kind
    fast = any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return torch.bfloat16 if fast and checkpoint.nbytes > _SMALL else torch.float32


def _batch(model: Any, device: str) -> int:
    """Texts of 512 tokens whose keys, values and logits fit into half of the free memory; at most ``BATCH``."""
    free = free_memory(device)
    if free is None:
        return BATCH
    config = model.config.get_text_config(decoder=True)
    layers, width = config.num_hidden_layers, config.hidden_size
    # As if every head had keys and values of its own; logits are there in float32 and as sums in float64.
    each = 2 * layers * width * model.dtype.itemsize * 512 + 24 * config.vocab_size
    return max(1, min(BATCH, free // 2 // each))
