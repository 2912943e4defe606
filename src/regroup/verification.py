"""Check a converted model against its original and its plan: structure, unchanged bytes, merged tensors, loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, open_checkpoint, refuse_gguf
from .errors import RegroupError
from .files import as_named
from .layout import Layout
from .listener import Listener
from .modeling import MODELING_FILE
from .modeling.expected import check_loadable
from .opening import open_source, readable
from .plans import Plan, found_plan
from .progress import Progress
from .record import record
from .writer.converted_config import converted_config
from .writer.preview import OWN_RECORDS, Preview, preview

# Layers' losses do not add up: whole models came to 0.9 to 2.0 times the sum (benchmarks/records/advise-loss.json).
TOLERANCE = 2.5
_NAMED = 5  # tensors or files that a failed check names
# Files that transformers and engines read where they find them: adding one changes the model.
_READ_BY_LOADERS = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "generation_config",
    "chat_template",
    "preprocessor_config",
    "processor_config",
)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        passed: None where there is nothing to compare with.
        detail: how much was compared, or what differs.
    """

    name: str
    passed: bool | None
    detail: str


def verify(
    original: str | Path,
    converted: str | Path,
    *,
    plan: Path | None = None,
    allow_pickle: bool = False,
    uptrained: bool = False,
    data: Path | None = None,
    window: int = 512,
    windows: int | None = None,
    device: str | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Check a converted model against its original and its plan.

    Merged tensors are computed again, one at a time, and compared bit for bit. Tensors that were solved on text cannot
    be computed again without it; they are checked for NaN and infinity.

    Args:
        original: folder or hub id of the original model.
        converted: folder of the converted model.
        plan: plan file of the conversion; the converted model's own by default.
        allow_pickle: read pickled weights of the original model, with torch's restricted unpickler.
        uptrained: the converted model was trained afterwards: check its structure, not its weights.
        data: text, or pairs, on which both models are scored.
        window, windows, device: see ``regroup.evaluate``.
        listener: callbacks for progress.

    Returns:
        A record of kind ``"verify"`` with ``checks`` and the ``verdict``: ``"passed"`` or ``"failed"``.

    Raises:
        RegroupError: the original model or the plan cannot be read, or the original model is incomplete. A converted
            model that is incomplete or cannot be read is a failed check.

    Example:
        >>> regroup.verify("llama-2-7b", "llama-2-7b-gqa8")["results"]["verdict"]  # doctest: +SKIP
        'passed'
    """
    listener = listener or Listener()
    folder = as_named(converted)
    refuse_gguf(folder)
    if not folder.is_dir():
        raise RegroupError("the converted model is not a folder", file=folder, expected="a converted checkpoint")
    chosen, calibrated = found_plan(folder, plan)
    with open_source(str(original), allow_pickle=allow_pickle) as opened:
        chosen.check(opened.layout)
        planned = preview(opened.checkpoint, opened.layout, chosen)
        config = converted_config(opened.checkpoint.config, opened.layout, chosen)
        check_loadable(config, planned.tensors, opened.folder)
        layers = f"{len(chosen.layers)} layers, hash {chosen.digest()}"
        checks = [Check("the plan fits the original model", True, layers)]
        try:
            made = open_checkpoint(folder)
        except RegroupError as error:
            checks.append(Check("the converted model can be read", False, _one_line(error)))
        else:
            checks += [
                _config(config, made.config),
                _loadable(made),
                _companions(opened.checkpoint, made, planned.stock, uptrained),
                *(structure := _structure(made, planned)),
            ]
            if uptrained:
                checks.append(Check("weights", None, "not compared: trained after the conversion"))
            elif all(check.passed for check in structure):
                with listener.stage("comparing", len(made.tensors), "tensors") as count:
                    checks += _weights(opened.checkpoint, made, opened.layout, planned, calibrated, count)
    if data is not None and all(check.passed is not False for check in checks):
        with (
            readable(str(original), allow_pickle=allow_pickle) as place,
            listener.stage("scoring both on text", unit="rows") as count,
        ):
            checks.append(_loss(place, folder, chosen, data, window, windows, device, count))
    verdict = "failed" if any(check.passed is False for check in checks) else "passed"
    name = Path(original).name if Path(original).exists() else str(original)
    return record(
        "verify",
        {
            "original": name,
            "converted": folder.name,
            "uptrained": uptrained,
            "data": None if data is None else data.name,
        },
        {"verdict": verdict, "checks": [asdict(check) for check in checks]},
    )


def _one_line(error: Exception) -> str:
    return str(error).replace("\n", "; ")


def _check(name: str, differences: list[str], detail: str) -> Check:
    """A check that passes if there are no differences; the first of them are named."""
    if not differences:
        return Check(name, True, detail)
    rest = len(differences) - _NAMED
    return Check(name, False, "; ".join(differences[:_NAMED]) + (f"; and {rest} more" if rest > 0 else ""))


def _config(planned: dict[str, Any], found: dict[str, Any]) -> Check:
    planned = json.loads(json.dumps(planned))
    differences = [
        f"{key}: {planned.get(key)!r} expected, {found.get(key)!r} found"
        for key in sorted(planned.keys() | found.keys())
        if planned.get(key) != found.get(key)
    ]
    return _check("config.json matches the plan", differences, f"{len(planned)} entries")


def _loadable(converted: Checkpoint) -> Check:
    """The model's class, not the original checkpoint, says which tensors there must be."""
    try:
        check_loadable(converted.config, converted.tensors, converted.folder)
        differences = []
    except RegroupError as error:
        differences = [_one_line(error)]
    return _check("transformers finds every weight", differences, f"{len(converted.tensors)} tensors")


def _companions(original: Checkpoint, converted: Checkpoint, stock: bool, uptrained: bool) -> Check:
    """The tokenizer, generation settings and all other files next to the weights are copies, and no code was added."""
    name = "other files match the original model's"
    code = () if stock else (MODELING_FILE.name,)
    differences: list[str] = []
    copies: list[Path] = []
    try:
        copies = [path for path in original.companions() if path.as_posix() not in (*OWN_RECORDS, "README.md")]
        for path in copies:
            file = converted.folder / path
            if not file.is_file():
                differences.append(f"{path} is missing")
            elif file.read_bytes() != (original.folder / path).read_bytes():
                differences.append(f"{path} differs")
        differences += [
            f"{path} is not expected"
            for path in converted.companions()
            if path not in copies and path.name.startswith(_READ_BY_LOADERS)
        ]
        found = sorted(path.relative_to(converted.folder).as_posix() for path in converted.folder.rglob("*.py"))
        differences += [f"{path} is not expected" for path in found if path not in code]
        for path in code:
            if path not in found:
                differences.append(f"{path} is missing")
            elif (converted.folder / path).read_bytes() != MODELING_FILE.read_bytes():
                differences.append(f"{path} is not that of the installed regroup")
    except (OSError, RegroupError) as error:
        differences.append(_one_line(error))
    check = _check(name, differences, f"{len(copies) + len(code)} files")
    # Training may save a tokenizer or settings of its own.
    return Check(name, None, f"not all: {check.detail}") if differences and uptrained else check


def _structure(converted: Checkpoint, planned: Preview) -> list[Check]:
    """Names, shards, shapes and dtypes."""
    wanted = {
        name: (file, spec.dtype, spec.shape) for file, specs in planned.shards.items() for name, spec in specs.items()
    }
    found = {
        name: (file, entry.dtype, entry.shape)
        for file, entries in converted.shards.items()
        for name, entry in entries.items()
    }
    names = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    names += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys())]
    specs = [
        f"{name}: {_spec(wanted[name])} expected, {_spec(found[name])} found"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    return [
        _check("all tensors are present, and no others", names, f"{len(wanted)} tensors"),
        _check("files, dtypes and shapes match the plan", specs, f"{len(planned.shards)} files"),
    ]


def _spec(spec: tuple[str, str, tuple[int, ...]]) -> str:
    file, dtype, shape = spec
    return f"{dtype} {list(shape)} in {file}"


def _weights(
    original: Checkpoint,
    converted: Checkpoint,
    layout: Layout,
    planned: Preview,
    calibrated: bool,
    progress: Callable[[int], None],
) -> list[Check]:
    """Compare unchanged tensors byte for byte, recompute merged ones, and check solved ones for NaN and infinity."""
    # Text may have changed any tensor of an attention layer.
    solvable = {
        slot.tensor
        for layer in layout.layers
        for projection in layer.projections().values()
        for slot in projection.slots()
        if calibrated
    }
    unchanged: list[str] = []
    recomputed: list[str] = []
    solved: list[str] = []
    counts = {"unchanged": 0, "merged": 0, "solved": 0}
    for name in sorted(converted.tensors):
        if name in planned.changed and not calibrated:
            counts["merged"] += 1
            if not _same(planned.changed[name].run(name, original.read), converted.read(name)):
                recomputed.append(name)
        elif name in planned.changed or (name in solvable and not _unchanged(name, original, converted)):
            counts["solved"] += 1
            if not bool(torch.isfinite(converted.read(name).float()).all()):
                solved.append(f"{name} holds NaN or infinity")
        else:
            counts["unchanged"] += 1
            if not _unchanged(name, original, converted):
                unchanged.append(name)
        progress(1)
    copied = _check("unchanged tensors equal the original model's bytes", unchanged, f"{counts['unchanged']} tensors")
    if calibrated:
        detail = f"{counts['solved']} tensors; without the text they cannot be computed again"
        return [copied, _check("tensors solved on text are finite", solved, detail)]
    detail = f"{counts['merged']} tensors"
    return [copied, _check("merged tensors, computed again, are the same bit for bit", recomputed, detail)]


def _unchanged(name: str, original: Checkpoint, converted: Checkpoint) -> bool:
    """Whether the bytes are equal, in any dtype: old files hold masks too. Dtypes and shapes were compared before."""
    return torch.equal(original.read_bytes(name), converted.read_bytes(name))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bytes are equal: NaN equals itself, and 0 differs from -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    raw = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*raw)


def _loss(
    original: str,
    converted: Path,
    plan: Plan,
    data: Path,
    window: int,
    windows: int | None,
    device: str | None,
    progress: Progress,
) -> Check:
    """KL divergence from the original model on text, compared with the plan's prediction."""
    from .evaluation.run import evaluate

    found = evaluate(
        str(converted),
        data,
        teacher=original,
        window=window,
        windows=windows,
        dtype="float32",
        device=device,
        progress=progress,
        ahead=progress.expect,
    )["results"]
    kl, excess = found["kl_nats_per_token"], found["excess_nats_per_token"]
    measured = f"KL {kl:.4f}, {excess:+.4f} nats per token over the original model, on {found['tokens']:,} tokens"
    if plan.predicted_kl is None:
        return Check("loss", None, f"{measured}; the plan predicts none")
    allowed = TOLERANCE * plan.predicted_kl
    detail = f"{measured}; predicted {plan.predicted_kl:.4f}, at most {allowed:.4f} allowed"
    return Check("loss is within the plan's prediction", kl <= allowed, detail)
