"""What advice rests on, and how far such figures were off by the records, in words."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.build import Model
from ..plans import CalibrationText
from .measured import Bench, Machine
from .predict import Efficiency
from .recovery import Recovery


def sure_of(rests_on: str, calibration: CalibrationText | None, recovery: Recovery, uptrain_tokens: int | None) -> str:
    """What the estimate of the loss rests on, and how far such estimates were off, by the records."""
    if rests_on == "config":
        return (
            "the loss is not known: a config alone says nothing of it; give the checkpoint, and text with --calibration"
        )
    if rests_on == "weights":
        return (
            "the loss is not known: candidates are ranked by the energy that their heads lose, from the weights alone, "
            "which is no loss; --calibration FILE measures it"
        )
    assert calibration is not None
    words = (
        f"the loss rests on at most {calibration.tokens:,} tokens of calibration text, each layer converted alone; "
        f"sums of that kind were off by a factor of {recovery.additivity_error:.2f} for single models"
    )
    if uptrain_tokens is not None:
        words += f", and what uptraining leaves by one of {recovery.error:.2f} more"
    return f"{words} ({recovery.source})"


def assumptions(
    machine: Machine,
    efficiency: Efficiency,
    records: Sequence[Bench],
    timed: int,
    calibration: CalibrationText | None,
    recovery: Recovery,
    uptrain_tokens: int | None,
    parent: Model,
    tensor_parallel: int,
) -> list[str]:
    """What memory and times, and the loss as far as there is text, rest on: a line each.

    ``timed`` is how many steps the records have of the very setting that is asked about.
    """
    lines = [machine.source()]
    places = ", ".join(dict.fromkeys(record.place for record in records))
    if timed:
        lines.append(
            f"times are those that the bench records measured in this setting with {timed} numbers of KV heads (on: "
            f"{places}), and in proportion where they measured none"
        )
    elif efficiency.measured:
        lines.append(
            f"a step takes {efficiency.weights:.2f} times its floor in linear layers and {efficiency.attention:.2f} "
            f"times in attention, by the bench records and their batches (measured on: {places})"
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
