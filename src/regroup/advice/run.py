"""``regroup advise`` as one function: candidates, what each takes and costs, and which to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bench.build import Model, describe, parameters_of, read_config
from ..bench.roofline import Cost
from ..bench.work import Work, check_positions, step_costs
from ..calibration.text import CalibrationText
from ..conversion.plan import check_text_options, grouped
from ..devices import USABLE, device_named, free_memory
from ..errors import RegroupError
from ..layout import detect
from ..listener import Listener
from ..opening import open_source, readable
from ..plans import Plan
from ..record import record
from .candidates import Candidate, candidates, from_config
from .choose import Choice, Prediction, choose, pareto
from .grounds import assumptions, sure_of
from .hardware import named
from .measured import Bench, Machine, beside, efficiency_of, fastest_dtype, measure
from .predict import Heads, Setting, Shape, first_token_seconds, largest_batch, memory, step_seconds
from .recovery import Recovery

THIS = "this"


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        predictions: of the parent first, then of each candidate.
        front: whether each is on the Pareto front of time and loss.
        choice: the recommendation, and why it is.
        setting: how the model is served, its dtype settled.
        rests_on: what is known of loss: ``"config"`` (nothing), ``"weights"`` (a ranking) or ``"text"``.
        sure: how sure the loss is, a line.
        plan: of it, or None where it is the parent itself.
        assumptions: what the figures rest on, a line each.
        record: everything (see ``regroup.record``).
    """

    predictions: list[Prediction]
    front: list[bool]
    choice: Choice
    setting: Setting
    rests_on: str
    sure: str
    plan: Plan | None
    assumptions: list[str]
    record: dict[str, Any]

    @property
    def chosen(self) -> Prediction:
        """The recommended candidate."""
        return self.choice.prediction


def advise(
    source: str | Path,
    *,
    context: int,
    batch: int,
    hardware: str = THIS,
    new: int = 256,
    dtype: str | None = None,
    tensor_parallel: int = 1,
    memory_bytes: int | None = None,
    max_loss: float | None = None,
    max_seconds: float | None = None,
    uptrain_tokens: int | None = None,
    calibration: CalibrationText | None = None,
    repair: str = "output",
    bench: Sequence[str | Path] = (),
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    listener: Listener | None = None,
) -> Advice:
    """Predict memory, time and loss of every number of KV heads, uniform and by layer, and choose one.

    Args:
        source: a checkpoint folder or hub id; a ``config.json`` alone gives no loss.
        context, batch, new, dtype, tensor_parallel: how the model is served (see ``predict.Setting``). Without a dtype
            it is bfloat16, and on ``"this"`` hardware the one of bfloat16 (on a GPU without it float16) and float32 in
            which the original model is faster.
        hardware: a key of ``hardware.KNOWN``, or ``"this"``: what this machine is measured to do.
        memory_bytes: that a device may fill; 90% of the hardware's by default.
        max_loss: nats per token over the original model at most, after uptraining where tokens of it are given; the
            fastest candidate within it is chosen. Without it, see ``choose``.
        max_seconds: a token at most.
        uptrain_tokens: of distillation afterwards.
        calibration, repair, device: text on which layers are converted to see what it costs (see ``plan_checkpoint``).
        bench: records of ``regroup bench decode`` on the same hardware.
        revision, allow_pickle: see ``opening.open_source``.
        listener: told about progress.

    Returns:
        What was found, with the plan of the recommended candidate.

    Raises:
        RegroupError: anything that cannot be read or predicted; nothing keeps to the limits.

    Example:
        >>> advice = regroup.advise("llama-2-7b", hardware="a100-80gb", context=4096, batch=32)  # doctest: +SKIP
        >>> advice.chosen.name, advice.plan  # doctest: +SKIP
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
    own = str(device_named(device)) if hardware == THIS else "cpu"
    dtypes = (dtype,) if dtype is not None else _dtypes(own) if hardware == THIS else ("bfloat16",)
    # Dtypes and numbers are refused before anything is downloaded.
    works = [Work(batch, context, max(2, new), name, own) for name in dtypes]
    known = None if hardware == THIS else named(hardware)
    with readable(str(source), revision=revision, allow_pickle=allow_pickle) as place:
        config, folder = read_config(place, revision=revision)
        parent = describe(config, kv_heads=None, layers=None)
        room = max(1, context - (0 if parent.is_encoder_decoder else 2))
        check_positions(parent, Work(batch, room, 2, "float32", "cpu"), asked="the context", options="--context")
        if not parent.is_encoder_decoder:
            # The step that makes the last token, for which all the context is in the cache.
            works = [replace(work, prompt=max(1, context - 1), new=2) for work in works]
        records = [Bench.load(Path(path), processor=known is None and own == "cpu") for path in bench]
        available = memory_bytes
        if available is None:
            free = known.memory if known else free_memory(own)
            if free is None:
                raise RegroupError("the system does not say how much memory is free", remedy="say it with --memory GB")
            available = int(USABLE * free)
        if folder is None:
            if calibration is not None:
                raise RegroupError(
                    "the source has no weights to measure a loss with", file=str(source), got="a config alone"
                )
            found = from_config(config, tensor_parallel)
        else:
            with open_source(place, revision=revision) as opened:
                found = candidates(opened, config, calibration, told, tensor_parallel, repair, device)
        with told.stage("building every candidate without memory", len(found), "candidates") as count:
            models = []
            for candidate in found:
                models.append(describe(candidate.config, kv_heads=None, layers=None))
                count(1)
        own_rates = None
        if known is None:
            own_rates = measure(own, models, works, [(model, b.work) for b in records for model, _ in b.models], told)
        machine = Machine(known, own_rates)
        work, why = works[0], None
        if len(works) > 1:
            work, why = fastest_dtype(machine, parent, works)
        setting = Setting(batch, context, new, work.dtype, tensor_parallel)
        efficiency = efficiency_of(records, machine, batch)
        recovery = Recovery.load()

        def estimate(model: Model) -> float:
            return step_seconds(*divided(model, work, setting.devices), machine.rates(model, work), efficiency)

        # Records are of one device.
        just = [pair for bench in records for pair in bench.of_just(parent, work)] if tensor_parallel == 1 else []
        timed = [(estimate(model), took) for model, took in just]
        predictions = []
        for candidate, model in zip(found, models, strict=True):
            seconds = beside(estimate(model), timed) if timed else estimate(model)
            predictions.append(
                _predict(candidate, model, setting, work, machine, seconds, available, recovery, uptrain_tokens)
            )
        choice = choose(predictions, batch=batch, max_loss=max_loss, max_seconds=max_seconds)
        plan = found[predictions.index(choice.prediction)].plan
        if plan is not None and folder is not None:
            if calibration is None:
                with open_source(place, revision=revision) as opened:
                    plan = grouped(opened, plan, told)
            plan.check(detect(config))
        front = pareto(predictions)
        lines = assumptions(
            machine, efficiency, records, len(timed), calibration, recovery, uptrain_tokens, parent, tensor_parallel
        )
        if why is not None:
            lines.insert(1, why)
        rests_on = "config" if folder is None else "weights" if calibration is None else "text"
        sure = sure_of(rests_on, calibration, recovery, uptrain_tokens)
        asked = {
            "model": Path(source).name if Path(source).exists() else str(source),
            "hardware": hardware,
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
            "chosen": choice.prediction.name,
            "reason": choice.reason,
            "knee_distance": choice.distance,
            "loss_rests_on": rests_on,
            "loss_is_sure": sure,
            "rates": machine.describe(),
            "efficiency": asdict(efficiency),
            "recovery": asdict(recovery),
            "assumptions": lines,
        }
        return Advice(
            predictions, front, choice, setting, rests_on, sure, plan, lines, record("advise", asked, results)
        )


def _dtypes(device: str) -> tuple[str, ...]:
    """Those that are tried where none is asked for, the one that is preferred first."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16", "float32"
    return "bfloat16", "float32"


def _predict(
    candidate: Candidate,
    model: Model,
    setting: Setting,
    work: Work,
    machine: Machine,
    seconds: float,
    available: int,
    recovery: Recovery,
    uptrain_tokens: int | None,
) -> Prediction:
    held = parameters_of(candidate.config)
    shape = Shape(held, model.attention, model.hidden, model.intermediate, model.vocabulary, model.is_encoder_decoder)
    taken = memory(shape, setting)
    weights, _ = divided(model, work, setting.devices)
    prompt = Cost(weights.nbytes, prompt_flops(model, held, setting) // setting.devices)
    first = first_token_seconds(prompt, machine.prompt_rate(model, setting.dtype), machine.bandwidth())
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
