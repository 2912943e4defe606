"""``regroup advise`` as a function: the candidates, their predictions, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bench.build import Model, describe, parameters_of, read_config
from ..bench.roofline import Cost
from ..bench.work import Work, check_positions, step_costs
from ..conversion.request import calibration_of, check_asked, grouped
from ..devices import USABLE, device_named, free_memory
from ..errors import RegroupError
from ..layout import detect
from ..listener import Listener
from ..opening import open_source, readable
from ..plans import CalibrationText, Plan
from ..processes import SINGLE_PROCESS
from ..record import record
from .assumptions import assumptions, loss_basis
from .candidates import Candidate, candidates, from_config
from .choose import Choice, Prediction, choose, pareto
from .hardware import named
from .measured import Bench, Machine, efficiency_of, fastest_dtype, interpolated, measure
from .predict import Heads, Setting, Shape, first_token_seconds, largest_batch, memory, step_seconds
from .recovery import Recovery

THIS = "this"


@dataclass(frozen=True)
class Advice:
    """The predictions and the recommendation.

    Attributes:
        predictions: of the original model, then of each candidate.
        front: whether each is on the Pareto front of time and loss.
        choice: the recommendation, and its reason.
        setting: how the model is served, with the chosen dtype.
        rests_on: the basis of the loss: ``"config"`` (none), ``"weights"`` (a ranking) or ``"text"``.
        sure: the certainty of the loss, one line.
        plan: of the recommendation, or None for the original model.
        assumptions: of the predictions, one line each.
        record: all results (see ``regroup.record``).
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
    calibration: CalibrationText | str | Path | None = None,
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
        hardware: a key of ``hardware.KNOWN``, or ``"this"``: this machine is measured.
        context, batch, new, dtype, tensor_parallel: how the model is served (see ``predict.Setting``). The default
            dtype is bfloat16; on ``"this"`` hardware it is bfloat16 (float16 on a GPU without bfloat16) or float32,
            whichever is faster for the original model.
        memory_bytes: memory limit of a device; 90% of the hardware's memory by default.
        max_loss: limit of the loss above the original model in nats per token, after uptraining, if any; the
            fastest candidate within it is chosen. Without a limit, see ``choose``.
        max_seconds: limit of seconds per token.
        uptrain_tokens: tokens of distillation after the conversion.
        calibration, repair, device: text to measure the loss of converted layers (see ``regroup.plan``).
        bench: records of ``regroup bench decode`` on the same hardware.
        revision, allow_pickle: see ``opening.open_source``.
        listener: for progress.

    Returns:
        What was found, with the plan of the recommended candidate.

    Raises:
        RegroupError: something cannot be read or predicted, or nothing is within the limits.

    Example:
        >>> advice = regroup.advise("llama-2-7b", hardware="a100-80gb", context=4096, batch=32)  # doctest: +SKIP
        >>> advice.choice.prediction.name, advice.plan  # doctest: +SKIP
    """
    listener = listener or Listener()
    check_asked({"repair": repair, "calibration": calibration}, device, SINGLE_PROCESS)
    calibration = calibration_of({"calibration": calibration})
    if max_loss is not None and calibration is None:
        raise RegroupError(
            "a limit of the loss needs text",
            got=f"--max-loss {max_loss:g} without text",
            remedy="add --calibration FILE: weights give a ranking of candidates, but no loss in nats",
        )
    if uptrain_tokens is not None and calibration is None:
        raise RegroupError(
            "the loss after uptraining needs text",
            remedy="add --calibration FILE, or omit the uptraining",
        )
    own = str(device_named(device)) if hardware == THIS else "cpu"
    dtypes = (dtype,) if dtype is not None else _dtypes(own) if hardware == THIS else ("bfloat16",)
    # Check dtypes and numbers before anything is downloaded.
    works = [Work(batch, context, max(2, new), name, own) for name in dtypes]
    known = None if hardware == THIS else named(hardware)
    with readable(str(source), revision=revision, allow_pickle=allow_pickle) as place:
        config, folder = read_config(place, revision=revision)
        original = describe(config, kv_heads=None, layers=None)
        room = max(1, context - (0 if original.is_encoder_decoder else 2))
        check_positions(original, Work(batch, room, 2, "float32", "cpu"), asked="the context", options="--context")
        if not original.is_encoder_decoder:
            # The step of the last token, with the whole context in the cache.
            works = [replace(work, prompt=max(1, context - 1), new=2) for work in works]
        records = [Bench.load(Path(path), processor=known is None and own == "cpu") for path in bench]
        available = memory_bytes
        if available is None:
            free = known.memory if known else free_memory(own)
            if free is None:
                raise RegroupError("the free memory is unknown", remedy="set it with --memory GB")
            available = int(USABLE * free)
        if folder is None:
            if calibration is not None:
                raise RegroupError(
                    "the source has no weights to measure the loss of", file=str(source), got="a config alone"
                )
            found = from_config(config, tensor_parallel)
        else:
            with open_source(place, revision=revision) as opened:
                found = candidates(opened, config, calibration, listener, tensor_parallel, repair, device)
        with listener.stage("building every candidate on the meta device", len(found), "candidates") as count:
            models = []
            for candidate in found:
                models.append(describe(candidate.config, kv_heads=None, layers=None))
                count(1)
        own_rates = None
        if known is None:
            own_rates = measure(
                own, models, works, [(model, b.work) for b in records for model, _ in b.models], listener
            )
        machine = Machine(known, own_rates)
        work, why = works[0], None
        if len(works) > 1:
            work, why = fastest_dtype(machine, original, works)
        setting = Setting(batch, context, new, work.dtype, tensor_parallel)
        efficiency = efficiency_of(records, machine, batch)
        recovery = Recovery.load()

        def estimate(model: Model) -> float:
            return step_seconds(*divided(model, work, setting.devices), machine.rates(model, work), efficiency)

        # Records are of one device.
        just = [pair for bench in records for pair in bench.in_setting(original, work)] if tensor_parallel == 1 else []
        timed = [(estimate(model), took) for model, took in just]
        predictions = []
        for candidate, model in zip(found, models, strict=True):
            seconds = interpolated(estimate(model), timed) if timed else estimate(model)
            predictions.append(
                _predict(candidate, model, setting, work, machine, seconds, available, recovery, uptrain_tokens)
            )
        choice = choose(predictions, batch=batch, max_loss=max_loss, max_seconds=max_seconds)
        plan = found[predictions.index(choice.prediction)].plan
        if plan is not None and folder is not None:
            if calibration is None:
                with open_source(place, revision=revision) as opened:
                    plan = grouped(opened, plan, listener)
            plan.check(detect(config))
        front = pareto(predictions)
        lines = assumptions(
            machine, efficiency, records, len(timed), calibration, recovery, uptrain_tokens, original, tensor_parallel
        )
        if why is not None:
            lines.insert(1, why)
        rests_on = "config" if folder is None else "weights" if calibration is None else "text"
        sure = loss_basis(rests_on, calibration, recovery, uptrain_tokens)
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
    """The dtypes that are tried by default, the preferred one first."""
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
    """Costs of a step on one of several devices."""
    part = replace(model, attention=tuple(Heads.of(layer, devices) for layer in model.attention))
    weights, attention = step_costs(part, work)
    return Cost(weights.nbytes // devices, weights.flops // devices), attention


def prompt_flops(model: Model, held: int, setting: Setting) -> int:
    """Operations up to the first token: 2 per weight and token of the prompt, and causal attention.

    In an encoder-decoder the encoder reads the prompt; its attention is not causal, and is counted with the decoder's
    heads.
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
