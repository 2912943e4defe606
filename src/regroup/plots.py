"""Plots of the similarity of heads, as PNG files; computes nothing."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.writer import existing_parent
from .errors import RegroupError
from .extras import require
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .solver.similarity import HeadSimilarity, LayerSimilarity

# Perceptually uniform and safe for colour blindness. Darker means more similar.
_COLOURS = "viridis"
# Of two heads half of all directions can be kept, so a pair loses at most this.
_MOST = 0.5
_LABEL = "share of energy lost when two heads share one"
# Maximum number of heads for numbers in the cells.
_NUMBERED = 10


def check_folder(folder: Path) -> None:
    """Refuse a folder for plots that is a file or not writable.

    Raises:
        RegroupError: it is.
    """
    if folder.is_dir():
        nearest = folder
    elif folder.exists() or folder.is_symlink():
        raise RegroupError(
            "the folder for plots exists as a file", file=folder, remedy="choose another folder with --output"
        )
    else:
        nearest = existing_parent(folder)
    if not os.access(nearest, os.W_OK):
        raise _unwritable(nearest)


def draw_similarity(layers: Sequence[LayerSimilarity], folder: Path) -> list[Path]:
    """Draw heat maps of every layer, and an overview of all.

    Args:
        layers: see ``solver.similarity``; those without a comparison are skipped.
        folder: created if needed; files of the same names are replaced.

    Returns:
        The files, the overview last.

    Raises:
        RegroupError: the folder cannot be written to.
    """
    require("report", "matplotlib")
    check_folder(folder)
    shown = [layer for layer in layers if layer.overall is not None]
    digits = max(2, *(len(str(layer.index)) for layer in shown))
    figures = ((f"layer-{layer.index:0{digits}}-{layer.kind}.png", _layer_figure(layer)) for layer in shown)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures:
            written.append(save(figure, folder / name))
        written.append(save(_overview(shown), folder / "overview.png"))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return written


def _layer_figure(layer: LayerSimilarity) -> Figure:
    """Keys, values and their mean, side by side."""
    from matplotlib.figure import Figure

    side = min(5.2, 1.8 + 0.26 * layer.num_key_value_heads)
    figure = Figure(figsize=(3 * side + 1.4, side + 0.9), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("keys", layer.key, layer.key_obstacle),
        ("values", layer.value, layer.value_obstacle),
        ("both, the mean", layer.both, "one of the two is missing"),
    )
    for place, (title, part, reason) in zip(axes, panels, strict=True):
        place.set_title(title, fontsize=10)
        if part is None:
            _explain(place, f"not compared:\n{reason}")
        else:
            _heat_map(place, part, ticks=16, numbers=layer.num_key_value_heads <= _NUMBERED)
            place.set_xlabel("KV head", fontsize=9)
    axes[0 if layer.key else 1].set_ylabel("KV head", fontsize=9)
    figure.suptitle(layer.name, fontsize=11)
    _colour_bar(figure, list(axes))
    return figure


def _overview(layers: Sequence[LayerSimilarity]) -> Figure:
    """One small heat map per layer."""
    from matplotlib.figure import Figure

    columns = min(len(layers), max(3, math.ceil(math.sqrt(1.6 * len(layers)))))
    kinds = {layer.kind for layer in layers}
    # Self- and cross-attention of a layer are side by side.
    columns += columns % len(kinds)
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(5.0, 1.7 * columns + 1.2), max(3.4, 1.9 * rows + 0.8)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, layer in zip(axes, layers, strict=False):
        part = layer.overall
        assert part is not None
        _heat_map(place, part, ticks=4)
        of = "" if layer.both else ", keys only" if layer.key else ", values only"
        kind = f", {layer.kind}" if len(kinds) > 1 else ""
        place.set_title(f"layer {layer.index}{kind}{of}", fontsize=9, pad=3)
    for place in axes[len(layers) :]:
        place.set_axis_off()
    figure.suptitle("Keys and values together, by layer; axes are KV heads", fontsize=11)
    _colour_bar(figure, axes)
    return figure


def _heat_map(place: Any, part: HeadSimilarity, *, ticks: int, numbers: bool = False) -> None:
    """One heat map, with about this many ticks per axis."""
    table = part.pairs.numpy()
    place.imshow(table, cmap=_COLOURS, vmin=0, vmax=_MOST, interpolation="nearest")
    step = math.ceil(len(table) / ticks)
    heads = range(0, len(table), step)
    place.set_xticks(heads)
    place.set_yticks(heads)
    place.tick_params(labelsize=8 if ticks > 4 else 7, length=2)
    if numbers:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if row != column:
                    colour = "white" if value < 0.6 * _MOST else "black"
                    place.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _explain(place: Any, text: str) -> None:
    place.set_xticks([])
    place.set_yticks([])
    place.set_box_aspect(1)
    place.set_facecolor("0.94")
    for spine in place.spines.values():
        spine.set_visible(False)
    place.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, wrap=True, transform=place.transAxes)


def _colour_bar(figure: Figure, axes: list[Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # With its own scale: the first panel may be empty.
    bar = figure.colorbar(ScalarMappable(Normalize(0, _MOST), _COLOURS), ax=axes, shrink=0.9, pad=0.02)
    bar.set_label(_LABEL, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with replacing(path) as stage:
        stage.write_bytes(buffer.getvalue())
    return path


def _unwritable(folder: Path, error: OSError | None = None) -> RegroupError:
    return RegroupError(
        "the folder for plots cannot be written to",
        file=folder,
        got=None if error is None else error.strerror or str(error),
        remedy="choose another folder with --output",
    )
