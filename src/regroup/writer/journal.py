"""Resume a conversion that was killed: what is on the disk for good, and for which request.

The hidden folder in which a conversion grows holds a journal until it is complete. A run to the same destination reads
the journals of folders that no process works in. If plan, text, source and version are the same, it keeps what was
found, the layers that were solved and the weight files that were finished.
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
from ..checkpoint.stage import sync
from ..checkpoint.writer import write_text
from ..errors import RegroupError
from ..plans import Plan
from ..solver.store import SolutionStore

JOURNAL_FILE = ".regroup-journal.json"
SOLVED_FOLDER = ".regroup-solved"
WRITTEN_FILE = ".regroup-written.jsonl"


class Journal:
    """What a stage folder was begun for, and how far the work in it has come.

    Args:
        checkpoint: the original model.
        plan: what is asked for.
        shards: file name to what the file holds (tensor name to dtype and shape).
        text: hash of the calibration batches, or which text the model writes; None without text.
        notice: called with a sentence about the folder of a killed run that is used or cannot be.

    Attributes:
        found: the plan with the groups that a search found; None before it has.
        finished: weight files that are complete and flushed.
        store: solved layers; there from ``begin`` on.
    """

    store: SolutionStore

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
        *,
        text: str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.found: Plan | None = None
        self.finished: list[str] = []
        # What all later work depends on.
        self._facts = {
            "version": importlib.metadata.version("regroup-gqa"),
            "source": {file: list(stamp) for file, stamp in checkpoint.stamps.items()},
            # Archives and package managers give all files one time, and two models of one kind have the same sizes.
            "content": fingerprint(checkpoint.folder),
            "plan": plan.digest(),
            "text": text,
        }
        self._shards, self._metadata = shards, checkpoint.metadata
        self._notice = notice or (lambda text: None)
        self._stage: Path | None = None
        self._lock = threading.Lock()

    @property
    def has_solutions(self) -> bool:
        """Whether a layer is solved that the next run could take over."""
        return self._stage is not None and bool(self.store.names())

    @property
    def has_text(self) -> bool:
        """Whether the original model has written its text."""
        return self._stage is not None and self.written.exists()

    @property
    def written(self) -> Path:
        """Where the text is kept that the original model writes itself; from ``begin`` on."""
        assert self._stage is not None
        return self._stage / WRITTEN_FILE

    def adopt(self, stage: Path) -> bool:
        """Whether to continue in a folder that a killed run left; if so, all that is not complete is removed."""
        try:
            found = read_json(stage / JOURNAL_FILE)
            plan = found.get("found")
            earlier = None if plan is None else Plan.from_json(plan, stage / JOURNAL_FILE)
        except RegroupError:
            return False  # killed before it had begun
        if obstacle := self._obstacle(found):
            self._notice(f"a conversion to this destination was cut short; {obstacle}, so it starts anew")
            return False
        self.found = earlier
        names = found.get("finished")
        listed = names if isinstance(names, list) else []
        self.finished = [name for name in self._shards if name in listed and self._whole(stage, name)]
        for path in stage.iterdir():
            if path.name not in (*self.finished, JOURNAL_FILE, SOLVED_FOLDER, WRITTEN_FILE):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        store = SolutionStore(stage / SOLVED_FOLDER)
        store.discard_damaged({name: spec for specs in self._shards.values() for name, spec in specs.items()})
        solved = len(store.names())
        layers = f"{solved} attention layers are solved and " if solved else ""
        count = f"{len(self.finished)} of {len(self._shards)} weight files are finished"
        self._notice(f"a conversion to this destination was cut short; {layers}{count}, and it resumes from there")
        return True

    def begin(self, stage: Path) -> None:
        """Write the journal into a stage that is new or was adopted."""
        self._stage = stage
        self._write()
        (stage / SOLVED_FOLDER).mkdir(exist_ok=True)
        self.store = SolutionStore(stage / SOLVED_FOLDER)

    def find(self, plan: Plan) -> None:
        """Note the plan with the groups that a search found."""
        self.found = plan
        self._write()

    def finish(self, file: str) -> None:
        """Note that a weight file is complete and flushed; from any thread."""
        with self._lock:
            self.finished.append(file)
            self._write()

    def end(self) -> None:
        """Remove the journal, the solved layers and the text: everything is complete."""
        assert self._stage is not None
        self.written.unlink(missing_ok=True)
        shutil.rmtree(self._stage / SOLVED_FOLDER)
        (self._stage / JOURNAL_FILE).unlink()

    def _write(self) -> None:
        assert self._stage is not None
        part = self._stage / f"{JOURNAL_FILE}.part"
        found = None if self.found is None else json.loads(self.found.dumps())
        write_text(part, json.dumps({**self._facts, "found": found, "finished": self.finished}) + "\n")
        part.replace(self._stage / JOURNAL_FILE)
        sync(self._stage)

    def _whole(self, stage: Path, file: str) -> bool:
        try:
            entries, metadata = read_header(stage / file)
        except RegroupError:
            return False
        same = {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == dict(self._shards[file])
        return same and metadata == dict(self._metadata[file])

    def _obstacle(self, found: Mapping[str, Any]) -> str | None:
        """Why what a killed run left cannot be used."""
        reasons = {
            "version": "another version of regroup wrote it",
            "source": "the source has changed since",
            "content": "the source has changed since",
            "plan": "it had another plan",
            "text": "it had other calibration text",
        }
        return next((reason for key, reason in reasons.items() if found.get(key) != self._facts[key]), None)
