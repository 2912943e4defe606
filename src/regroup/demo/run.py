"""`regroup demo` as one function: convert the embedded model in several ways, uptrain two, show the loss in quality."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.text import CalibrationText
from ..console import human_bytes, out
from ..conversion.convert import convert
from ..data import token_windows
from ..evaluation import Score, causal_batches, score
from ..evaluation.run import load_for_scoring
from ..inspection import inspect
from ..modeling import load_tokenizer
from ..progress import stage
from ..record import record, write_record
from . import recovery
from .corpus import held_out_text, training_text
from .figure import draw
from .recovery import WAYS, Texts, divide, points, recover

PARENT = Path(str(files("regroup.demo"))) / "parent"
# The paper's three rules, then ours from weights alone and on text.
METHODS = ("mean", "first", "random", "auto", "auto + text")
CALIBRATION_TOKENS = 32_768
KV_HEADS = (4, 2, 1)
UPTRAINED_KV_HEADS = 2
WINDOW = 256


class CachedModel:
    """A model that is called with the same batches again and again, and computes each once.

    Args:
        model: as ``score`` takes it.

    Attributes:
        config: the model's.
        outputs: of ``model(…)``, by shape and bytes of ``input_ids``.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.outputs: dict[tuple[tuple[int, ...], bytes], Any] = {}

    def parameters(self) -> Iterator[Any]:
        return self.model.parameters()

    def __call__(self, *, input_ids: Tensor, **inputs: Any) -> Any:
        key = (tuple(input_ids.shape), input_ids.numpy().tobytes())
        if key not in self.outputs:
            self.outputs[key] = self.model(input_ids=input_ids, **inputs)
        return self.outputs[key]


class Demonstration:
    """One run of the demonstration: what all its parts look at.

    Args:
        output: folder for everything that is written.
        windows: held-out windows of 256 tokens.
    """

    def __init__(self, output: Path, windows: int) -> None:
        self.output = output
        self.training = json.loads((PARENT / "training.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(PARENT)
        self.windows, self.nbytes = token_windows(
            (text for _, text in held_out_text()), tokenizer, length=WINDOW, limit=windows, bos=False
        )
        # Every model is compared with it, on the same windows.
        self.original = CachedModel(load_for_scoring(PARENT, "float32", "cpu"))
        self.texts: Texts = divide(
            output,
            training_text(),
            held_out_text(),
            lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
            CALIBRATION_TOKENS,
        )
        self.base = score(self.original, causal_batches(self.windows, 16))

    def converted(self, method: str, heads: int) -> Path:
        """The original model, converted; what an earlier run left is replaced."""
        folder = self.output / f"{method.replace(' + ', '-')}-{heads}"
        shutil.rmtree(folder, ignore_errors=True)
        on_text = method.endswith("text")
        text = CalibrationText(self.texts.calibration, tokens=CALIBRATION_TOKENS, window=WINDOW)
        convert(
            PARENT,
            folder,
            kv_heads=heads,
            method=method.removesuffix(" + text"),
            calibration=text if on_text else "none",
        )
        return folder

    def row(self, method: str, folder: Path, found: Score) -> dict[str, Any]:
        """A line of the table."""
        summary = inspect(str(folder))
        return {
            "method": method,
            "num_key_value_heads": summary.layers[0].num_key_value_heads,
            "kv_bytes_per_token": summary.kv_bytes("F16"),
            "tokens": found.tokens,
            "nats_per_token": found.nats_per_token,
            "standard_error": found.standard_error,
            "bits_per_byte": found.bits_per_byte(self.nbytes),
            "kl_nats_per_token": found.kl_nats_per_token,
            "top1_agreement": found.top1_agreement,
            "excess_nats_per_token": found.nats_per_token - self.base.nats_per_token,
        }

    def measured(self, method: str, folder: Path) -> dict[str, Any]:
        model = load_for_scoring(folder, "float32", "cpu")
        return self.row(method, folder, score(model, causal_batches(self.windows, 16), teacher=self.original))

    def convert_all(self) -> list[dict[str, Any]]:
        variants = [(method, heads) for heads in KV_HEADS for method in METHODS]
        rows = [self.row("parent", PARENT, self.base)]
        with stage("converting and evaluating", len(variants), unit="variants") as progress:
            for method, heads in variants:
                rows.append(self.measured(method, self.converted(method, heads)))
                progress(1)
        return rows

    def uptrain_both(self) -> list[dict[str, Any]]:
        """For each way its line of the table, and the curve on the way there."""
        tokens = self.training["tokens"]
        found = []
        for way in WAYS:
            model = self.output / f"{way.start.replace(' + ', '-')}-{UPTRAINED_KV_HEADS}"
            folder = self.output / ("uptrained-ours" if way.distilled else "uptrained-paper")
            run = recover(way, model, PARENT, self.texts, folder, pretraining_tokens=tokens, window=WINDOW)
            results = run["results"]
            found.append(
                self.measured(way.name, folder / "model")
                | {
                    "alpha": results["alpha"],
                    "uptraining_tokens": results["tokens"],
                    "flops": results["flops"],
                    "seconds": results["seconds"],
                    "learning_rate": way.learning_rate,
                    "curve": points(run, tokens),
                    "parent_on_the_curve": recovery.teacher_loss(run),
                }
            )
        # Both curves are on the same windows; only a run with a teacher knows the original model's loss there.
        base = next(row["parent_on_the_curve"] for row in found if row["parent_on_the_curve"] is not None)
        for row in found:
            row["parent_on_the_curve"] = base
        return found


def run_demo(output: Path, *, windows: int) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        output: folder for the converted checkpoints, ``demo.json`` and ``demo.png``; parts of an earlier run that lie
            there are replaced.
        windows: held-out windows of 256 tokens.

    Returns:
        The record that was written.
    """
    started = time.perf_counter()
    demonstration = Demonstration(output, windows)
    config, tokens = demonstration.original.config, demonstration.training["tokens"]
    parameters = sum(p.numel() for p in demonstration.original.parameters())
    out.print(
        f"The original model: a multi-head Llama of {parameters / 1e6:.1f} M parameters "
        f"with {config.num_attention_heads} heads, trained on {tokens / 1e6:.1f} M tokens of Python's standard "
        "library.",
        f"Held out: {len(demonstration.windows)} windows of {WINDOW} tokens from files it never saw.",
        "",
        f"1. Convert to {', '.join(str(g) for g in KV_HEADS)} key/value heads in {len(METHODS)} ways (a few minutes).",
        "",
        sep="\n",
    )
    rows = demonstration.convert_all()
    _table(rows)
    out.print(
        "",
        "mean, first and random are the paper's merge methods. auto shares heads by linear maps that queries and",
        f"outputs absorb, from the weights alone or on {CALIBRATION_TOKENS:,} tokens of training text, on which",
        "the attention of each layer alone was trained as well. No model as a whole was trained so far.",
        "",
        f"2. Uptrain two of them at α = {recovery.ALPHA}: {recovery.ALPHA * tokens:,.0f} tokens of other text "
        "(two minutes).",
        "",
        sep="\n",
    )
    recovered = demonstration.uptrain_both()
    _table([rows[0], *recovered])
    out.print(
        "",
        "The paper's recipe starts from mean and continues with pre-training. Ours starts from auto + text and learns",
        "the original model's logits and hidden states, which costs a forward pass of the original model more: "
        f"{recovered[1]['flops'] / recovered[0]['flops']:.2f} times the FLOPs.",
        sep="\n",
    )
    value = record(
        "demo",
        {
            "windows": len(demonstration.windows),
            "window": WINDOW,
            "dtype": "float32",
            "parent_tokens": tokens,
            "calibration_tokens": CALIBRATION_TOKENS,
        },
        {"rows": rows, "uptrained": recovered, "seconds": time.perf_counter() - started},
    )
    write_record(output / "demo.json", value)
    draw(value, output / "demo.png")
    out.print(
        "",
        f"Wrote {output / 'demo.png'}, {output / 'demo.json'} and the checkpoints next to them "
        f"({time.perf_counter() - started:.0f} s). Load one with regroup.load or AutoModelForCausalLM.",
        sep="\n",
    )
    return value


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(caption="KV/token: bytes of the KV cache for one token, in 16-bit numbers")
    for name in ("KV heads", "method", "KV/token", "nats/token", "excess", "KL", "top-1"):
        table.add_column(name, no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["num_key_value_heads"]):
            table.add_section()
        last = row["num_key_value_heads"]
        table.add_row(
            str(row["num_key_value_heads"]),
            "original" if row["method"] == "parent" else row["method"],
            human_bytes(row["kv_bytes_per_token"]),
            f"{row['nats_per_token']:.3f}",
            f"{row['excess_nats_per_token']:+.3f}" if row["method"] != "parent" else "–",
            "–" if row["kl_nats_per_token"] is None else f"{row['kl_nats_per_token']:.3f}",
            "–" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}",
        )
    out.print(table)
