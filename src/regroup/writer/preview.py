"""What a conversion will write, known and checked before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.header import nbytes_of
from ..layout.kv_cache import cache_dtype, kv_cache_bytes
from ..layout.types import AttentionLayer, Layout
from ..modeling.expected import check_generation_config, check_loadable
from ..plans import OWN_TEXT_FILE, PLAN_FILE, RESULT_FILE, Plan
from ..solver.rewrite import Change
from .changes import planned_changes, solved_layers
from .converted_config import converted_config, is_stock
from .shards import Shards, Spec

# What a conversion writes about itself, older releases included: not copied from one converted model to the next.
OWN_RECORDS = (PLAN_FILE, RESULT_FILE, OWN_TEXT_FILE, "regroup_calibration.json")


@dataclass(frozen=True)
class Preview:
    """What a conversion would write, known from headers alone.

    Attributes:
        shards: file name to tensor name to (dtype, shape), in the order of the data.
        changed: every tensor that changes; each can be made from the weights where no text is used.
        bytes_before, bytes_after: of tensor data.
        kv_bytes_before, kv_bytes_after: of KV cache per token, in
        kv_dtype: the checkpoint's own, by its common name.
        stock: whether stock transformers classes load the result.
    """

    shards: Shards
    changed: dict[str, Change]
    bytes_before: int
    bytes_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    kv_dtype: str
    stock: bool

    @property
    def tensors(self) -> dict[str, Spec]:
        """Every tensor of the result by name."""
        return {name: spec for names in self.shards.values() for name, spec in names.items()}


def preview(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> Preview:
    """Check a plan against a checkpoint and say what carrying it out would write.

    Raises:
        RegroupError: the plan does not fit.
    """
    plan.check(layout)
    changed, dropped = planned_changes(checkpoint, layout, plan)
    shards = {
        file: {
            name: Spec(entry.dtype, changed[name].shape if name in changed else entry.shape)
            for name, entry in entries.items()
            if name not in dropped
        }
        for file, entries in checkpoint.shards.items()
    }
    narrowed = tuple(
        layer.with_kv_heads(p.num_key_value_heads) for layer, p in zip(layout.layers, plan.layers, strict=True)
    )
    dtype, called = cache_dtype(layout.dtype)
    return Preview(
        shards=shards,
        changed=changed,
        bytes_before=checkpoint.nbytes,
        bytes_after=sum(nbytes_of(*spec) for names in shards.values() for spec in names.values()),
        kv_bytes_before=kv_cache_bytes(layout.layers, dtype=dtype),
        kv_bytes_after=kv_cache_bytes(narrowed, dtype=dtype),
        kv_dtype=called,
        stock=is_stock(layout, plan),
    )


@dataclass(frozen=True)
class Prepared:
    """A conversion that was checked as far as it can be without writing.

    Attributes:
        checkpoint, layout, plan: what is converted, and what is asked of it.
        preview: what is written.
        config: the converted model's ``config.json``.
        companions: files that are copied, relative to the original folder.
        solved: the layers whose heads are solved before anything is written, by name.
        nbytes: of everything that will be written, about.
    """

    checkpoint: Checkpoint
    layout: Layout
    plan: Plan
    preview: Preview
    config: dict[str, Any]
    companions: tuple[Path, ...]
    solved: dict[str, AttentionLayer]
    nbytes: int

    @property
    def solved_bytes(self) -> int:
        """Bytes of the solved layers, which lie on the disk as well until the conversion is complete."""
        tensors, changed = self.preview.tensors, self.preview.changed
        return sum(nbytes_of(*spec) for name, spec in tensors.items() if self.solved and name in changed)


def prepare(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> Prepared:
    """Check everything about a conversion that can be known before the first byte is written.

    Args:
        checkpoint, layout: the original model.
        plan: what is asked of it.

    Raises:
        RegroupError: the plan does not fit, transformers would not load the result as a whole, or the original files
            cannot be copied.
    """
    ahead = preview(checkpoint, layout, plan)
    config = converted_config(checkpoint.config, layout, plan)
    # The result holds the names of the source, so that what is missing from one is missing from the other.
    check_loadable(config, ahead.tensors, checkpoint.folder)
    check_generation_config(checkpoint.folder)
    companions = tuple(path for path in checkpoint.companions() if path.as_posix() not in OWN_RECORDS)
    return Prepared(
        checkpoint=checkpoint,
        layout=layout,
        plan=plan,
        preview=ahead,
        config=config,
        companions=companions,
        solved=solved_layers(layout, plan),
        nbytes=ahead.bytes_after + sum((checkpoint.folder / path).stat().st_size for path in companions),
    )
