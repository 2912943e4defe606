"""What to calibrate on, as a plan names it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import as_named


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on, and how much of it.

    Attributes:
        data: a file of text or JSON lines, for encoder-decoders of pairs (see ``regroup.data``).
        tokens: at most this many; for pairs, about this many in the targets.
        window: tokens per window of a decoder-only model.
        batch: windows or pairs per batch.
        document_starts: begin windows where documents begin (see ``regroup.data.document_windows``).
        seed: of the sample of pairs, and of the order of windows that begin where documents do.
        sha256: of a file's content; None until it is read (``hashed``), and for data that is no file.
    """

    data: str | Path
    tokens: int = 65_536
    window: int = 512
    batch: int = 4
    document_starts: bool = False
    seed: int = 0
    sha256: str | None = None

    def hashed(self) -> CalibrationText:
        """The same with the hash of its file.

        Raises:
            RegroupError: the file does not have the hash that is expected of it.
        """
        path = as_named(self.data)
        if not path.is_file():
            return self
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 not in (None, found):
            raise RegroupError(
                "this is not the calibration text of the plan",
                file=path,
                expected=f"sha256 {self.sha256}",
                got=f"sha256 {found}",
                remedy="pass the original file by --calibration, or remove sha256 from the plan's calibration",
            )
        return replace(self, sha256=found)

    def describe(self) -> dict[str, Any]:
        """What a record says of it, with the hash of a file."""
        return self.hashed().to_json()

    def to_json(self) -> dict[str, Any]:
        """For plans and records: a file by name and content, never by place; anything else by name."""
        path = as_named(self.data)
        values = asdict(self) | {"data": path.name if path.exists() else str(self.data)}
        return {name: value for name, value in values.items() if value is not None}
