"""Sections put together to one self-contained page."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..errors import RegroupError, human_bytes
from ..record import write_whole
from . import heads, paper, quality, speed, training
from .figures import Section
from .records import Record, read_records

MOST_BYTES = 2_000_000
# That V8 reserves, measured: with 40 GB it dies, with 70 it runs.
_ADDRESS_SPACE = 70_000_000_000
# What a value of the wrong kind leads to, wherever a section uses it.
_WRONG_KIND = (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError)
_SECTIONS = (
    heads.models,
    quality.section,
    speed.trade_off,
    training.section,
    speed.section,
    heads.similarity,
    paper.section,
)


def write_report(paths: Sequence[Path], output: Path, *, title: str = "regroup report") -> list[str]:
    """Make one HTML page of records; it opens offline and loads nothing.

    Args:
        paths: records that regroup commands wrote with ``-o``, and plans.
        output: the page; it appears when it is complete.
        title: of the page.

    Returns:
        Names of the files of which nothing is shown.

    Raises:
        RegroupError: a file that cannot be read or is no record, nothing to show, or a page that cannot be written.
    """
    records = read_records(paths)
    sections, unused = made_of(records)
    if not sections:
        raise RegroupError(
            "none of the records has anything to draw",
            got=", ".join(f"{record.file} ({record.kind})" for record in records),
            remedy="give records of evaluate, uptrain, bench, advise, inspect --record, or plans",
        )
    text = render(sections, records, unused, title)
    write_whole(output, text, "the page")
    return unused


def made_of(records: Sequence[Record]) -> tuple[list[Section], list[str]]:
    """Sections in their order, and the records that none of them shows."""
    try:
        found = [section for make in _SECTIONS if (section := make(records)) is not None]
        used = {r.file for r in records if any(make([r]) is not None for make in _SECTIONS)}
    except _WRONG_KIND as error:
        culprit = next((record for record in records if _fails(record)), records[0])
        raise RegroupError(
            "a record lacks what its kind has",
            file=culprit.file,
            expected=culprit.kind,
            got=f"{type(error).__name__}: {error}",
            remedy="make it again with this version of regroup",
        ) from error
    return found, [f"{r.file} ({r.kind})" for r in records if r.file not in used]


def _fails(record: Record) -> bool:
    try:
        for make in _SECTIONS:
            make([record])
    except _WRONG_KIND:
        return True
    return False


def render(sections: Sequence[Section], records: Sequence[Record], unused: Sequence[str], title: str) -> str:
    """The page's text.

    Raises:
        RegroupError: it is larger than a page should be.
    """
    from jinja2 import Environment

    template = files(__package__ or "regroup.report").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    specs = [figure.chart for section in sections for figure in section.figures if figure.chart is not None]
    text = environment.from_string(template).render(
        title=title,
        sections=sections,
        records=records,
        unused=unused,
        specs=_script_json(specs),
        library=_library() if specs else "",
    )
    size = len(text.encode())
    if size > MOST_BYTES:
        raise RegroupError(
            "the page would be too large to open at once",
            expected=f"at most {human_bytes(MOST_BYTES)}",
            got=human_bytes(size),
            remedy="make several pages of fewer records",
        )
    return text


def _script_json(value: object) -> str:
    """JSON that cannot end the script that it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script.

    V8 puts it together, which reserves tens of gigabytes of address space, and ends the process that has less: so it
    runs in one of its own.

    Raises:
        RegroupError: that process failed.
    """
    program = "import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    if done.returncode == 0 and done.stdout:
        return done.stdout.decode().replace("</script", "<\\/script")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        raise RegroupError(
            "the charts cannot be made within the limit of address space that is set here",
            expected=f"about {_ADDRESS_SPACE / 1e9:.0f} GB, of which little is used",
            got=f"a limit of {limit / 1e9:.1f} GB (ulimit -v)",
            remedy="run it under `ulimit -v unlimited`, or on a machine that sets no such limit",
        )
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise RegroupError(
        "the charts cannot be made: vl-convert, which brings Vega, does not run",
        got=last[0][:200],
        remedy="reinstall vl-convert-python, or free some memory",
    )
