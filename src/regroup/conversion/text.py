"""Calibration text of a conversion: read before anything is written, or written by the model in the stage folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.writer import copy_file
from ..errors import DegenerateTextError, RegroupError
from ..files import as_named, sha256_of
from ..layout import Layout
from ..listener import Listener
from ..opening import Source
from ..plans import OWN_TEXT_FILE, CalibrationText, Plan
from ..processes import ProcessGroup
from .request import Asked, asked_plan, usual_calibration, weights_alone

if TYPE_CHECKING:
    import torch

    from ..calibration.settings import Settings

    Batches = Sequence[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Pending:
    """Text that the original model writes, all of it or half, when there is a folder to keep it in.

    Attributes:
        text: see there.
        rest: hash of the part that it does not write.
    """

    text: CalibrationText
    rest: str

    @property
    def positions(self) -> int:
        """About how many tokens there will be."""
        return self.text.tokens

    def digest(self) -> str:
        """Hash of what a later run has to have in common to continue from what this one leaves."""
        written = self.text.written
        content = None if written is None else sha256_of(written)
        return hashlib.sha256(json.dumps([self.text.to_json(), content, self.rest]).encode()).hexdigest()

    def batches(
        self, opened: Source, kept: Path, listener: Listener, device: str | None, processes: ProcessGroup
    ) -> Batches:
        """Model inputs; what the model writes is in the file ``kept`` afterwards, or was there before.

        Raises:
            DegenerateTextError: what the model writes is no text.
            RegroupError: there are more processes than batches.
        """
        from ..calibration.own_text import write_own_text
        from ..calibration.text import calibration_batches

        folder, config = opened.checkpoint.folder, opened.checkpoint.config
        if self.text.written is not None:
            copy_file(self.text.written, kept)
        elif not kept.exists():
            with listener.writing_text(self.text.own_tokens) as count:
                write_own_text(self.text, folder, config, kept, device=processes.device(device), progress=count)
        made = calibration_batches(replace(self.text, written=kept), folder, config)
        processes.shard(made)  # refuses too many processes
        return made

    def describe(self, kept: Path, *, stays: bool) -> dict[str, Any]:
        """For the record: what the model wrote."""
        lines = kept.read_bytes().count(b"\n")
        return {"rows": lines, "sha256": sha256_of(kept), "file": OWN_TEXT_FILE if stays else None}


def ready(
    opened: Source,
    text: CalibrationText,
    processes: ProcessGroup,
    listener: Listener,
    device: str | None,
    *,
    settings: Settings,
) -> Batches | Pending:
    """Calibration text as model inputs, or what is known of it before the model writes it.

    ``settings`` of the calibration tell how long it will take.

    Raises:
        RegroupError: anything about the text that can be seen to be wrong by now.
    """
    from ..calibration.text import calibration_batches, check_text

    folder, config = opened.checkpoint.folder, opened.checkpoint.config
    if not text.own:
        batches = calibration_batches(text, folder, config)
        processes.shard(batches)  # refuses too many processes
        return batches
    from ..calibration.own_time import own_text_ahead
    from ..devices import device_named

    if text.written is not None and not as_named(text.written).is_file():
        raise RegroupError("the calibration text cannot be read", file=text.written, got="no such file")
    pending = Pending(text, check_text(text, folder, config))
    place = device_named(processes.device(device))
    listener.own_text(own_text_ahead(text, settings, opened.checkpoint, config, opened.layout, place))
    return pending


def possible_plan(
    config: dict[str, Any], layout: Layout, asked: Asked, listener: Listener, processes: ProcessGroup
) -> tuple[Plan, CalibrationText | None]:
    """The plan that is asked for and its text (see ``request.asked_plan``), by default text of the model's own.

    Where the model cannot write text, and was not told to, the plan is for the weights alone.

    Args:
        config, layout: of the original model.
        asked: see there.
        listener: told why the weights alone are used.
        processes: of the run.

    Raises:
        RegroupError: the model cannot write text, and was told to; or as ``request.asked_plan``.
    """
    usual = usual_calibration(asked)
    plan, text = asked_plan(layout, usual, processes)
    if text is None or not text.own:
        return plan, text
    from ..calibration.own_text import obstacle

    why = obstacle(config)
    if why is None:
        return plan, text
    if usual is asked:
        raise RegroupError(
            "the model cannot be calibrated on text that it writes itself",
            file="config.json",
            got=why,
            remedy="pass --calibration none, or leave self out",
        )
    # Other text would not do either.
    listener.notice(f"the weights alone are used: {why}. What that costs in quality is not measured")
    return weights_alone(plan, layout), None


def without_own_text(
    error: DegenerateTextError, layout: Layout, plan: Plan, text: CalibrationText | None, listener: Listener
) -> tuple[Plan, CalibrationText | None]:
    """The plan and its text where what the model writes is none: the given text, or the weights alone.

    Args:
        error: says what it writes; the listener is told.
        layout: of the original model.
        plan, text: as they were asked for.
        listener: see there.
    """
    assert text is not None
    why = f"{error.what}: {error.details.get('got')}"
    if text.given is not None:
        listener.notice(f"the given text alone is used: {why}")
        return replace(plan, calibration=text.given), text.given
    listener.notice(
        f"the weights alone are used: {why}. That costs quality (SmolLM2-135M from 3 KV heads to 1 lost 7.2 nats "
        "per token instead of 1.1), which text of the right kind saves: --calibration FILE"
    )
    return weights_alone(plan, layout), None
