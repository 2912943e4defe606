"""What each part of a conversion is worth before any training: the ablations of docs/methods.md.

    python recipes/conversion_methods.py PARENT CALIBRATION HELD_OUT --kv-heads 2,1 -o record.json

The original model is converted to each G in each way and evaluated on held-out text that calibration never sees. Both
texts are JSON lines with a document in "text". Without arguments beyond these it is as deterministic as the machine's
sums.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

import regroup
from regroup.calibration.moments import MomentSums
from regroup.conversion.plan import plan as plan_checkpoint
from regroup.data import read_texts, token_windows
from regroup.errors import human_kv_heads
from regroup.evaluation import causal_batches, score
from regroup.evaluation.run import load_for_scoring
from regroup.layout import Layout
from regroup.modeling import load_tokenizer
from regroup.opening import open_layout
from regroup.plans import CalibrationText, make_plan
from regroup.record import record, write_record
from regroup.solver.statistics import Moments

Altered = Callable[[MomentSums, Moments], Moments]


@dataclass(frozen=True)
class Variant:
    """One way to convert.

    Attributes:
        name: for the table.
        keys, values: rules, or None for ``auto``.
        text: whether calibration text is used.
        repair, grouping: as in ``convert``.
        altered: changes the moments that the rules see.
        budget: G by layer, in as much cache as G in every layer takes.
        needs_groups: with one group it is the same as another variant: nothing to search, nothing to divide.
    """

    name: str
    keys: str | None = None
    values: str | None = None
    text: bool = True
    repair: str = "none"
    grouping: str = "contiguous"
    altered: Altered | None = None
    budget: bool = False
    needs_groups: bool = False


def plain_values(_: MomentSums, moments: Moments) -> Moments:
    """Values measured over all tokens alike, not as each head's attention mixes them."""
    return replace(moments, attended=None)


def unweighted_keys(_: MomentSums, moments: Moments) -> Moments:
    """Keys whose directions all count alike, whatever the queries ask for."""
    return replace(moments, query=torch.eye(moments.query.shape[-1]).expand_as(moments.query))


def centred_keys(gatherer: MomentSums, moments: Moments) -> Moments:
    """Keys measured around their mean: right where nothing rotates them, wrong under RoPE."""
    mean = gatherer.__dict__["key_sum"] / gatherer.__dict__["key_rows"]
    centred = []
    for (_, distinct, _), own in zip(gatherer._groups, moments.key, strict=True):
        part = mean[distinct].flatten()
        centred.append(own - torch.outer(part, part))
    return replace(moments, key=centred)


@contextmanager
def moments_altered(altered: Altered | None) -> Iterator[None]:
    """Have every moment that is gathered on text changed before the rules see it."""
    if altered is None:
        yield
        return
    add, moments = MomentSums.add, MomentSums.moments

    def adding(self: MomentSums, seen: Any, *masks: Any) -> None:
        keys = torch.einsum("bte,hde->hd", seen.memory.double(), self.weights.key.double())
        self.__dict__["key_sum"] = self.__dict__.get("key_sum", 0) + keys
        self.__dict__["key_rows"] = self.__dict__.get("key_rows", 0) + seen.memory.shape[0] * seen.memory.shape[1]
        add(self, seen, *masks)

    with (
        mock.patch.object(MomentSums, "add", adding),
        mock.patch.object(MomentSums, "moments", lambda self: altered(self, moments(self))),
    ):
        yield


VARIANTS = (
    Variant("mean (the paper's)", "mean", "mean", text=False),
    Variant("first", "first", "first", text=False),
    Variant("mean, searched", "mean", "mean", text=False, grouping="search", needs_groups=True),
    Variant("weights: procrustes", "procrustes", "procrustes", text=False),
    Variant("weights: lowrank", "lowrank", "lowrank", text=False),
    Variant("weights: keys procrustes, values lowrank", "procrustes", "lowrank", text=False),
    Variant("weights: keys lowrank, values procrustes", "lowrank", "procrustes", text=False),
    Variant("weights: the same, searched (auto)", text=False, grouping="search", needs_groups=True),
    Variant("text: procrustes", "procrustes", "procrustes"),
    Variant("text: lowrank", "lowrank", "lowrank"),
    Variant("text: lowrank, keys centred", "lowrank", "lowrank", altered=centred_keys),
    Variant("text: lowrank, keys not weighted by queries", "lowrank", "lowrank", altered=unweighted_keys),
    Variant("text: lowrank, values not as attended", "lowrank", "lowrank", altered=plain_values),
    Variant("text: procrustes, output", "procrustes", "procrustes", repair="output"),
    Variant("text: lowrank, output", "lowrank", "lowrank", repair="output"),
    Variant("text: auto, output", repair="output"),
    Variant(
        "text: procrustes, output, searched",
        "procrustes",
        "procrustes",
        repair="output",
        grouping="search",
        needs_groups=True,
    ),
    Variant(
        "text: lowrank, output, searched", "lowrank", "lowrank", repair="output", grouping="search", needs_groups=True
    ),
    Variant("text: auto, output, searched", repair="output", grouping="search", needs_groups=True),
    Variant(
        "text: auto, output, searched, G by layer", repair="output", grouping="search", budget=True, needs_groups=True
    ),
    Variant("text: auto, distill, searched", repair="distill", grouping="search"),
)


def main(
    original: str,
    calibration: Path,
    held_out: Path,
    kv_heads: Annotated[str, typer.Option("--kv-heads")] = "2,1",
    window: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option()] = 64,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_768,
    document_starts: Annotated[bool, typer.Option("--document-starts")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    folder = Path(original)
    layout = open_layout(original)
    cut, _ = token_windows(
        read_texts(held_out), load_tokenizer(folder), length=window, limit=windows, document_starts=document_starts
    )
    teacher = load_for_scoring(folder, "float32", "cpu")
    base = score(teacher, causal_batches(cut, 16))
    rows: list[dict[str, Any]] = []
    for heads in map(int, kv_heads.split(",")):
        for variant in VARIANTS:
            if heads == 1 and variant.needs_groups:
                continue
            started = time.perf_counter()
            text = CalibrationText(calibration, tokens, window, None, document_starts) if variant.text else None
            with tempfile.TemporaryDirectory() as scratch:
                converted = Path(scratch) / "child"
                with moments_altered(variant.altered):
                    predicted = convert(original, converted, layout, heads, variant, text)
                seconds = time.perf_counter() - started
                result = score(load_for_scoring(converted, "float32", "cpu"), causal_batches(cut, 16), teacher=teacher)
            rows.append(
                {
                    "method": variant.name,
                    "num_key_value_heads": heads,
                    "excess_nats_per_token": result.nats_per_token - base.nats_per_token,
                    "kl_nats_per_token": result.kl_nats_per_token,
                    "predicted_kl_nats_per_token": predicted,
                    "standard_error": result.standard_error,
                    "calibration_tokens": tokens if text else 0,
                    "seconds": seconds,
                }
            )
            excess = rows[-1]["excess_nats_per_token"]
            Console(stderr=True).print(f"G={heads} {variant.name}: {excess:+.3f} ({seconds:.0f} s)")
    configuration = {
        "parent": folder.name,
        "calibration": calibration.name,
        "held_out": held_out.name,
        "window": window,
        "windows": len(cut),
        "document_starts": document_starts,
    }
    value = record("conversion-methods", configuration, {"parent_nats_per_token": base.nats_per_token, "rows": rows})
    write_record(output, value)
    show(value)


def convert(
    original: str, converted: Path, layout: Layout, heads: int, variant: Variant, text: CalibrationText | None
) -> float | None:
    """Convert in one way; the KL divergence that a budgeted plan predicts."""
    if variant.budget:
        share = heads / layout.layers[0].num_key_value_heads
        plan, _ = plan_checkpoint(original, kv_budget=f"{share:%}", grouping=variant.grouping, calibration=text)
        regroup.convert(original, converted, plan=plan, calibration=text, repair=variant.repair)
        return plan.predicted_kl
    if variant.keys is None or variant.values is None:
        regroup.convert(
            original,
            converted,
            kv_heads=heads,
            grouping=variant.grouping,
            calibration=text or "none",
            repair=variant.repair,
        )
    elif variant.keys == variant.values:
        regroup.convert(
            original,
            converted,
            kv_heads=heads,
            method=variant.keys,
            grouping=variant.grouping,
            calibration=text,
            repair=variant.repair,
        )
    else:
        plan = make_plan(layout, heads)
        layers = tuple(replace(x, key_method=variant.keys, value_method=variant.values) for x in plan.layers)
        regroup.convert(original, converted, plan=replace(plan, layers=layers), calibration=text, repair=variant.repair)
    return None


def show(value: dict[str, Any]) -> None:
    rows = value["results"]["rows"]
    groups = list(dict.fromkeys(row["num_key_value_heads"] for row in rows))
    table = Table("excess nats per token", *(human_kv_heads(heads) for heads in groups))
    for name in dict.fromkeys(row["method"] for row in rows):
        found = {row["num_key_value_heads"]: row["excess_nats_per_token"] for row in rows if row["method"] == name}
        table.add_row(name, *(f"{found[heads]:+.3f}" if heads in found else "–" for heads in groups))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    typer.run(main)
