"""Every setting of an uptraining run, read from a YAML file or given one by one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import RegroupError
from ..files import as_named
from .own_text import is_own
from .settings import checked, read_settings, unknown_setting

# Settings that do not change what is learned.
_WITHOUT_EFFECT = {
    *("output", "teacher_cache", "workers", "eval_every", "save_every", "keep", "log_every", "report_to", "resume"),
    *("device", "micro_batch", "gradient_checkpointing", "compile", "fsdp", "held_out", "held_out_windows"),
    "spike_factor",
}
_LENGTHS = {"alpha", "tokens", "steps"}


@dataclass(frozen=True)
class Recipe:
    """Every setting of an uptraining run.

    Attributes:
        model: the converted checkpoint: a folder or hub id.
        output: folder for the result, its saved states and its logs.
        data: sources of text or pairs (see ``regroup.uptraining.stream.open_stream``); ``"self"`` or ``"self:TOKENS"``
            among them for text that the teacher writes, in turn with the rest where there is any.
        unique_tokens: of a pass at most, the first ones of the data; None for all there are.
        alpha, pretraining_tokens, tokens, steps: how long (see ``regroup.uptraining.budget.plan_budget``).
        objective: ``"causal"``, ``"span-corruption"``, ``"pairs"``, or ``"auto"`` for what the family was trained with.
        teacher: the original model: a folder or hub id; None trains on cross-entropy alone.
        temperature: of both softmaxes in the KL.
        distill_weight: 1 trains on KL alone, 0 on cross-entropy alone.
        hidden_weight: of the distance from the teacher's hidden states (``distill.hidden_distance``), added to the KL;
            None for ``HIDDEN_WEIGHT`` with a teacher that runs, 0 where its logits come from a cache.
        top_k: compare the teacher's k largest logits and the rest as one; None compares all.
        teacher_cache: folder in which the teacher's logits are kept.
        window: tokens per sequence; of an encoder-decoder, of its input.
        max_target: tokens of a pair's target; None for ``window``.
        batch_size: sequences in an optimizer step, over all processes; 0 for the default.
        micro_batch: sequences of a process that are computed at once; None for what fits (``memory.fitting_rows``).
        windows: of causal models: ``"packed"``, ``"documents"`` (see ``objective.Causal``), or ``"auto"``: documents
            with a teacher, where most of the text fills such windows.
        epochs: passes over the data at most; the budget may end the run earlier.
        learning_rate: the highest; with ``"inverse-sqrt"`` the rate of the first step. None for the family's.
        optimizer: ``"muon"`` (with AdamW for what is no matrix, see ``optimizer.make_optimizer``), ``"adamw"``,
            ``"adafactor"``, or ``"auto"``.
        attention_rate: how many times ``learning_rate`` the projections of converted attention layers take (query, key,
            value, output); None for ``ATTENTION_RATE`` with Muon, 1 without.
        adamw_rate: how many times ``learning_rate`` AdamW takes for what Muon does not train.
        schedule: ``"cosine"``, ``"constant-decay"``, ``"constant"``, ``"inverse-sqrt"``, or ``"auto"``.
        warmup: share of the steps in which the rate rises from zero.
        decay: share of the steps in which it falls to zero at the end, for ``"constant-decay"``.
        original_steps: of the original model's pre-training, from which ``"inverse-sqrt"`` is continued.
        weight_decay: of matrices, for AdamW. None for the optimizer's default here.
        betas: of AdamW.
        dropout: None keeps the checkpoint's.
        clip_norm: largest norm of the gradient; 0 does not clip.
        seed: of shuffling, noise and dropout.
        dtype: of the computation: ``"float32"``, ``"bfloat16"``, ``"float16"``. Weights are kept in float32.
        gradient_checkpointing, compile, fsdp: as transformers' Trainer has them; FSDP is version 2.
        cross_documents: let loss and attention cross the borders of documents.
        isolate: keep attention, and not only loss, within documents; None does where the model can.
        shuffle_buffer: windows among which the next one is drawn.
        workers: threads that tokenise ahead.
        held_out: a source for evaluation that is not trained on; ``"self"`` for text that the teacher writes.
        held_out_windows: windows or pairs of it.
        eval_every, save_every: steps between; None for a tenth of the run.
        keep: saved states that are kept.
        log_every: steps between log entries.
        report_to: what the Trainer reports to.
        spike_factor: a loss above this many times its running mean stops the run; 0 does not stop.
        resume: continue from the newest complete state in ``output``.
        device: a torch device; a GPU where there is one.
    """

    model: str
    output: Path
    data: tuple[str, ...]
    unique_tokens: int | None = None
    alpha: float | None = None
    pretraining_tokens: int | None = None
    tokens: int | None = None
    steps: int | None = None
    objective: str = "auto"
    teacher: str | None = None
    temperature: float = 1.0
    distill_weight: float = 1.0
    hidden_weight: float | None = None
    top_k: int | None = None
    teacher_cache: Path | None = None
    window: int = 512
    max_target: int | None = None
    batch_size: int = 0
    micro_batch: int | None = None
    windows: str = "auto"
    epochs: int = 1
    learning_rate: float | None = None
    optimizer: str = "auto"
    attention_rate: float | None = None
    adamw_rate: float = 0.5
    schedule: str = "auto"
    warmup: float = 0.05
    decay: float = 0.2
    original_steps: int | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    dropout: float | None = None
    clip_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    cross_documents: bool = False
    isolate: bool | None = None
    shuffle_buffer: int = 1024
    workers: int = 0
    held_out: str | None = None
    held_out_windows: int = 32
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    spike_factor: float = 2.0
    resume: bool = True
    device: str | None = None

    @classmethod
    def load(cls, path: Path | None = None, **overrides: Any) -> Recipe:
        """A recipe from a YAML file, or from settings alone.

        Settings given here, except None and empty lists, override the file's; a length (``alpha``, ``tokens``,
        ``steps``) overrides any length in the file.

        Names are written as here or with hyphens; counts may be written ``262k`` or ``2T``. Relative paths are relative
        to the current directory, in a file as well.

        Raises:
            RegroupError: unreadable, an unknown or missing key, or a value of the wrong kind or out of range.
        """
        values: dict[str, Any] = {}
        if path is not None:
            values = {key.replace("-", "_"): value for key, value in read_settings(path).items()}
        where = dict.fromkeys(values, path)
        given = {key: value for key, value in overrides.items() if value is not None and value not in ((), [])}
        if _LENGTHS & given.keys():
            # A length on the command line replaces the file's, however that was given.
            values = {key: value for key, value in values.items() if key not in _LENGTHS}
        values |= given
        if isinstance(values.get("data"), (str, list, tuple)):
            names = [values["data"]] if isinstance(values["data"], str) else values["data"]
            values["data"] = [part for name in names for part in _parted(name)]
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_setting(key, known, path if key not in given else None)
        hints = get_type_hints(cls)
        checked_values = {
            key: checked(key, value, hints[key], None if key in given else where.get(key))
            for key, value in values.items()
        }
        missing = [key for key in ("model", "output", "data") if not checked_values.get(key)]
        if missing:
            raise RegroupError(
                "the recipe lacks a setting",
                file=path,
                expected=", ".join(missing),
                remedy="add it to the recipe file or pass it on the command line",
            )
        recipe = cls(**checked_values)
        kept = recipe.held_out is not None and not is_own(recipe.held_out)
        if recipe.held_out is not None and kept and _same(recipe.held_out) in {_same(source) for source in recipe.data}:
            raise RegroupError(
                "the held-out data is trained on", file=recipe.held_out, remedy="hold out a file that is not in data"
            )
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data, such as ``load`` reads."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def digest(self) -> str:
        """Hash of the settings that decide what is learned: not of paths of output, logging, saving, or the device."""
        kept = {key: value for key, value in self.to_json().items() if key not in _WITHOUT_EFFECT}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _parted(name: Any) -> list[Any]:
    """``self,FILE`` as two sources."""
    first, comma, rest = name.partition(",") if isinstance(name, str) else ("", "", "")
    return [first, rest] if comma and is_own(first) else [name]


def _same(source: str) -> Path:
    return as_named(source).resolve()
