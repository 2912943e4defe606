"""Whether a child is what its plan promises of its parent: structure, untouched bytes, merged tensors, and loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
_NAMED = 5  # tensors or files that a broken promise names
# Files that transformers and engines read where they find them: one that was added makes another model of a folder.
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
class Promise:
    """One thing that was promised.

    Attributes:
        name: what.
        held: whether it holds; None where it cannot be told.
        detail: on what, or what broke it.
    """

    name: str
    held: bool | None
    detail: str


def verify(
    parent: str,
    child: str,
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
    """Recompute what a conversion promised.

    A plan without text is carried out again, a tensor at a time, and compared bit for bit. What was solved on text
    cannot be made again without it: those tensors are looked at for numbers that are none.

    Args:
        parent: the folder or hub id that was converted.
        child: the folder that came of it.
        plan: that was carried out; the child's own by default.
        allow_pickle: read pickled weights of the parent, with torch's restricted unpickler.
        uptrained: the child was trained since: its weights are its own, and their structure alone is checked.
        data: text, or pairs, on which both are scored.
        window, windows, device: see ``evaluate.run.evaluate``.
        listener: told how it goes on.

    Returns:
        A record of kind ``"verify"`` with ``promises`` and the ``verdict``: ``"kept"`` or ``"broken"``.

    Raises:
        RegroupError: the parent or the plan cannot be read, or the parent is incomplete. A child that cannot be read or
            is incomplete is a broken promise.
    """
    told = listener or Listener()
    folder = as_named(child)
    refuse_gguf(folder)
    if not folder.is_dir():
        raise RegroupError("the child is not a folder", file=folder, expected="a converted checkpoint")
    chosen, calibrated = found_plan(folder, plan)
    with open_source(parent, allow_pickle=allow_pickle) as opened:
        chosen.check(opened.layout)
        planned = preview(opened.checkpoint, opened.layout, chosen)
        check_loadable(
            converted_config(opened.checkpoint.config, opened.layout, chosen), planned.tensors, opened.folder
        )
        promises = [Promise("the plan fits the parent", True, f"{len(chosen.layers)} layers, hash {chosen.digest()}")]
        try:
            made = open_checkpoint(folder)
        except RegroupError as error:
            promises.append(Promise("the child can be read", False, str(error).replace("\n", "; ")))
            made = None
        if made is not None:
            promises.append(_config(opened.checkpoint.config, made.config, opened.layout, chosen))
            promises.append(_loadable(made))
            promises.append(_companions(opened.checkpoint, made, planned.stock, uptrained))
            structure = list(_structure(made, planned))
            promises += structure
            if not uptrained and all(promise.held for promise in structure):
                with told.stage("comparing", len(made.tensors), "tensors") as count:
                    promises += _weights(opened.checkpoint, made, opened.layout, planned, calibrated, count)
            elif uptrained:
                promises.append(Promise("weights", None, "trained since the conversion: not compared"))
    if data is not None and all(promise.held is not False for promise in promises):
        with (
            readable(parent, allow_pickle=allow_pickle) as place,
            told.stage("scoring both on text", unit="rows") as count,
        ):
            promises.append(_loss(place, folder, chosen, data, window, windows, device, count))
    verdict = "broken" if any(promise.held is False for promise in promises) else "kept"
    name = Path(parent).name if Path(parent).exists() else parent
    asked = {"parent": name, "child": folder.name, "uptrained": uptrained, "data": None if data is None else data.name}
    return record("verify", asked, {"verdict": verdict, "promises": [asdict(promise) for promise in promises]})


def _config(parent: dict[str, Any], child: dict[str, Any], layout: Layout, plan: Plan) -> Promise:
    wanted = json.loads(json.dumps(converted_config(parent, layout, plan)))
    differing = sorted(key for key in wanted.keys() | child.keys() if wanted.get(key) != child.get(key))
    if not differing:
        return Promise("config.json is the plan's", True, f"{len(wanted)} entries")
    found = (f"{key}: {wanted.get(key)!r} expected, {child.get(key)!r} found" for key in differing[:_NAMED])
    return Promise("config.json is the plan's", False, "; ".join(found))


def _loadable(child: Checkpoint) -> Promise:
    """The model's class, not the original checkpoint, says which tensors there must be."""
    name = "transformers finds every weight"
    try:
        check_loadable(child.config, child.tensors, child.folder)
    except RegroupError as error:
        return Promise(name, False, str(error).replace("\n", "; "))
    return Promise(name, True, f"{len(child.tensors)} tensors")


def _companions(parent: Checkpoint, child: Checkpoint, stock: bool, uptrained: bool) -> Promise:
    """The tokenizer, the settings for generation and all else beside the weights are copies, and no code was added."""
    name = "files beside the weights are the original model's"
    own = (*OWN_RECORDS, "README.md")
    code = () if stock else (MODELING_FILE.name,)
    odd: list[str] = []
    wanted: list[Path] = []
    try:
        wanted = [path for path in parent.companions() if path.as_posix() not in own]
        for path in wanted:
            file = child.folder / path
            if not file.is_file():
                odd.append(f"{path} is missing")
            elif file.read_bytes() != (parent.folder / path).read_bytes():
                odd.append(f"{path} differs")
        odd += [
            f"{path} is not expected"
            for path in child.companions()
            if path not in wanted and path.name.startswith(_READ_BY_LOADERS)
        ]
        found = sorted(path.relative_to(child.folder).as_posix() for path in child.folder.rglob("*.py"))
        odd += [f"{path} is not expected" for path in found if path not in code]
        for path in code:
            if path not in found:
                odd.append(f"{path} is missing")
            elif (child.folder / path).read_bytes() != MODELING_FILE.read_bytes():
                odd.append(f"{path} is not that of the installed regroup")
    except (OSError, RegroupError) as error:
        odd.append(str(error).replace("\n", "; "))
    if odd and uptrained:
        return Promise(name, None, f"not all: {_promise(name, odd, '').detail}")
    return _promise(name, odd, f"{len(wanted) + len(code)} files" if not odd else "")


def _structure(child: Checkpoint, ahead: Preview) -> Iterator[Promise]:
    """Names, shards, shapes and dtypes."""
    wanted = {
        name: (file, spec.dtype, spec.shape) for file, names in ahead.shards.items() for name, spec in names.items()
    }
    found = {
        name: (file, entry.dtype, entry.shape)
        for file, entries in child.shards.items()
        for name, entry in entries.items()
    }
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    names = [f"{name} is missing" for name in missing] + [f"{name} is not expected" for name in more]
    yield _promise("every tensor is there, and no other", names, f"{len(wanted)} tensors")
    odd = [
        f"{name}: {_spec(wanted[name])} expected, {_spec(found[name])} found"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    yield _promise("files, dtypes and shapes", sorted(odd), f"{len(ahead.shards)} files")


def _spec(spec: tuple[str, str, tuple[int, ...]]) -> str:
    file, dtype, shape = spec
    return f"{dtype} {list(shape)} in {file}"


def _weights(
    parent: Checkpoint,
    child: Checkpoint,
    layout: Layout,
    ahead: Preview,
    calibrated: bool,
    progress: Callable[[int], None],
) -> list[Promise]:
    """Untouched tensors byte for byte, merged ones made again, solved ones for being numbers."""
    solved = _attention(layout) if calibrated else set()
    differ, wrong, odd = [], [], []
    counts = {"untouched": 0, "merged": 0, "solved": 0}
    for name in sorted(child.tensors):
        if name in ahead.changed and not calibrated:
            counts["merged"] += 1
            if not _same(ahead.changed[name].run(name, parent.read), child.read(name)):
                wrong.append(name)
        elif name in ahead.changed or (name in solved and not _unchanged(name, parent, child)):
            counts["solved"] += 1
            if not bool(torch.isfinite(child.read(name).float()).all()):
                odd.append(f"{name} holds numbers that are none")
        else:
            counts["untouched"] += 1
            if not _unchanged(name, parent, child):
                differ.append(name)
        progress(1)
    promises = [_promise("untouched tensors are the parent's, byte for byte", differ, f"{counts['untouched']} tensors")]
    if calibrated:
        detail = f"{counts['solved']} tensors, finite; they cannot be made again without the text"
        promises.append(_promise("tensors solved on text are numbers", odd, detail))
    else:
        detail = f"{counts['merged']} tensors"
        promises.append(_promise("merged tensors are made again, bit for bit", wrong, detail))
    return promises


def _attention(layout: Layout) -> set[str]:
    """Tensors of attention layers: what text may have changed."""
    return {
        slot.tensor
        for layer in layout.layers
        for projection in (layer.query, layer.key, layer.value, layer.output)
        for slot in projection.slots()
    }


def _unchanged(name: str, parent: Checkpoint, child: Checkpoint) -> bool:
    """Bytes of any dtype: old files hold masks beside the weights. Dtypes and shapes were compared before."""
    return torch.equal(parent.read_bytes(name), child.read_bytes(name))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bytes, so that a number that is none equals itself and 0 differs from -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    raw = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*raw)


def _promise(name: str, broken: list[str], detail: str) -> Promise:
    if not broken:
        return Promise(name, True, detail)
    rest = len(broken) - _NAMED
    return Promise(name, False, "; ".join(broken[:_NAMED]) + (f"; and {rest} more" if rest > 0 else ""))


def _loss(
    parent: str,
    child: Path,
    plan: Plan,
    data: Path,
    window: int,
    windows: int | None,
    device: str | None,
    progress: Progress,
) -> Promise:
    """KL to the parent on text, beside what the plan predicts."""
    from .evaluation.run import evaluate

    found = evaluate(
        str(child),
        data,
        teacher=parent,
        window=window,
        windows=windows,
        dtype="float32",
        device=device,
        progress=progress,
        ahead=progress.expect,
    )["results"]
    kl, excess = found["kl_nats_per_token"], found["excess_nats_per_token"]
    measured = f"KL {kl:.4f}, {excess:+.4f} nats a token over the parent, on {found['tokens']:,} tokens"
    if plan.predicted_kl is None:
        return Promise("loss", None, f"{measured}; the plan predicts none")
    allowed = TOLERANCE * plan.predicted_kl
    detail = f"{measured}; predicted {plan.predicted_kl:.4f}, at most {allowed:.4f} allowed"
    return Promise("loss is within the plan's prediction", kl <= allowed, detail)
