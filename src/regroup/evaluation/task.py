"""A task: rows of a file, what a model is asked of each, and how its answers are judged; a YAML file says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any, TypeGuard

import yaml

from ..errors import RegroupError
from ..files import kind_of, parse_json, read_once
from .metrics import CHOOSING, GENERATING

_GENERATED = ("exact_match", "f1")


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        prompt: what the model reads.
        references: right answers, at least one; of a choice, the right one alone.
        choices: what it chooses among, or none.
    """

    prompt: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is asked, and how it is judged.

    Attributes:
        name: for the record; the file's own by default.
        data: JSON lines, or tab-separated pairs (``.tsv``), relative to the task's file.
        prompt: a format string over the fields of a row.
        target: the field with the reference, a text or a list of texts.
        choices, answer: fields with the texts to choose among and the number of the right one, from 0. With
            ``choices`` nothing is generated: the likelihoods of the choices after the prompt are compared.
        metrics: names of ``metrics.GENERATING`` or ``metrics.CHOOSING``.
        max_new_tokens: of an answer.
        max_source_tokens: of a prompt; a decoder keeps its end, an encoder its beginning.
        stop: texts that end an answer, which they are not part of.
        limit: rows at most, the first ones.
        source_language, target_language: names that a translator's tokenizer gives to languages.
    """

    name: str
    data: Path
    prompt: str = "{source}"
    target: str = "target"
    choices: str | None = None
    answer: str = "answer"
    metrics: tuple[str, ...] = _GENERATED
    max_new_tokens: int = 128
    max_source_tokens: int | None = None
    stop: tuple[str, ...] = ()
    limit: int | None = None
    source_language: str | None = None
    target_language: str | None = None

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read a task's YAML file; names with hyphens.

        Raises:
            RegroupError: unreadable, an unknown or missing name, or a value of the wrong kind.
        """
        given = _yaml(path)
        values = {key.replace("-", "_"): value for key, value in given.items()}
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                close = get_close_matches(key, known, n=3) or known
                raise RegroupError(
                    "the task's file has a setting that is not known",
                    file=path,
                    expected=" or ".join(name.replace("_", "-") for name in close),
                    got=key,
                )
        if len(values) < len(given):
            twice = [key for key in given if "-" in key and key.replace("-", "_") in given]
            raise _refused(path, twice[0], "one value", got=f"two, one of them as {twice[0].replace('-', '_')}")
        if "data" not in values:
            raise _refused(path, "data", "the file with the rows", got="nothing")
        if values.get("choices") is not None:
            values.setdefault("metrics", ["accuracy"])
        checked: dict[str, Any] = {key: _checked(path, key, value) for key, value in values.items()}
        try:
            checked["data"] = path.parent / Path(checked["data"]).expanduser()
            checked["data"].resolve()
        except (RuntimeError, ValueError) as error:  # the home of nobody, or a name that no file can have
            raise _refused(path, "data", "a file's name", got=f"{checked['data']!r}: {error}") from None
        checked.setdefault("name", path.stem)
        task = cls(**checked)
        available = CHOOSING if task.choices else GENERATING
        for metric in task.metrics:
            if metric not in available:
                raise _refused(path, "metrics", "some of " + ", ".join(available), got=metric)
        return task

    def rows(self) -> list[Row]:
        """Read the rows.

        Raises:
            RegroupError: no file, no row, or a row that lacks something, by its line.
        """
        kind = kind_of(self.data)
        if kind != "a file":
            raise RegroupError(
                "the data of the task cannot be read",
                file=self.data,
                expected="a file",
                got="none there" if kind == "nothing" else kind,
            )
        found: list[Row] = []
        with self.data.open(encoding="utf-8", errors="strict") as file:
            try:
                for number, line in enumerate(file, 1):
                    if self.limit is not None and len(found) == self.limit:
                        break
                    if line.strip():
                        found.append(self._row(self._fields(line, number), number))
            except UnicodeDecodeError as error:
                raise RegroupError("the data of the task is not UTF-8", file=self.data, got=str(error)) from error
        if not found:
            raise RegroupError("the data of the task holds no rows", file=self.data)
        return found

    def digest(self, rows: list[Row]) -> str:
        """Hash of everything that decides what is asked and what an answer may be; metrics do not."""
        asked = [self.max_new_tokens, self.max_source_tokens, self.stop, self.source_language, self.target_language]
        asked += [[row.prompt, row.references, row.choices] for row in rows]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def _fields(self, line: str, number: int) -> Mapping[str, Any]:
        if self.data.suffix == ".tsv":
            source, tab, target = line.rstrip("\n").partition("\t")
            if not tab:
                raise self._bad(number, "a source, a tab and a target", line.strip())
            return {"source": source, "target": target}
        try:
            value = parse_json(line.encode())
        except (ValueError, RecursionError) as error:
            raise self._bad(number, "a JSON object", str(error)) from None
        if not isinstance(value, dict):
            raise self._bad(number, "a JSON object", line.strip())
        return value

    def _row(self, found: Mapping[str, Any], number: int) -> Row:
        for _, name, _, _ in Formatter().parse(self.prompt):
            if name is not None and not isinstance(found.get(name), (str, int, float)):
                value = repr(found[name]) if name in found else "nothing"
                raise self._bad(number, f"{name}: a text or a number, for the prompt {self.prompt!r}", value)
        try:
            prompt = self.prompt.format_map(found)
        except (KeyError, IndexError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            raise self._bad(
                number, f"fields that fit the prompt {self.prompt!r}", f"{type(error).__name__}: {error}"
            ) from None
        if self.choices is None:
            target = found.get(self.target)
            references = [target] if isinstance(target, str) else target
            if not _texts(references) or not all(text.strip() for text in references):
                raise self._bad(number, f"{self.target}: a text, or several, none of them empty", repr(target))
            return Row(prompt, tuple(references))
        choices, answer = found.get(self.choices), found.get(self.answer)
        if not _texts(choices) or len(choices) < 2 or not all(choices):
            raise self._bad(number, f"{self.choices}: two texts or more, none of them empty", repr(choices))
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise self._bad(number, f"{self.answer}: a number from 0 to {len(choices) - 1}", repr(answer))
        return Row(prompt, (choices[answer],), tuple(choices))

    def _bad(self, number: int, expected: str, got: str) -> RegroupError:
        return RegroupError(
            "a line of the task's data is not a row of this task",
            file=self.data,
            expected=expected,
            got=f"line {number}: {got[:200]}",
        )


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(read_once(path).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RegroupError("the task cannot be read", file=path, got=str(error)[:200]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RegroupError("the task is not valid YAML", file=path, got=" ".join(str(error).split())[:200]) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RegroupError("the task is not a table of settings", file=path, expected="lines such as: data: dev.jsonl")
    return value


def _checked(path: Path, key: str, value: Any) -> Any:
    if value is None and key in ("choices", "limit", "max_source_tokens", "source_language", "target_language"):
        return None
    if key in ("max_new_tokens", "max_source_tokens", "limit"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _refused(path, key, "a number above 0", got=repr(value))
        return value
    if key in ("metrics", "stop"):
        found = [value] if isinstance(value, str) else value
        if not _texts(found) or not all(found) or len(set(found)) < len(found):
            raise _refused(path, key, "a list of different texts", got=repr(value))
        return tuple(text.replace("-", "_") for text in found) if key == "metrics" else tuple(found)
    if not isinstance(value, str) or not value:
        raise _refused(path, key, "a text", got=repr(value))
    if key == "prompt":
        try:
            named = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
        except ValueError as error:
            raise _refused(path, key, "a format string such as 'Translate: {source}'", got=str(error)) from None
        if not named or not all(name.isidentifier() for name in named):
            raise _refused(path, key, "names of fields in braces, such as {source}; {{ for a brace", got=repr(value))
    return value


def _refused(path: Path, key: str, expected: str, got: str = "nothing that can be used") -> RegroupError:
    return RegroupError(
        "the task's file has a setting that cannot be used",
        file=path,
        expected=f"{key.replace('_', '-')}: {expected}",
        got=got,
    )
