"""Progress of an export, and its memory."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import regroup
import tiny
from helpers import everything, refused, run, tensors
from regroup import devices
from regroup.exports import check, llama_cpp
from regroup.listener import Listener

Converted = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own memory is another process's."""
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)


class Recorder(Listener):
    """Records each callback, and the files next to the destination at that time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, everything(folder)
        self.ahead: list[int] = []
        self.total = self.written = self.answers = 0

    def comparison_ahead(self, nbytes: int) -> None:
        assert everything(self.folder) == self.before
        self.ahead.append(nbytes)

    @contextlib.contextmanager
    def writing(self, nbytes: int) -> Iterator[Callable[[int], None]]:
        def count(part: int) -> None:
            self.written += part

        self.total += nbytes
        yield count

    @contextlib.contextmanager
    def comparing(self) -> Iterator[Callable[[int], None]]:
        def count(part: int) -> None:
            self.answers += part

        yield count


@pytest.mark.parametrize(
    ("kind", "to", "options"),
    [
        ("some", "hf", {}),
        ("mixed", "hf", {"expand": True}),
        ("mixed", "vllm", {}),
        ("some", "gguf", {}),
        ("some", "gguf", {"dtype": "bfloat16"}),
    ],
)
def test_an_export_reports_its_progress(
    kind: str, to: str, options: dict[str, Any], converted: Converted, tmp_path: Path
) -> None:
    target = tmp_path / ("m.gguf" if to == "gguf" else "out")
    recorded, silent = Recorder(tmp_path), Recorder(tmp_path)
    source = converted("llama", kind)
    regroup.export(source, target, to=to, listener=recorded, **options)
    state = tensors(source if to == "gguf" else target).values()
    size = torch.bfloat16.itemsize if "dtype" in options else 4
    # Vectors of a GGUF file stay in float32.
    assert recorded.total == recorded.written == sum(t.numel() * (size if t.ndim > 1 else 4) for t in state)
    rows = check.ROWS * check.LENGTH
    assert recorded.ahead == [4 * (sum(t.numel() for t in state) + 3 * rows * tiny.VOCAB_SIZE)]
    assert recorded.answers == 2

    target = target.with_name(f"unchecked{target.suffix}")
    silent.before = everything(tmp_path)
    regroup.export(source, target, to=to, check=False, listener=silent, **options)
    assert (silent.ahead, silent.answers, silent.written) == ([], 0, recorded.written)


def test_the_command_says_what_a_comparison_takes(converted: Converted, tmp_path: Path) -> None:
    for to, name in (("hf", "out"), ("gguf", "m.gguf")):
        message = run("export", converted("llama", "some"), tmp_path / name, "--to", to)[2]
        assert "source and result are compared afterwards, one at a time, using about " in message
        # transformers' own bars would lie across ours.
        assert "Loading weights" not in message
    message = run("export", converted("llama", "some"), tmp_path / "other", "--to", "hf", "--no-check")[2]
    assert "compared" not in message


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("gguf", "m.gguf")])
def test_what_does_not_fit_is_refused_before_it_is_written(
    to: str, name: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = converted("llama", "some")
    needed = 4 * (sum(t.numel() for t in tensors(source).values()) + 3 * check.ROWS * check.LENGTH * tiny.VOCAB_SIZE)
    monkeypatch.setattr(devices, "free_memory", lambda device: int(needed / devices.USABLE) - 1)
    message = refused("export", source, tmp_path / name, "--to", to)
    assert "does not fit into memory" in message
    assert "--no-check" in message
    assert everything(tmp_path) == []
    assert run("export", source, tmp_path / f"unchecked-{name}", "--to", to, "--no-check")[0] == 0
    for enough in (int(needed / devices.USABLE) + 1, None):
        monkeypatch.setattr(devices, "free_memory", lambda device, enough=enough: enough)
        assert run("export", source, tmp_path / f"{enough}-{name}", "--to", to)[0] == 0


def test_a_file_that_does_not_fit_is_refused(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor at a time is in memory."""
    assert run("export", converted("llama", "some"), tmp_path / "m.gguf", "--to", "gguf", "--no-check")[0] == 0
    largest = max(tensor.numel() for tensor in tensors(converted("llama", "some")).values())
    monkeypatch.setattr(devices, "free_memory", lambda device: largest * 12)
    message = refused("export", tmp_path / "m.gguf", tmp_path / "out", "--to", "hf", "--no-check")
    assert "a tensor of this GGUF file does not fit into memory" in message
    assert everything(tmp_path) == ["m.gguf"]
    monkeypatch.setattr(devices, "free_memory", lambda device: largest * 15)
    assert run("export", tmp_path / "m.gguf", tmp_path / "out", "--to", "hf", "--no-check")[0] == 0
    shutil.rmtree(tmp_path / "out")
    assert everything(tmp_path) == ["m.gguf"]


def test_models_are_in_memory_one_at_a_time(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    loaded: list[int] = []
    right = transformers.PreTrainedModel.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def load(cls: Any, *arguments: Any, **options: Any) -> Any:
        if arguments[0] is None:  # on the meta device, from headers
            return right(cls, *arguments, **options)
        loaded.append(len(alive))
        model = right(cls, *arguments, **options)
        alive.add(model[0] if isinstance(model, tuple) else model)
        return model

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(load))
    source = converted("llama", "some")
    for given, name, to in ((source, "out", "hf"), (source, "m.gguf", "gguf"), (tmp_path / "m.gguf", "back", "hf")):
        regroup.export(given, tmp_path / name, to=to)
    assert loaded == [0] * 6
    # Two that are kept would be seen.
    kept = [regroup.load(tmp_path / name) for name in ("out", "back")]
    assert loaded[6:] == [0, 1]
    del kept
