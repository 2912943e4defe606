"""What a run keeps in memory: sequences computed at once, activations, and weights that lie in a file anyway."""

from __future__ import annotations

import ctypes
import mmap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..devices import on_cpu
from ..layout import Layout
from .recipe import Recipe

# Numbers that a transformer layer keeps for its backward pass, per token and unit of width: norms, projections,
# attention and a gated MLP of the usual width. Measured on Llama: 21.
_PER_WIDTH = 24
# On a CPU more tokens at once are hardly faster, and memory is not the run's alone.
_CPU_BYTES = 1 << 30
# Activations of a sequence from which on it pays to compute some of them twice, and weights worth letting go.
_LARGE = 1 << 28
_ATEN = torch.ops.aten
_KEPT = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
_MADV_DONTNEED = 4


def fitting_rows(recipe: Recipe, layout: Layout, share: int) -> int:
    """Sequences of a process that are computed at once: as many as their activations leave room for, at least one.

    Args:
        recipe: with the window, the dtype and the device.
        layout: of the model that is trained.
        share: sequences of a process in a step.
    """
    row = row_bytes(recipe, layout)
    room = _CPU_BYTES
    if not on_cpu(recipe.device) and torch.cuda.is_available():
        # Weights, gradients and moments in float32, and the teacher; a third is left to everything else.
        states = 20 * (layout.parameters or 0)
        room = max(0, (torch.cuda.mem_get_info()[0] - states) * 2 // 3)
    rows = min(share, max(1, room // row))
    # Pieces of one size, so that none is small.
    return -(-share // -(-share // rows))


def row_bytes(recipe: Recipe, layout: Layout) -> int:
    """Bytes of activations that a sequence leaves for the backward pass, about."""
    layers = len({layer.index for layer in layout.layers}) + layout.encoder_layers
    return recipe.window * layers * layout.hidden_size * _PER_WIDTH * (4 if recipe.dtype == "float32" else 2)


def keep_products_alone(model: Any, recipe: Recipe, layout: Layout) -> bool:
    """On a CPU, have the layers of a large model keep the results of matrix products for the backward pass.

    Norms, activation functions and rotations take half of the memory and little time, and are computed again. The
    gradients are the same, bit for bit.

    Returns:
        Whether that was done.
    """
    large = on_cpu(recipe.device) and row_bytes(recipe, layout) >= _LARGE
    if not large or recipe.gradient_checkpointing or recipe.compile or not model.supports_gradient_checkpointing:
        return False
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    # Newer versions of transformers warn of the older name, and earlier ones know no other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})
    return True


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def mapped_ranges(model: Any) -> list[tuple[int, int]]:
    """Where in memory (first and last address) weights of a model lie that are mapped from a checkpoint's file.

    Linux alone; nothing elsewhere.
    """
    maps = Path("/proc/self/maps")
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    if not maps.is_file():
        return []
    found = []
    for line in maps.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(".safetensors"):
            first, last = (int(end, 16) for end in fields[0].split("-"))
            if any(first <= place < last for place in places):
                found.append((first, last))
    return found


def let_go(ranges: list[tuple[int, int]]) -> None:
    """Take mapped weights that are never written out of this process's memory; using them reads them again.

    They stay in the system's cache of files as long as it has room.

    Args:
        ranges: see ``mapped_ranges``, of a model that nothing was written to.
    """
    if sum(last - first for first, last in ranges) < _LARGE // 4:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for first, last in ranges:
        assert first % mmap.PAGESIZE == 0
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
