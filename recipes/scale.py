"""What conversion, serving and uptraining of large models take, by arithmetic: the tables of docs/scale.md.

    python recipes/scale.py                    # writes benchmarks/records/scale-computed.json
    python recipes/doc_tables.py               # and the tables from it

No weight is read and no model is run: sizes are those of the classes of transformers on torch's meta device, caches
and least times of a step those of ``regroup.bench.roofline`` at the makers' figures of ``regroup.advice.hardware``,
and FLOPs those of ``regroup.uptraining.budget``. Seconds of a conversion are bytes at the rate that
benchmarks/conversion.py measured on another size; the record says which.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regroup.advice.hardware import named
from regroup.advice.predict import Heads, Rates, Setting, Shape, largest_batch, memory, step_floors
from regroup.bench.build import Model, describe
from regroup.bench.roofline import Cost, attention_flops, weights_cost
from regroup.layout.kv_cache import DTYPE_BYTES, kv_cache_bytes
from regroup.record import record, write_record
from regroup.uptraining.budget import plan_budget

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/records/scale-computed.json"
MEASURED = ROOT / "benchmarks/records/conversion.json"
DTYPE, WINDOW, BATCH_SIZE, ALPHA, DISTILLED = "bfloat16", 4096, 256, 0.05, 10**9
# What of a maker's figure a training run is taken to reach. An assumption, and the record says so.
UTILISATION = 0.4


@dataclass(frozen=True)
class Parent:
    """An original model, as its makers' config.json has it, and what is asked of it.

    Attributes:
        config: sizes.
        kv_heads: G of the converted model.
        devices: that share every layer.
        tokens: of its pre-training; None where its makers do not say.
    """

    name: str
    config: dict[str, Any]
    kv_heads: int
    devices: int
    tokens: int | None


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": False,
    }


PARENTS = (
    Parent("Llama 2 7B", llama(4096, 11008, 32, 32, 32), 8, 1, 2 * 10**12),
    Parent("LLaMA 65B", llama(8192, 22016, 80, 64, 64), 8, 4, 14 * 10**11),
    Parent("Llama 2 70B", llama(8192, 28672, 80, 64, 8), 4, 4, 2 * 10**12),
    Parent(
        "Mixtral 8x7B",
        llama(4096, 14336, 32, 32, 8)
        | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        4,
        2,
        None,
    ),
)


def model_of(original: Parent, kv_heads: int | None = None) -> Model:
    return describe(original.config, kv_heads=kv_heads, layers=None)


def serving(model: Model, original: Parent, *, batch: int, context: int, hardware: str) -> dict[str, Any]:
    """Memory of a device and the least seconds of a decoding step on it."""
    device = named(hardware)
    shape = Shape(model.parameters, model.attention, model.hidden, model.intermediate, model.vocabulary)
    setting = Setting(batch, context, 1, DTYPE, original.devices)
    held = memory(shape, setting)
    heads = [Heads.of(layer, original.devices) for layer in model.attention]
    whole = weights_cost(model.weights, batch=batch, dtype=DTYPE)
    weights = Cost(whole.nbytes // original.devices, whole.flops // original.devices)
    attention = Cost(
        kv_cache_bytes(heads, context=context, batch=batch, dtype=DTYPE),
        attention_flops(heads, context=context, batch=batch),
    )
    rates = Rates(device.bandwidth, device.rate(DTYPE), device.rate(DTYPE))
    return {
        "weights_bytes_a_device": held.weights,
        "cache_bytes_a_device": held.cache,
        "fits": held.total <= 0.9 * device.memory,
        "largest_batch": largest_batch(shape, setting, int(0.9 * device.memory)),
        "least_seconds_a_step": sum(step_floors(weights, attention, rates)),
    }


def training(converted: Model, original: Parent, hardware: str, *, teacher: bool, **amount: Any) -> dict[str, Any]:
    """FLOPs of uptraining, with or without a teacher, and device hours at the assumed utilisation."""
    experts = converted.weights.experts
    share = 0 if experts is None else experts.parameters * experts.chosen // experts.number
    budget = plan_budget(
        **amount,
        pretraining_tokens=original.tokens,
        batch_size=BATCH_SIZE,
        window=WINDOW,
        parameters=converted.weights.multiplied + share,
        layers=converted.layers,
        hidden=converted.hidden,
        teacher_parameters=converted.weights.multiplied + share if teacher else None,
    )
    flops = budget.student_flops + budget.teacher_flops
    return {
        "tokens": budget.tokens,
        "flops": flops,
        "device_hours": flops / (UTILISATION * named(hardware).rate(DTYPE)) / 3600,
    }


def row(original: Parent, *, batch: int, context: int, hardware: str, seconds_a_byte: float) -> dict[str, Any]:
    before, after = model_of(original), model_of(original, original.kv_heads)
    size = DTYPE_BYTES[DTYPE]
    read, written = before.parameters * size, after.parameters * size
    sizes = {"batch": batch, "context": context, "hardware": hardware}
    return {
        "model": original.name,
        "parameters": before.parameters,
        "kv_heads": [before.kv_heads, original.kv_heads],
        "bytes_read": read,
        "bytes_written": written,
        "conversion_seconds": seconds_a_byte * read,
        "cache_bytes_a_token": [kv_cache_bytes(m.attention, dtype=DTYPE) for m in (before, after)],
        "devices": original.devices,
        "serving": [serving(m, original, **sizes) for m in (before, after)],
        "uptraining": None
        if original.tokens is None
        else training(after, original, hardware, teacher=False, alpha=ALPHA),
        "distillation": training(after, original, hardware, teacher=True, tokens=DISTILLED),
    }


def main(
    batch: Annotated[int, typer.Option()] = 32,
    context: Annotated[int, typer.Option()] = 4096,
    hardware: Annotated[str, typer.Option(help="See `regroup advise --hardware`.")] = "h100",
    output: Annotated[Path, typer.Option("--output", "-o")] = RECORD,
) -> None:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["results"]
    seconds_a_byte = statistics.median(measured["seconds"]["convert"]) / measured["source_bytes"]
    rows = [
        row(original, batch=batch, context=context, hardware=hardware, seconds_a_byte=seconds_a_byte)
        for original in PARENTS
    ]
    configuration = {
        "batch": batch,
        "context": context,
        "hardware": hardware,
        "dtype": DTYPE,
        "method": "mean",
        "alpha": ALPHA,
        "assumed_utilisation": UTILISATION,
        "seconds_a_byte": seconds_a_byte,
        "seconds_a_byte_from": MEASURED.name,
    }
    write_record(output, record("recipe/scale", configuration, {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
