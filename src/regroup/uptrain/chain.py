"""Conversion and uptraining in one go: what lies between them is kept beside the destination until it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.writer import check_destination, write_text
from ..errors import RegroupError
from .recipe import Recipe
from .run import Result, uptrain
from .settings import read_settings
from .watch import Listener

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
    The same call goes on where one was broken off.

    Args:
        source: the parent, which is the teacher unless the recipe says otherwise.
        destination: a folder that does not exist yet; it appears when it is complete.
        recipe: YAML as for ``regroup uptrain``; ``model`` and ``output`` are given by this function.
        convert: writes the converted checkpoint into a folder, all of it or nothing.
        options: what the conversion was asked for, to tell another one apart.
        listener: of the uptraining.

    Raises:
        RegroupError: as conversion and uptraining; another conversion lies there unfinished.
    """
    settings = {name.replace("-", "_") for name in read_settings(recipe)}
    if settings & {"model", "output"}:
        raise RegroupError(
            "the recipe says what to uptrain, or where to",
            file=recipe,
            got=", ".join(sorted(settings & {"model", "output"})),
            remedy="leave model and output out: the model is what is converted, the output is DST",
        )
    work = destination.with_name(destination.name + ".uptraining")
    child, run = work / "converted", work / "run"
    # Everything that can be wrong with the recipe, before the conversion takes its time.
    teacher = None if "teacher" in settings else source
    wanted = Recipe.load(recipe, model=str(child), output=run, teacher=teacher)
    check_destination(destination, Path(source).expanduser(), 0)
    asked = json.dumps({"source": source, **options}, indent=2, default=str) + "\n"
    if child.exists():
        if not (work / _OPTIONS).is_file() or (work / _OPTIONS).read_text(encoding="utf-8") != asked:
            raise RegroupError(
                "another conversion to this place was begun and not finished",
                file=work,
                remedy="give the options of then to go on, or remove that folder",
            )
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / _OPTIONS, asked)
        convert(child)
    done = uptrain(wanted, listener=listener)
    assert done.model is not None
    done.model.rename(destination)
    shutil.rmtree(child)
    for state in run.glob("checkpoint-*"):
        shutil.rmtree(state)
    return Result(done.recipe, done.budget, done.lines, destination, done.record, done.resumed_from)
