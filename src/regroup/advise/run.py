"""``regroup advise`` as one function: candidates, what each takes and costs, and which to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.build import Model, describe, parameters_of, read_config
from ..bench.roofline import Cost
from ..bench.work import Roofs, Work, check_positions, step_costs
from ..convert.text import CalibrationText
from ..devices import USABLE, device_named, free_memory
from ..errors import RegroupError
from ..layout import detect
from ..opening import open_source
from ..plan import Plan
from ..planning import Listener, check_text_options, grouped
from ..record import record
from . import hardware
from .candidates import Candidate, candidates, from_config
from .choose import Prediction, choose, pareto
from .measured import Bench, Machine, efficiency_of
from .predict import Efficiency, Heads, Setting, Shape, first_token_seconds, largest_batch, memory, step_seconds
from .recovery import Recovery

THIS = "this"


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        predictions: of the parent first, then of each candidate.
        front: whether each is on the Pareto front of time and loss.
        chosen: the recommendation.
        plan: of it, or None where it is the parent itself.
        assumptions: what the figures rest on, a line each.
        record: everything (see ``regroup.record``).
    """

    predictions: list[Prediction]
    front: list[bool]
    chosen: Prediction
    plan: Plan | None
    assumptions: list[str]
    record: dict[str, Any]


def advise(
    source: str,
    *,
    hardware_name: str = THIS,
    context: int,
    batch: int,
    new: int = 256,
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
    memory_bytes: int | None = None,
    max_loss: float | None = None,
    max_seconds: float | None = None,
    uptrain_tokens: int | None = None,
    calibration: CalibrationText | None = None,
    repair: str = "output",
    bench: Sequence[Path] = (),
    device: str | None = None,
    revision: str | None = None,
    listener: Listener | None = None,
) -> Advice:
    """Predict memory, time and loss of every number of KV heads, uniform and by layer, and choose one.

    Args:
        source: a checkpoint folder or hub id; a ``config.json`` alone gives no loss.
        hardware_name: of ``hardware.KNOWN``, or ``"this"``: what this machine is measured to do.
        context, batch, new, dtype, tensor_parallel: how the model is served (see ``predict.Setting``).
        memory_bytes: that a device may fill; 90% of the hardware's by default.
        max_loss: nats a token over the parent at most, after uptraining where tokens of it are given.
        max_seconds: a token at most.
        uptrain_tokens: of distillation afterwards.
        calibration, repair, device: text on which layers are converted to see what it costs (see ``plan_checkpoint``).
        bench: records of ``regroup bench decode`` on the same hardware.
        revision: of a hub id.
        listener: told how it goes on.

    Raises:
        RegroupError: anything that cannot be read or predicted; nothing keeps to the limits.
    """
    told = listener or Listener()
    check_text_options(repair, device, calibration)
    if max_loss is not None and calibration is None:
        raise RegroupError(
            "a limit of loss needs text to measure it on",
            got=f"--max-loss {max_loss:g} without text",
            remedy="add --calibration FILE: weights alone rank candidates and say nothing of nats",
        )
    if uptrain_tokens is not None and calibration is None:
        raise RegroupError(
            "what is left after uptraining follows from what was lost, which needs text",
            remedy="add --calibration FILE, or leave the uptraining out",
        )
    own = str(device_named(device)) if hardware_name == THIS else "cpu"
    work = Work(batch, context, max(2, new), dtype, own)
    known = None if hardware_name == THIS else hardware.named(hardware_name)
    config, folder = read_config(source, revision=revision)
    setting = Setting(batch, context, new, dtype, tensor_parallel)
    parent = describe(config, kv_heads=None, layers=None)
    check_positions(parent, Work(batch, max(1, context - (0 if parent.is_encoder_decoder else 2)), 2, dtype, "cpu"))
    machine = Machine(known, Roofs(work) if known is None else None)
    records = [Bench.load(path, processor=known is None and own == "cpu") for path in bench]
    efficiency = efficiency_of(records, machine, batch)
    if folder is None:
        if calibration is not None:
            raise RegroupError("the source has no weights to measure a loss with", file=source, got="a config alone")
        found = from_config(config, tensor_parallel)
    else:
        with open_source(source, revision=revision) as opened:
            found = candidates(opened, config, calibration, told, tensor_parallel, repair, device)
    available = memory_bytes
    if available is None:
        available = int(USABLE * (known.memory if known else free_memory(own) or 0))
    recovery = Recovery.load()
    predictions = [
        _predict(candidate, parent, setting, work, machine, efficiency, records, available, recovery, uptrain_tokens)
        for candidate in found
    ]
    chosen = choose(predictions, batch=batch, max_loss=max_loss, max_seconds=max_seconds)
    candidate = found[predictions.index(chosen)]
    plan = candidate.plan
    if plan is not None and folder is not None:
        if calibration is None:
            with open_source(source, revision=revision) as opened:
                plan = grouped(opened, plan, told)
        plan.check(detect(config))
    front = pareto(predictions)
    lines = _assumptions(machine, efficiency, calibration, recovery, uptrain_tokens, parent, tensor_parallel)
    if folder is None:
        lines.append("a config alone says nothing of loss: of what keeps to the limits the most KV heads are taken")
    elif calibration is None:
        lines.append("loss is not known; candidates are ranked by the energy that heads lose, from weights alone")
    asked = {
        "model": Path(source).name if Path(source).exists() else source,
        "hardware": hardware_name,
        **asdict(setting),
        "memory_bytes": available,
        "max_loss": max_loss,
        "max_seconds": max_seconds,
        "uptrain_tokens": uptrain_tokens,
        "calibration": None if calibration is None else calibration.describe(),
    }
    rows = [{**asdict(one), "pareto": on} for one, on in zip(predictions, front, strict=True)]
    results = {
        "candidates": rows,
        "chosen": chosen.name,
        "rates": machine.describe(parent),
        "efficiency": asdict(efficiency),
        "recovery": asdict(recovery),
        "assumptions": lines,
    }
    return Advice(predictions, front, chosen, plan, lines, record("advise", asked, results))


def _predict(
    candidate: Candidate,
    parent: Model,
    setting: Setting,
    work: Work,
    machine: Machine,
    efficiency: Efficiency,
    records: Sequence[Bench],
    available: int,
    recovery: Recovery,
    uptrain_tokens: int | None,
) -> Prediction:
    model = describe(candidate.config, kv_heads=None, layers=None)
    held = parameters_of(candidate.config)
    shape = Shape(held, model.attention, model.hidden, model.intermediate, model.vocabulary, model.is_encoder_decoder)
    taken = memory(shape, setting)
    weights, attention = divided(model, work, setting.devices)
    seconds = next((t for bench in records if (t := bench.seconds_of(model, work)) is not None), None)
    if seconds is None:
        seconds = step_seconds(weights, attention, machine.rates(model, work), efficiency)
    prompt = Cost(weights.nbytes, prompt_flops(model, held, setting) // setting.devices)
    first = first_token_seconds(prompt, machine.prompt_rate(parent, setting.dtype), machine.bandwidth())
    loss: dict[str, float] = {}
    if candidate.kl is not None:
        whole = candidate.kl * recovery.additivity
        loss = {
            "loss": whole,
            "loss_low": whole / recovery.additivity_error,
            "loss_high": whole * recovery.additivity_error,
        }
        if uptrain_tokens is not None:
            left = whole * recovery.share(uptrain_tokens)
            error = recovery.additivity_error * recovery.error
            loss |= {"loss_after": left, "loss_after_low": left / error, "loss_after_high": left * error}
    return Prediction(
        candidate.name,
        model.kv_heads,
        {layer.name: layer.num_key_value_heads for layer in detect(candidate.config).layers},
        taken.weights,
        taken.cache,
        taken.total,
        largest_batch(shape, setting, available),
        seconds,
        first,
        energy=candidate.energy,
        **loss,
    )


def divided(model: Model, work: Work, devices: int) -> tuple[Cost, Cost]:
    """Costs of a step on one of several devices, which wait for each other."""
    part = replace(model, attention=tuple(Heads.of(layer, devices) for layer in model.attention))
    weights, attention = step_costs(part, work)
    return Cost(weights.nbytes // devices, weights.flops // devices), attention


def prompt_flops(model: Model, held: int, setting: Setting) -> int:
    """Operations up to the first token: 2 for each weight and token of the prompt, and causal attention.

    Of an encoder-decoder the encoder reads the prompt; its attention looks at all of it, and is counted with the heads
    of the decoder.
    """
    tokens = setting.batch * setting.context
    pairs = tokens * setting.context
    layers = [layer for layer in model.attention if layer.kind != "cross"]
    width = sum(layer.num_attention_heads * layer.head_dim for layer in layers)
    if model.is_encoder_decoder:
        return 2 * max(0, held - model.parameters) * tokens + 4 * pairs * width
    weights = model.weights.multiplied
    if model.weights.experts is not None:
        experts = model.weights.experts
        weights += experts.parameters * experts.chosen // experts.number
    return 2 * weights * tokens + 2 * pairs * width


def _assumptions(
    machine: Machine,
    efficiency: Efficiency,
    calibration: CalibrationText | None,
    recovery: Recovery,
    uptrain_tokens: int | None,
    parent: Model,
    tensor_parallel: int,
) -> list[str]:
    lines = [machine.source()]
    if efficiency.measured:
        lines.append(
            f"a step takes {efficiency.weights:.2f} times its floor in linear layers and {efficiency.attention:.2f} "
            "times in attention, by the bench records and their batches"
        )
    else:
        lines.append("times are floors: no engine is faster, most are slower; --bench RECORD makes them predictions")
    if tensor_parallel > 1:
        lines.append("devices share layers without loss; what they tell each other is not counted")
    if calibration is not None:
        lines.append(
            f"loss is the sum of what layers lose alone, times {recovery.additivity:.2f}: single models were off by a "
            f"factor of {recovery.additivity_error:.2f} ({recovery.source})"
        )
    if uptrain_tokens is not None:
        lines.append(
            f"of it {recovery.share(uptrain_tokens):.0%} are left after {uptrain_tokens:,} tokens of distillation, off "
            f"by a factor of {recovery.error:.2f} where a small model was left out of the fit; far beyond these "
            "models it is a guess"
        )
    if parent.is_encoder_decoder:
        lines.append("the context is the encoder's input")
    return lines
