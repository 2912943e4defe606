"""The assumptions of advice, and the errors of earlier predictions, as text."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.build import Model
from ..plans import CalibrationText
from .measured import Bench, Machine
from .predict import Efficiency
from .recovery import Recovery


def loss_basis(
    rests_on: str, calibration: CalibrationText | None, recovery: Recovery, uptrain_tokens: int | None
) -> str:
    """The basis of the estimate of the loss, and the error of earlier estimates."""
    if rests_on == "config":
        return (
            "the loss is unknown: it cannot be estimated from a config; pass a checkpoint, and text with --calibration"
        )
    if rests_on == "weights":
        return (
            "the loss is unknown: candidates are ranked by the lost energy of their heads, from the weights only, "
            "which is not a loss; --calibration FILE measures it"
        )
    assert calibration is not None
    words = (
        f"the loss is estimated from at most {calibration.tokens:,} tokens of calibration text, one layer "
        f"converted at a time; such sums had an error of a factor of {recovery.additivity_error:.2f} for single models"
    )
    if uptrain_tokens is not None:
        words += f", and the loss after uptraining another factor of {recovery.error:.2f}"
    return f"{words} ({recovery.source})"


def assumptions(
    machine: Machine,
    efficiency: Efficiency,
    records: Sequence[Bench],
    timed: int,
    calibration: CalibrationText | None,
    recovery: Recovery,
    uptrain_tokens: int | None,
    original: Model,
    tensor_parallel: int,
) -> list[str]:
    """The basis of memory, times and loss, one line each.

    ``timed`` is the number of measured steps in the records with the same setting.
    """
    lines = [machine.source()]
    places = ", ".join(dict.fromkeys(record.place for record in records))
    if timed:
        lines.append(
            f"times are those of the bench records in this setting with {timed} numbers of KV heads (on: "
            f"{places}), and interpolated for other numbers"
        )
    elif efficiency.measured:
        lines.append(
            f"a step takes {efficiency.weights:.2f} times its floor in linear layers and {efficiency.attention:.2f} "
            f"times in attention, according to the bench records and their batch sizes (measured on: {places})"
        )
    else:
        lines.append("times are lower bounds, and most engines are slower; --bench RECORD makes them predictions")
    if tensor_parallel > 1:
        lines.append("layers are divided over the devices without overhead; communication is not counted")
    if calibration is not None:
        lines.append(
            f"loss is the sum of the losses of single layers, times {recovery.additivity:.2f}; its error was a "
            f"factor of {recovery.additivity_error:.2f} ({recovery.source})"
        )
    if uptrain_tokens is not None:
        lines.append(
            f"{recovery.share(uptrain_tokens):.0%} of it remains after {uptrain_tokens:,} tokens of distillation; the "
            f"error was a factor of {recovery.error:.2f} for a small model that was not in the fit; for much larger "
            "models it is a guess"
        )
    if original.is_encoder_decoder:
        lines.append("the context is the encoder's input")
    return lines
