"""Conversion and uptraining in one go: what lies between them is kept next to the destination until it is complete."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.source import fetch, is_hub_id
from ..checkpoint.writer import check_destination, write_text
from ..data.sources import find_sources
from ..errors import RegroupError
from ..files import as_named
from ..plans import CalibrationText, Plan
from .listener import Listener
from .own_text import is_own
from .recipe import Recipe
from .run import Result, uptrain
from .settings import read_settings

_OPTIONS = "conversion.json"


def convert_and_uptrain(
    source: str,
    destination: Path,
    recipe: Path,
    convert: Callable[[Path], object],
    options: Mapping[str, Any],
    *,
    listener: Listener | None = None,
) -> Result:
    """Convert, uptrain with a recipe, and put the result where it is wanted.

    ``DESTINATION.uptraining/`` holds the converted checkpoint and the run until then, and the run's record afterwards.
    The same call continues where one was broken off.

    Args:
        source: the original model, which is the teacher unless the recipe says otherwise.
        destination: a folder that does not exist yet; it appears when it is complete.
        recipe: YAML as for ``regroup uptrain``; ``model`` and ``output`` are given by this function.
        convert: writes the converted checkpoint into a folder, all of it or nothing.
        options: what the conversion was asked for, to recognize a different one.
        listener: of the uptraining.

    Raises:
        RegroupError: as conversion and uptraining; another conversion lies there unfinished.
    """
    work, converted, run = _places(destination)
    # Everything that can be wrong with the recipe, before the conversion takes its time.
    wanted = check_recipe(recipe, source, destination)
    check_destination(destination, as_named(source), 0)
    asked = _asked(source, options)
    if converted.exists():
        if not (work / _OPTIONS).is_file() or (work / _OPTIONS).read_text(encoding="utf-8") != asked:
            raise RegroupError(
                "another conversion to this place was begun and not finished",
                file=work,
                remedy="resume with the same options and files, or remove that folder",
            )
    else:
        with _begun(work, converted, asked):
            convert(converted)
    done = uptrain(wanted, listener=listener)
    assert done.model is not None
    done.model.rename(destination)
    shutil.rmtree(converted)
    for state in run.glob("checkpoint-*"):
        shutil.rmtree(state)
    return Result(done.recipe, done.budget, done.lines, destination, done.record, done.resumed_from)


def check_recipe(recipe: Path, source: str, destination: Path) -> Recipe:
    """Check whatever of a recipe can be checked before there is a model to uptrain.

    Args:
        recipe, source, destination: as for ``convert_and_uptrain``.

    Returns:
        The recipe, with the model, the output and the teacher filled in.

    Raises:
        RegroupError: the recipe is wrong, or its data or a local teacher is not there.
    """
    settings = {name.replace("-", "_") for name in read_settings(recipe)}
    if settings & {"model", "output"}:
        raise RegroupError(
            "the recipe sets the model or the output",
            file=recipe,
            got=", ".join(sorted(settings & {"model", "output"})),
            remedy="leave model and output out: the model is what is converted, the output is DST",
        )
    _, converted, run = _places(destination)
    teacher = None if "teacher" in settings else source
    wanted = Recipe.load(recipe, model=str(converted), output=run, teacher=teacher)
    held_out = () if wanted.held_out is None else (wanted.held_out,)
    files = [source for source in (*wanted.data, *held_out) if not is_own(source)]
    if files:
        find_sources(files, pairs=wanted.objective == "pairs")
    # A hub id could only be checked by downloading the teacher, which a dry run should not do.
    if wanted.teacher is not None and (as_named(wanted.teacher).exists() or not is_hub_id(wanted.teacher)):
        fetch(wanted.teacher)
    return wanted


def uptraining_of(destination: Path) -> tuple[Path, Path]:
    """The folders of the run and of the converted checkpoint that ``convert_and_uptrain`` keeps meanwhile."""
    _, converted, run = _places(destination)
    return run, converted


def _places(destination: Path) -> tuple[Path, Path, Path]:
    """The folder next to the destination, and in it those of the converted checkpoint and of the run."""
    work = destination.with_name(destination.name + ".uptraining")
    return work, work / "converted", work / "run"


def _asked(source: str, options: Mapping[str, Any]) -> str:
    """What a conversion was asked for; files count by content, because they may be edited between two calls."""
    said = {"source": _place(source), **options}
    if (plan := said.get("plan")) is not None:
        said["plan"] = Plan.load(Path(plan)).digest()
    if isinstance(text := said.get("calibration"), CalibrationText):
        # A folder has no hash: its path has to distinguish it.
        place = None if text.data is None else _place(text.data)
        said["calibration"] = asdict(text) | text.describe() | {"data": place}
    return json.dumps(said, indent=2, default=str) + "\n"


def _place(name: str | Path) -> str:
    path = as_named(name)
    return str(path.resolve() if path.exists() else name)


@contextlib.contextmanager
def _begun(work: Path, converted: Path, asked: str) -> Iterator[None]:
    """Note what is asked for while it is converted; where that fails, nothing of the note is left behind."""
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / _OPTIONS, asked)
        yield
    except BaseException:
        if not converted.exists():
            # A folder that something else was put into meanwhile is not ours to remove.
            with contextlib.suppress(OSError):
                (work / _OPTIONS).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        raise
