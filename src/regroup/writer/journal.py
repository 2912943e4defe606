"""Going on with a conversion that was killed: which of its weight files are on the disk for good, and for which plan.

The hidden folder in which a conversion grows holds a journal until it is complete. A run to the same destination reads
the journals of folders that nobody works on, and keeps the finished files if plan, source and version are the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, fingerprint, read_header
from ..checkpoint.reader import read_json
from ..checkpoint.stage import left_behind, sync
from ..checkpoint.writer import write_text
from ..errors import RegroupError
from ..plans import Plan

JOURNAL_FILE = ".regroup-journal.json"
PLAN_FILE = "regroup_plan.json"


class Journal:
    """What a stage folder was begun for, and its finished weight files.

    Args:
        checkpoint: the parent.
        plan: what is carried out.
        asked: digest of the plan before heads were grouped, where a search made this plan of it; else None.
        shards: file name to what the file holds (tensor name to dtype and shape).
        calibrated: whether tensors were solved on text, which the next run does anew.
        notice: told in words of a killed run's folder that is used or cannot be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
        *,
        asked: str | None = None,
        calibrated: bool = False,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.finished: list[str] = []
        self._facts = _facts(checkpoint, plan, asked, calibrated)
        self._shards, self._metadata, self._plan = shards, checkpoint.metadata, plan
        self._notice = notice or (lambda text: None)
        self._stage: Path | None = None
        self._lock = threading.Lock()

    def adopt(self, stage: Path) -> bool:
        """Whether to go on in a folder that a killed run left; if so, all but its finished files are removed."""
        try:
            found = read_json(stage / JOURNAL_FILE)
        except RegroupError:
            return False  # killed before it had begun
        if obstacle := _obstacle(found, self._facts):
            self._notice(f"a conversion to this destination was cut short; {obstacle}, so it starts anew")
            return False
        said = found.get("finished")
        done = said if isinstance(said, list) else []
        self.finished = [name for name in self._shards if name in done and self._whole(stage, name)]
        for path in stage.iterdir():
            if path.name not in (*self.finished, JOURNAL_FILE, PLAN_FILE):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        count = f"{len(self.finished)} of {len(self._shards)} weight files are finished"
        self._notice(f"a conversion to this destination was cut short; {count}, and it goes on from there")
        return True

    def begin(self, stage: Path) -> None:
        """Write plan and journal into a stage that is new or was adopted."""
        self._stage = stage
        write_text(stage / PLAN_FILE, self._plan.dumps())
        self._write()

    def finish(self, file: str) -> None:
        """Note that a weight file is complete and flushed; from any thread."""
        with self._lock:
            self.finished.append(file)
            self._write()

    def end(self) -> None:
        """Remove the journal: everything is complete."""
        assert self._stage is not None
        (self._stage / JOURNAL_FILE).unlink()

    def _write(self) -> None:
        assert self._stage is not None
        part = self._stage / f"{JOURNAL_FILE}.part"
        write_text(part, json.dumps({**self._facts, "finished": self.finished}) + "\n")
        part.replace(self._stage / JOURNAL_FILE)
        sync(self._stage)

    def _whole(self, stage: Path, file: str) -> bool:
        try:
            entries, metadata = read_header(stage / file)
        except RegroupError:
            return False
        same = {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == dict(self._shards[file])
        return same and metadata == dict(self._metadata[file])


def earlier_plan(destination: Path, checkpoint: Checkpoint, asked: str) -> Plan | None:
    """The plan that a killed run to this destination had found for the same question, by a search that takes long."""
    for stage in left_behind(destination):
        with contextlib.suppress(RegroupError):
            found = read_json(stage / JOURNAL_FILE)
            plan = Plan.load(stage / PLAN_FILE)
            if _obstacle(found, _facts(checkpoint, plan, asked, False)) is None:
                return plan
    return None


def _facts(checkpoint: Checkpoint, plan: Plan, asked: str | None, calibrated: bool) -> dict[str, Any]:
    """What finished files depend on."""
    return {
        "version": importlib.metadata.version("regroup-gqa"),
        "source": {file: list(stamp) for file, stamp in checkpoint.stamps.items()},
        # Archives and package managers give all files one time, and two models of one kind have the same sizes.
        "content": fingerprint(checkpoint.folder),
        "plan": plan.digest(),
        "asked": asked,
        "calibrated": calibrated,
    }


def _obstacle(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """Why finished files cannot be used."""
    if found.get("calibrated") or facts["calibrated"]:
        return "what is solved on text is solved again"
    reasons = {
        "version": "another version of regroup wrote it",
        "source": "the source has changed since",
        "content": "the source has changed since",
        "plan": "it had another plan",
        "asked": "it had another plan",
    }
    return next((reason for key, reason in reasons.items() if found.get(key) != facts[key]), None)
