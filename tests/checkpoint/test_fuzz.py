"""Checkpoints and plans made by somebody who means harm, or by a broken disk: refused in words, or converted whole.

Whatever is changed, wherever: RegroupError is the only exception, nothing appears outside the destination, and memory
stays within what the files themselves could ask for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import regroup
from helpers import INDEX, config_of, copy, everything, layout_of, scattered, tensors, write
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint
from regroup.inspection import inspect
from regroup.plans import make_plan

Saved = Callable[[str], Path]
FAMILIES = ("llama", "gpt2", "t5", "stablelm_norm", "bart")
SHARD = "model-00002-of-00004.safetensors"

HUGE = (2**31, 2**53, 2**63, 2**64, 10**12, 10**30, 10**400)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from(HUGE),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["../../outside", "/etc/passwd", "a\0b", "x" * 5000, "\ud800", "F32", "BF16", "llama", "t5"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value, itself first."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from places(item, (*path, key))


def changed(value: Any, data: st.DataObject, times: int = 2) -> Any:
    """A JSON value with values, keys or whole parts replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, times))):
        spots = list(places(value))
        path = data.draw(st.sampled_from(spots))
        if not path:
            if data.draw(st.integers(0, 9)) == 0:
                return data.draw(VALUES)
            if isinstance(value, dict):
                value[data.draw(st.text(max_size=5))] = data.draw(VALUES)
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if how == "replace":
            holder[path[-1]] = data.draw(VALUES)
        elif how == "remove" or isinstance(holder, list):
            del holder[path[-1]]
        else:
            holder[data.draw(st.text(max_size=5))] = holder.pop(path[-1])
    return value


def spelled(value: Any, data: st.DataObject) -> bytes:
    """JSON text, now and then with a byte that is not as it should be."""
    text = bytearray(json.dumps(value).encode())
    if text and data.draw(st.integers(0, 5)) == 0:
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + 1] = data.draw(st.binary(max_size=3))
    return bytes(text)


def put_header(path: Path, header: bytes) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def header_of(path: Path) -> Any:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def attempt(root: Path, source: Path, **options: Any) -> None:
    """Inspect and convert: each succeeds or raises RegroupError, and nothing appears but the destination."""
    before = everything(root)
    options = options or {"kv_heads": 1, "method": "mean"}
    with contextlib.suppress(RegroupError):
        inspect(str(source))
    with contextlib.suppress(RegroupError):
        regroup.convert(source, root / "converted", **options)
    after = [name for name in everything(root) if name.split("/")[0] != "converted"]
    assert after == before
    if (root / "converted").exists():
        assert (root / "converted" / "config.json").exists()
        layout_of(root / "converted")


# Finding why a case fails takes longer than the cases.
COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
}
SIZES = [settings(max_examples=60, **COMMON), settings(max_examples=3000, **COMMON)]


def fuzzed(check: Callable[..., None], size: settings) -> None:
    size(given(data=st.data())(check))()


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files take long on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(params=[SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)], ids=["short", "long"])
def size(request: pytest.FixtureRequest) -> settings:
    return request.param


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Path, Path]]:
    """Makes a root with a copy of a source in it."""

    def make(source: Path) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("fuzz")
        return root, copy(source, root / "parent")

    return make


@pytest.fixture(scope="module")
def sharded(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tensors(saved("llama"))
    return write(
        tmp_path_factory.mktemp("sharded") / "parent", config_of(saved("llama")), state, shards=scattered(list(state))
    )


def test_configs(saved: Saved, fresh: Callable[[Path], tuple[Path, Path]], size: settings) -> None:
    def check(data: st.DataObject) -> None:
        root, original = fresh(saved(data.draw(st.sampled_from(FAMILIES))))
        (original / "config.json").write_bytes(spelled(changed(config_of(original), data), data))
        attempt(root, original)

    fuzzed(check, size)


def test_configs_without_weights(saved: Saved, tmp_path: Path, size: settings) -> None:
    """What nothing contradicts."""

    def check(data: st.DataObject) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(spelled(changed(config_of(saved(data.draw(st.sampled_from(FAMILIES)))), data), data))
        with contextlib.suppress(RegroupError):
            inspect(str(path)).to_json([1], context=8, batch=1, encoder_context=None)

    fuzzed(check, size)


def test_indexes(sharded: Path, fresh: Callable[[Path], tuple[Path, Path]], size: settings) -> None:
    def check(data: st.DataObject) -> None:
        root, original = fresh(sharded)
        (original / INDEX).write_bytes(spelled(changed(json.loads((original / INDEX).read_text()), data), data))
        attempt(root, original)

    fuzzed(check, size)


def test_headers(sharded: Path, fresh: Callable[[Path], tuple[Path, Path]], size: settings) -> None:
    def check(data: st.DataObject) -> None:
        root, original = fresh(sharded)
        put_header(original / SHARD, spelled(changed(header_of(original / SHARD), data), data))
        attempt(root, original)

    fuzzed(check, size)


def test_plans(saved: Saved, fresh: Callable[[Path], tuple[Path, Path]], size: settings) -> None:
    def check(data: st.DataObject) -> None:
        root, original = fresh(saved(data.draw(st.sampled_from(FAMILIES))))
        method = data.draw(st.sampled_from(["mean", "random"]))
        text = make_plan(layout_of(original), 1, method=method).dumps()
        (root / "plan.json").write_bytes(spelled(changed(json.loads(text), data), data))
        attempt(root, original, plan=root / "plan.json")

    fuzzed(check, size)


HOSTILE = """
import resource, sys
from pathlib import Path
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint, read_header
from regroup.checkpoint import header
from regroup import files

# A fifth of the limits, for a fifth of the time.
room = header.MAX_HEADER_BYTES // 5
files.MAX_JSON_ITEMS //= 5

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, before = Path(sys.argv[1]) / "x.safetensors", peak()
for body in (
    b'{"a":[' + b"[]," * (room // 3) + b"[]]}",
    b'{"a":[' + b"999," * (room // 4) + b"9]}",
    b'{"a":' + b'{"a":' * (room // 6) + b"1" + b"}" * (room // 6) + b"}",
    b'{"' + b"x" * room + b'":{"dtype":"F33"}}',
    b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,9223372036854775807]}}',
):
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    try:
        read_header(path)
    except RegroupError as error:
        assert len(str(error)) < 9000, len(str(error))
        print("refused")
print((peak() - before) / room)
"""


def test_memory_of_hostile_headers(tmp_path: Path) -> None:
    """Lists, numbers and nesting that take far more memory than bytes; a name of a hundred megabytes; immense sizes."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    *refusals, times = done.stdout.split()
    assert refusals == ["refused"] * 5
    # The bytes, their text and the name in it; a list of empty lists would be twenty times the header.
    assert float(times) < 7


def test_a_tensor_that_is_mostly_a_hole(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can announce, and have, a size that no memory holds, and take no room on the disk."""
    original = copy(saved("llama"), tmp_path / "parent")
    config, state = config_of(original), tensors(original)
    name = "model.layers.0.self_attn.k_proj.weight"
    hidden = 2**30
    # A machine with 4 GB, wherever the test runs.
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**20}.__getitem__)
    header = header_of(original / "model.safetensors")
    position = 0
    for tensor in sorted((key for key in header if key != "__metadata__"), key=lambda k: header[k]["data_offsets"]):
        rows = state[tensor].shape[0]
        shape = [rows, hidden] if tensor.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else None
        shape = [hidden, state[tensor].shape[1]] if tensor.endswith("o_proj.weight") else shape
        shape = list(state[tensor].shape) if shape is None else shape
        size = 4 * int(np.prod(shape, dtype=object))
        header[tensor] |= {"shape": shape, "data_offsets": [position, position + size]}
        position += size
    body = json.dumps(header).encode()
    with (original / "model.safetensors").open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        try:
            file.truncate(8 + len(body) + position)
        except OSError:
            pytest.skip("the file system has no files of this size")
    (original / "config.json").write_text(json.dumps(config | {"hidden_size": hidden}))
    with pytest.raises(RegroupError, match="does not fit into memory") as error:
        open_checkpoint(original).read(name)
    assert name in str(error.value)
    attempt(tmp_path, original)
