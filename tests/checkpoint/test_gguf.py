"""GGUF headers as damage and malice leave them: refused, or read as they are, without a traceback."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import refused, run
from regroup import RegroupError, inspect
from regroup.checkpoint import read_gguf

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
HEADS, GROUPS, WIDTH, INNER, ROWS, BLOCKS = 4, 2, 16, 24, 20, 2


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> tuple[str, bytes]:
    return key, pair(key, U32, struct.pack("<I", value & 0xFFFFFFFF))


def facts(**changes: bytes | None) -> dict[str, bytes]:
    """The metadata of a tiny model, each pair as its bytes."""
    numbers = {
        "llama.block_count": BLOCKS,
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS,
    }
    found = {"general.architecture": pair("general.architecture", STRING, text("llama"))}
    found |= dict(u32(key, value) for key, value in numbers.items())
    eps = "llama.attention.layer_norm_rms_epsilon"
    found[eps] = pair(eps, F32, struct.pack("<f", 1e-5))
    for key, value in changes.items():
        if value is None:
            del found[key]
        else:
            found[key] = value
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor, as torch has them."""
    kv = WIDTH // HEADS * GROUPS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, WIDTH), "output_norm.weight": (WIDTH,)}
    return found | {f"blk.{i}.{name}.weight": shape for i in range(BLOCKS) for name, shape in layer.items()}


def built(
    pairs: list[bytes],
    tensors: dict[str, tuple[int, ...]] | None = None,
    *,
    keys: int | None = None,
    count: int | None = None,
    kinds: dict[str, int] | None = None,
    offsets: dict[str, int] | None = None,
) -> bytes:
    """A GGUF file, byte by byte, without the library that reads and writes them."""
    tensors = shapes() if tensors is None else tensors
    head = b"GGUF" + struct.pack(
        "<IQQ", 3, len(tensors) if count is None else count, len(pairs) if keys is None else keys
    )
    head += b"".join(pairs)
    data, at = b"", 0
    noise = np.random.default_rng(0)
    for name, shape in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", (kinds or {}).get(name, 0), (offsets or {}).get(name, at))
        raw = noise.normal(size=int(np.prod(shape, dtype=object)) % 10**6).astype("<f4").tobytes()
        raw += b"\0" * (-len(raw) % 32)
        data, at = data + raw, at + len(raw)
    return head + b"\0" * (-len(head) % 32) + data


def whole() -> bytes:
    return built(list(facts().values()))


@pytest.fixture
def made(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "x.gguf").write_bytes(content)
        return tmp_path / "x.gguf"

    return write


def test_what_is_read_is_what_the_library_reads(made: Callable[[bytes], Path]) -> None:
    path = made(whole())
    own, reader = read_gguf(path), gguf.GGUFReader(str(path))
    assert own.values == {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }
    assert list(own.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert own.read(tensor.name).numpy().tobytes() == np.array(tensor.data).tobytes()
        assert own.tensors[tensor.name].offset == tensor.data_offset
    assert own.parameters == sum(int(np.prod(shape)) for shape in shapes().values())
    assert [layer.num_key_value_heads for layer in inspect(str(path)).layers] == [GROUPS] * BLOCKS
    assert run("export", path, path.parent / "out", "--to", "hf", "--no-check")[0] == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16", "BF16"])
def test_blocks_are_unpacked_as_the_library_does(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x.gguf").read("a")
    assert found.shape == (6, 64)
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert torch.equal(found.float(), torch.from_numpy(np.array(wanted)))
    assert float((found.float() - torch.from_numpy(values)).abs().max()) < 0.5


def listed(key: str, inner: int, count: int, raw: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", inner, count) + raw)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "no KV heads": (built([*facts(**dict([u32("llama.attention.head_count_kv", 0)])).values()]), "head"),
    "2^31 blocks": (built([*facts(**dict([u32("llama.block_count", 2**31)])).values()]), "block_count"),
    "2^31 - 1 blocks": (built([*facts(**dict([u32("llama.block_count", 2**31 - 1)])).values()]), "block_count"),
    "fewer blocks than tensors": (built([*facts(**dict([u32("llama.block_count", 1)])).values()]), "layers"),
    "more blocks than tensors": (built([*facts(**dict([u32("llama.block_count", 3)])).values()]), "layer"),
    "heads that do not divide": (built([*facts(**dict([u32("llama.attention.head_count_kv", 3)])).values()]), "divide"),
    "no heads": (built([*facts(**dict([u32("llama.attention.head_count", 0)])).values()]), "head"),
    "2^32 - 1 heads": (built([*facts(**dict([u32("llama.attention.head_count", 2**32 - 1)])).values()]), "head_count"),
    "other KV heads than tensors": (
        built([*facts(**dict([u32("llama.attention.head_count_kv", 4)])).values()]),
        "another",
    ),
    "no width": (built([*facts(**dict([u32("llama.embedding_length", 0)])).values()]), "embedding_length"),
    "a key twice": (built([*facts().values(), facts()["llama.block_count"]]), "twice"),
    "a tensor twice": (built([*facts().values()]).replace(b"blk.1.attn_q.", b"blk.0.attn_q."), "twice"),
    "a key that is no UTF-8": (built([*facts().values(), text(b"\xff\xfe") + struct.pack("<II", U32, 1)]), "UTF-8"),
    "an architecture that is no UTF-8": (
        built([*facts(**{"general.architecture": pair("general.architecture", STRING, text(b"\xc3("))}).values()]),
        "UTF-8",
    ),
    "an architecture that is a number": (
        built([*facts(**{"general.architecture": pair("general.architecture", U32, b"\1\0\0\0")}).values()]),
        "architecture",
    ),
    "a list longer than the file": (built([*facts().values(), listed("x", U8, 2**60)]), "more"),
    "a list of 2^62 strings": (built([*facts().values(), listed("tokenizer.ggml.tokens", STRING, 2**62)]), "more"),
    "a string longer than the file": (built([*facts().values(), pair("x", STRING, struct.pack("<Q", 2**63))]), "more"),
    "lists within lists": (
        built([*facts().values(), pair("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50 + struct.pack("<IQ", U8, 0))]),
        "unknown type",
    ),
    "an unknown type": (built([*facts().values(), pair("x", 99, b"")]), "unknown type"),
    "a truth of 7": (built([*facts().values(), pair("x", BOOL, b"\7")]), "0 or 1"),
    "2^63 keys": (built([*facts().values()], keys=2**63), "keys"),
    "2^63 tensors": (built([*facts().values()], count=2**63), "tensors"),
    "an alignment of 0": (
        built([*facts().values(), dict([u32("general.alignment", 0)])["general.alignment"]]),
        "power",
    ),
    "an alignment of 48": (
        built([*facts().values(), dict([u32("general.alignment", 48)])["general.alignment"]]),
        "power",
    ),
    "a tensor beyond the end": (built([*facts().values()], offsets={"blk.0.attn_q.weight": 2**40}), "shorter"),
    "tensors in one place": (built([*facts().values()], offsets={"blk.0.attn_q.weight": 0}), "place"),
    "an unknown kind of tensor": (built([*facts().values()], kinds={"blk.0.attn_q.weight": 200}), "type 200"),
    "a shape of 2^60": (built([*facts().values()], {**shapes(), "token_embd.weight": (2**60, WIDTH)}), "shorter"),
    "a shape of 0": (built([*facts().values()], {**shapes(), "token_embd.weight": (0, WIDTH)}), "shape"),
    "part of a split file": (
        built([*facts().values(), dict([u32("split.count", 3)])["split.count"]]),
        "llama-gguf-split",
    ),
    "version 1": (whole()[:4] + struct.pack("<I", 1) + whole()[8:], "version"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_everywhere(name: str, made: Callable[[bytes], Path]) -> None:
    content, word = HOSTILE[name]
    path = made(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(RegroupError):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = refused("inspect", path)
    exported = refused("export", path, path.parent / "out", "--to", "hf", "--no-check")
    assert word in message
    assert "x.gguf" in message
    assert "error:" in exported
    assert peak < 20_000_000
    assert [file.name for file in path.parent.iterdir()] == ["x.gguf"]


def test_a_pipe_is_no_gguf_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    assert "a pipe and not a file" in refused("inspect", tmp_path / "x.gguf")
    assert "a pipe and not a file" in refused("export", tmp_path / "x.gguf", tmp_path / "out", "--to", "hf")


def test_every_cut_is_refused(made: Callable[[bytes], Path]) -> None:
    content = whole()
    for length in [*range(0, 600, 7), *range(600, len(content), 211), len(content) - 33]:
        with pytest.raises(RegroupError):
            read_gguf(made(content[:length]))
    read_gguf(made(content))


@functools.cache
def _true() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.gguf").write_bytes(whole())
        return inspect(str(Path(folder) / "x.gguf"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(whole()) - sum(4 * int(np.prod(s)) for s in shapes().values())),
            st.binary(min_size=1, max_size=9),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_bytes_never_give_other_figures(damage: list[tuple[int, bytes]]) -> None:
    """Bytes of the header are replaced: a refusal, or a summary whose every figure the tensors bear out."""
    content = bytearray(whole())
    for at, new in damage:
        content[at : at + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(bytes(content))
        try:
            found = inspect(str(path))
        except RegroupError:
            return
        true = _true()
        assert len(found.layers) == len(true.layers)
        assert found.parameters == true.parameters or set(read_gguf(path).tensors) != set(shapes())
        for layer in found.layers:
            assert layer.num_attention_heads % layer.num_key_value_heads == 0
            keys = read_gguf(path).tensors.get(f"{layer.name}.attn_k.weight")
            assert keys is None or keys.shape[0] == layer.num_key_value_heads * layer.head_dim


NUMBERS = st.one_of(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 20, 24, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(sorted(key for key in facts() if key.startswith("llama."))), NUMBERS, min_size=1, max_size=3
    )
)
def test_other_numbers_never_give_another_model(numbers: dict[str, int]) -> None:
    """An export of the file with other numbers is refused, or the model is the one whose tensors are in the file."""
    changes = dict(u32(key, value) for key, value in numbers.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(built([*facts(**changes).values()]))
        status, _, message = run("export", path, Path(folder) / "out", "--to", "hf", "--no-check")
        assert status in (0, 2), message
        assert "Traceback" not in message
        if status == 0:
            config = json.loads((Path(folder) / "out" / "config.json").read_text())
            heads = numbers.get("llama.attention.head_count", HEADS)
            assert config["num_hidden_layers"] == BLOCKS
            assert (config["hidden_size"], config["intermediate_size"]) == (WIDTH, INNER)
            assert config["num_attention_heads"] == heads
            assert heads * config["head_dim"] == WIDTH
            assert config["num_key_value_heads"] * config["head_dim"] == WIDTH // HEADS * GROUPS
            assert config["max_position_embeddings"] == numbers.get("llama.context_length", 64)
        else:
            assert not (Path(folder) / "out").exists()
