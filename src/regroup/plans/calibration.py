"""What to calibrate on, as a plan names it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import as_named, sha256_of

# Tokens that a model writes itself where nothing else is said: enough for the statistics of each layer, while sampling
# and calibration take minutes.
OWN_TOKENS = 16_384
# A layer's distillation takes a step for each batch: few tokens, so that there are many steps.
_BATCH_TOKENS, _BATCH_ROWS = 512, 4
# What `--calibration` is called where it is no file.
NO_TEXT, OWN_TEXT = "none", "self"
# In a converted model: the text that the original model wrote.
OWN_TEXT_FILE = "regroup_calibration.jsonl"
_OWN = re.compile(r"self(?::([^,]*))?(?:,(.*))?", re.DOTALL)
_COUNT = re.compile(r"(\d+)([km]?)", re.IGNORECASE)


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on, and how much of it.

    Attributes:
        data: a file of text or JSON lines, for encoder-decoders of pairs (see ``regroup.data``); None for text that the
            model writes itself, alone.
        tokens: at most this many; for pairs, about this many in the targets. With both kinds of text, half of each.
        window: tokens per window of a decoder-only model.
        batch: windows or pairs per batch; None for ``batch_size``'s choice.
        document_starts: begin windows where documents begin (see ``regroup.data.document_windows``).
        seed: of the sample of pairs, of the order of windows that begin where documents do, and of text that the model
            writes itself.
        sha256: of a file's content; None until it is read (``hashed``), and for data that is no file.
        own: have the original model write text itself, from its own distribution (see ``generation.Sampler``). Its
            windows are never longer than the model's positions.
        start: how that text starts (``generation.STARTS``); None for ``"mixed"``.
        written: a file with that text (``OWN_TEXT_FILE`` of a converted model), which is then used as it is. It is a
            place, and no part of what a plan asks for.
    """

    data: str | Path | None = None
    tokens: int = 65_536
    window: int = 512
    batch: int | None = None
    document_starts: bool = False
    seed: int = 0
    sha256: str | None = None
    own: bool = False
    start: str | None = None
    written: Path | None = None

    def __post_init__(self) -> None:
        if self.data is None and not self.own:
            raise RegroupError("no calibration text is named", remedy="name a file, or set own to true")

    @classmethod
    def parse(cls, text: str | Path, *, seed: int = 0, **sizes: Any) -> CalibrationText | None:
        """What ``--calibration`` says: ``none``, ``self``, ``self:TOKENS``, ``FILE``, ``self,FILE`` or
        ``self:TOKENS,FILE``. A file of such a name is called ``./none`` or ``./self``.

        Args:
            text: see there. With ``self`` and a file there is as much of each.
            seed: of text that the model writes itself.
            sizes: values for fields of this class; those that are None are left out.

        Returns:
            The text; None for ``none``.

        Raises:
            RegroupError: the tokens cannot be read, or were given twice.
        """
        given = {name: size for name, size in sizes.items() if size is not None}
        if str(text) == NO_TEXT:
            return None
        found = _OWN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            return cls(text, **given)
        count, data = found.groups()
        if count is not None and "tokens" in given:
            raise RegroupError(
                "the number of calibration tokens was given twice",
                got=f"{text} and {given['tokens']}",
                remedy="leave one of them out",
            )
        if data == "":
            raise RegroupError("no file is named", expected="self,FILE", got=repr(text))
        tokens = OWN_TOKENS if count is None else _count(count)
        usual = {"tokens": tokens if data is None else 2 * tokens, "seed": seed, "own": True}
        return cls(data, **usual | given)

    @property
    def name(self) -> str:
        """What ``--calibration`` called it, without the number of tokens."""
        return ",".join([*([OWN_TEXT] if self.own else []), *([] if self.data is None else [str(self.data)])])

    @property
    def given(self) -> CalibrationText | None:
        """The part of it that the model does not write; None where it writes all."""
        if self.data is None or not self.own:
            return self if self.data is not None else None
        return replace(self, own=False, start=None, written=None, tokens=max(1, self.tokens // 2))

    @property
    def own_tokens(self) -> int:
        """How many tokens the model writes."""
        return 0 if not self.own else self.tokens if self.data is None else max(1, self.tokens - self.tokens // 2)

    def batch_size(self, *, pairs: bool) -> int:
        """Windows or pairs per batch: what was asked for, or 4, but windows of 512 tokens in all at most."""
        if self.batch is not None:
            return self.batch
        return _BATCH_ROWS if pairs else min(_BATCH_ROWS, max(1, _BATCH_TOKENS // self.window))

    def hashed(self) -> CalibrationText:
        """The same with the hash of its file.

        Raises:
            RegroupError: the file does not have the hash that is expected of it.
        """
        if self.data is None:
            return self
        path = as_named(self.data)
        if not path.is_file():
            return self
        found = sha256_of(path)
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
        values = asdict(self) | {"written": None}
        if self.data is not None:
            path = as_named(self.data)
            values["data"] = path.name if path.exists() else str(self.data)
        if not self.own:
            # Plans from before there was such text keep their hash.
            values["own"] = None
        return {name: value for name, value in values.items() if value is not None}


def _count(text: str) -> int:
    """``"16k"`` or ``"16384"`` to a number; units are powers of 1000, as elsewhere."""
    found = _COUNT.fullmatch(text.replace("_", ""))
    number = int(found[1]) * {"": 1, "k": 1000, "m": 1_000_000}[found[2].lower()] if found else 0
    if number < 1:
        raise RegroupError(
            "the number of tokens cannot be read",
            expected="self:TOKENS with a positive number such as 16384 or 16k",
            got=repr(text),
            remedy="a file of that name is called ./self:…",
        )
    return number
