"""How many sequences are computed at once, where a recipe leaves that open."""

from __future__ import annotations

import torch

from ..devices import on_cpu
from ..layout import Layout
from .recipe import Recipe

# Numbers that a transformer layer keeps for its backward pass, per token and unit of width: norms, projections,
# attention and a gated MLP of the usual width. Measured on Llama: 21.
_PER_WIDTH = 24
# On a CPU more tokens at once are hardly faster, and memory is not the run's alone.
_CPU_BYTES = 1 << 30


def fitting_rows(recipe: Recipe, layout: Layout, share: int) -> int:
    """Sequences of a process that are computed at once: as many as their activations leave room for, at least one.

    Args:
        recipe: with the window, the dtype and the device.
        layout: of the model that is trained.
        share: sequences of a process in a step.
    """
    size = 4 if recipe.dtype == "float32" else 2
    layers = len({layer.index for layer in layout.layers}) + layout.encoder_layers
    row = recipe.window * layers * layout.hidden_size * _PER_WIDTH * size
    room = _CPU_BYTES
    if not on_cpu(recipe.device) and torch.cuda.is_available():
        # Weights, gradients and moments in float32, and the teacher; a third is left to everything else.
        states = 20 * (layout.parameters or 0)
        room = max(0, (torch.cuda.mem_get_info()[0] - states) * 2 // 3)
    rows = min(share, max(1, room // row))
    # Pieces of one size, so that none is small.
    return -(-share // -(-share // rows))
