"""Every way a checkpoint folder can be broken: refused with a message that says where, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import regroup
from helpers import (
    INDEX,
    config_of,
    copy,
    edit_json,
    everything,
    refused,
    scattered,
    tensors,
    write,
)
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint, read_header
from regroup.checkpoint.header import encode_header
from regroup.conversion.convert import carry_out
from regroup.opening import Source
from regroup.writer.preview import prepare

Saved = Callable[[str], Path]
SHARD = "model-00002-of-00004.safetensors"
KEY = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def original(saved: Saved, tmp_path: Path) -> Path:
    """A Llama in four shards, to be broken."""
    state = tensors(saved("llama"))
    return write(tmp_path / "original", config_of(saved("llama")), state, shards=scattered(list(state)))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_header(path: Path, header: object, data: bytes) -> None:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)


def edit_header(change: Callable[[dict[str, Any], list[str]], object]) -> Callable[[Path], None]:
    """Damage that changes the header of one shard; ``change`` gets it and its tensor names in order."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / SHARD)
        names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        change(header, names)
        put_header(folder / SHARD, header, data)

    return damage


def rename_in_index(target: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=weight_map | {KEY: target})

    return damage


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Damage that changes tensors and leaves a sound single file."""

    def damage(folder: Path) -> None:
        state, config = tensors(folder), config_of(folder)
        for path in [*folder.glob("*.safetensors"), folder / INDEX]:
            path.unlink()
        change(state)
        write(folder, config, state)

    return damage


def raw(edit: Callable[[bytes], bytes], name: str = SHARD) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def shift(header: dict[str, Any], names: list[str], by: int) -> None:
    header[names[1]]["data_offsets"] = [x + by for x in header[names[1]]["data_offsets"]]


def gap(folder: Path) -> None:
    """Four unused bytes before the last tensor, in a file of the right length."""
    header, data = header_of(folder / SHARD)
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    put_header(folder / SHARD, header, data + bytes(4))


@dataclass(frozen=True)
class Case:
    name: str
    damage: Callable[[Path], object]
    words: tuple[str, ...]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CASES = [
    Case("missing shard", lambda f: (f / SHARD).unlink(), (SHARD, "a shard of the checkpoint is missing", "remedy:")),
    Case("truncated shard", raw(lambda b: b[:-5]), (SHARD, "truncated", "expected:", "got:", "remedy:")),
    Case("trailing bytes", raw(lambda b: b + b"x"), (SHARD, "trailing", "expected:", "got:", "remedy:")),
    Case("empty shard", raw(lambda b: b""), (SHARD, "not a complete safetensors file", "remedy:")),
    Case("Git LFS pointer", raw(lambda b: LFS), (SHARD, "Git LFS pointer", "git lfs pull")),
    Case("header length huge", raw(lambda b: b"\xff" * 8 + b[8:]), (SHARD, "header of 18446744073709551615 bytes")),
    Case("header past the end", raw(lambda b: len(b).to_bytes(8, "little") + b[8:]), (SHARD, "expected:", "got:")),
    Case("header not JSON", raw(lambda b: b[:8] + b"}" + b[9:]), (SHARD, "header that is not JSON")),
    Case("header in UTF-16", lambda f: put_header(f / SHARD, "{}".encode("utf-16"), b""), (SHARD, "is not JSON")),
    Case("header a list", lambda f: put_header(f / SHARD, [], b""), (SHARD, "not a JSON object")),
    Case("header nested", lambda f: put_header(f / SHARD, b"[" * 100_000, b""), (SHARD, "not JSON")),
    Case(
        "header with a negative zero",
        lambda f: (f / SHARD).write_bytes(
            (body := b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,-0]}}')
            and len(body).to_bytes(8, "little") + body
        ),
        (SHARD, "header that is not JSON"),
    ),
    Case("header entry null", edit_header(lambda h, n: h.update({n[0]: None})), (SHARD, "malformed", "tensor:")),
    Case("metadata not text", edit_header(lambda h, n: h.update(__metadata__={"a": 1})), (SHARD, "metadata")),
    Case("overlapping tensors", edit_header(lambda h, n: shift(h, n, -4)), (SHARD, "overlap", "tensor:", "expected:")),
    Case("gap between tensors", gap, (SHARD, "leave a gap", "tensor:", "expected: data from byte", "remedy:")),
    Case(
        "negative offsets",
        edit_header(lambda h, n: h[n[0]].update(data_offsets=[-8, -4])),
        (SHARD, "malformed", "tensor:"),
    ),
    Case("unknown dtype", edit_header(lambda h, n: h[n[0]].update(dtype="F33")), (SHARD, "F33", "tensor:", "BF16")),
    Case("dtype of another size", edit_header(lambda h, n: h[n[0]].update(dtype="F16")), (SHARD, "byte range", "F16")),
    Case("shape too large", edit_header(lambda h, n: h[n[0]].update(shape=[10**9, 10**9])), (SHARD, "byte range")),
    Case("shape immense", edit_header(lambda h, n: h[n[0]].update(shape=[10**4000] * 2)), (SHARD, "tensor:")),
    Case("shape of floats", edit_header(lambda h, n: h[n[0]].update(shape=[1.5])), (SHARD, "malformed")),
    Case(
        "name not Unicode",
        edit_header(lambda h, n: h.update({"\ud800": h.pop(n[-1])})),
        (SHARD, "not a complete safetensors file"),
    ),
    Case("index not JSON", lambda f: (f / INDEX).write_text("{"), (INDEX, "not valid JSON")),
    Case("index a list", lambda f: (f / INDEX).write_text("[]"), (INDEX, "object")),
    Case("index without map", lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight map", "expected:")),
    Case(
        "index names an absent tensor",
        lambda f: edit_json(
            f / INDEX, weight_map=json.loads((f / INDEX).read_text())["weight_map"] | {"model.ghost": SHARD}
        ),
        (INDEX, "tensor: model.ghost", f"in {SHARD}", "remedy:"),
    ),
    Case(
        "index forgets a tensor",
        lambda f: edit_json(
            f / INDEX,
            weight_map={k: v for k, v in json.loads((f / INDEX).read_text())["weight_map"].items() if k != KEY},
        ),
        (f"tensor: {KEY}", "in the index", "remedy:"),
    ),
    Case("index mistakes a file", rename_in_index("model-00003-of-00004.safetensors"), (INDEX, KEY, "expected:")),
    *(
        Case(f"index names {path!r}", rename_in_index(path), (INDEX, f"tensor: {KEY}", "plain name", "remedy:"))
        for path in (
            *("../other/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "model.bin", ""),
            *(".hidden.safetensors", 7, None, ["x.safetensors"]),
        )
    ),
    Case("index names a file with a NUL", rename_in_index("a\0.safetensors"), ("a\\x00.safetensors", "outside")),
    Case("index names a long file", rename_in_index("a" * 999 + ".safetensors"), ("too long",)),
    Case("no config", lambda f: (f / "config.json").unlink(), ("config.json", "cannot be read")),
    Case("config not JSON", lambda f: (f / "config.json").write_text("{'a': 1}"), ("config.json", "not valid JSON")),
    Case("config not UTF-8", lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), ("config.json",)),
    Case("config a list", lambda f: (f / "config.json").write_text("[]"), ("config.json", "expected:", "got:")),
    Case(
        "unknown family",
        configured(model_type="mamba"),
        ("'mamba'", "llama", "expected:", "got:", "remedy:", "state-space"),
    ),
    Case("no family", configured(model_type=None), ("not known", "remedy:")),
    Case("family not text", configured(model_type=["llama"]), ("not known", "got:")),
    Case(
        "quantised", configured(quantization_config={"quant_method": "gptq"}), ("quantised", "unquantised checkpoint")
    ),
    *(
        Case(
            f"weights in {dtype}",
            rewritten(lambda s, dtype=dtype: s.update({KEY: s[KEY].to(dtype)})),
            ("quantised", f"tensor: {KEY}", "BF16", "got:", "unquantised checkpoint"),
        )
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)
    ),
    Case(
        "LoRA beside the weights",
        rewritten(lambda s: s.update({KEY.replace("weight", "lora_A.default.weight"): torch.ones(2, 48)})),
        ("lora_A", "not merged", "got:", "merge_and_unload"),
    ),
    Case(
        "GPTQ names",
        rewritten(lambda s: s.update({KEY.replace("weight", "qweight"): torch.ones(2, 48, dtype=torch.int32)})),
        ("qweight", "GPTQ", "unquantised checkpoint"),
    ),
    Case("more layers than the config", configured(num_hidden_layers=2), ("more layers", "tensor:", "2 layers")),
    Case("fewer layers than the config", configured(num_hidden_layers=4), ("missing", "layers.3", "4 layers")),
    Case("missing key", rewritten(lambda s: s.pop(KEY)), ("missing", f"tensor: {KEY}", "layer:", "remedy:")),
    Case("missing output", rewritten(lambda s: s.pop(KEY.replace("k_", "o_"))), ("missing", "o_proj", "remedy:")),
    Case(
        "weights of another model",
        rewritten(lambda s: [s.pop(k) for k in list(s) if "layers" in k]),
        ("no attention layer", "got:", "remedy:"),
    ),
    *(
        Case(
            f"{part} of shape {list(shape)}",
            rewritten(
                lambda s, part=part, shape=shape: s.update({KEY.replace("k_proj", f"{part}_proj"): torch.ones(shape)})
            ),
            (f"{part}_proj.weight", "layer: model.layers.0.self_attn", "expected:", f"{list(shape)}", "remedy:"),
        )
        for part, shape in [
            *((part, shape) for part in "qkvo" for shape in ((), (60,), (59, 48), (60, 48, 1))),
            *(("q", (50, 48)), ("q", (60, 47)), ("k", (40, 48)), ("k", (60, 47)), ("v", (50, 48)), ("o", (60, 48))),
            *(("k", (0, 48)), ("k", (660, 48))),
        ]
    ),
    Case("heads do not divide", configured(num_key_value_heads=4), ("divisor of 6", "got:", "layer:")),
    Case("config of another G", configured(num_key_value_heads=3), ("3 KV heads of 10", "shape [60, 48]", "remedy:")),
    *(
        Case(f"config with {key}={value!r}", configured(**{key: value}), (key, "got:"))
        for key in ("num_attention_heads", "num_hidden_layers", "hidden_size", "head_dim")
        for value in (0, -1, 2.5, "8", True, [4], 10**30 if key != "num_hidden_layers" else 0)
        if not (value == 10**30 and key in ("num_attention_heads", "hidden_size", "head_dim"))
    ),
    Case(
        "table of another format",
        configured(regroup={"format": 9, "num_key_value_heads": {}}),
        ("table of KV heads", "upgrade"),
    ),
    Case("table not a table", configured(regroup=[1]), ("table of KV heads", "got:")),
    *(
        Case(f"rotary share {value!r}", configured(partial_rotary_factor=value), ("partial_rotary_factor", "got:"))
        for value in (float("inf"), float("nan"), -0.5, 3)
    ),
    Case("initializer range null-like", configured(initializer_range="x"), ("initializer_range", "got:")),
    Case("no weights", lambda f: [p.unlink() for p in f.glob("model*")], ("no weights", "expected:")),
    Case("shards without index", lambda f: (f / INDEX).unlink(), ("model-00001", "index file is needed")),
    Case(
        "link out of the folder",
        lambda f: (f / "tokenizer.json").symlink_to("/etc/hostname"),
        ("tokenizer.json", "/etc/hostname", "expected:", "remedy:"),
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_damage_is_refused(case: Case, original: Path, tmp_path: Path) -> None:
    case.damage(original)
    before = everything(tmp_path)
    with pytest.raises(RegroupError) as error:
        regroup.convert(original, tmp_path / "converted", kv_heads=2, calibration="none")
    message = refused("convert", original, tmp_path / "converted", "--kv-heads", 2, "--calibration", "none")
    for text in (str(error.value), message):
        flat = " ".join(text.split())
        assert [word for word in case.words if word not in flat] == [], text
    assert everything(tmp_path) == before


def test_the_sound_checkpoint_is_accepted(original: Path, tmp_path: Path) -> None:
    rewritten(lambda state: None)(copy(original, tmp_path / "whole"))
    for source in (original, tmp_path / "whole"):
        regroup.convert(source, tmp_path / f"{source.name}-converted", kv_heads=2, calibration="none")


def test_a_file_that_shrinks_while_it_is_read(original: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(original)
    layout = regroup.detect(checkpoint.config, checkpoint.tensors)
    opened = Source("original", original, checkpoint, layout)
    prepared = prepare(checkpoint, layout, regroup.make_plan(layout, 2))
    for number, name in enumerate((SHARD, "model-00001-of-00004.safetensors")):
        (original / name).write_bytes((original / name).read_bytes()[:2000])
        with pytest.raises(RegroupError, match="became shorter"):
            carry_out(opened, prepared, tmp_path / f"converted{number}")
        assert not list(tmp_path.glob("*converted*"))


def test_links_within_a_hub_cache_are_followed(saved: Saved, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(saved("llama").iterdir())):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    regroup.convert(snapshot, tmp_path / "converted", kv_heads=2, calibration="none")
    converted = [path for path in (tmp_path / "converted").iterdir() if path.is_symlink()]
    assert converted == []
    assert (tmp_path / "converted" / "generation_config.json").read_bytes() == (
        saved("llama") / "generation_config.json"
    ).read_bytes()
    (snapshot / "note.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "outside.txt").write_text("secret")
    with pytest.raises(RegroupError, match="points out of it"):
        regroup.convert(snapshot, tmp_path / "child2", kv_heads=2, calibration="none")


NUMBERS = st.one_of(st.integers(-9, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=6), st.just("F32")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_headers_at_random_are_read_as_the_library_reads_them_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Never another exception; and what is accepted, safetensors accepts with the same shapes."""
    path = tmp_path / "x.safetensors"
    header: dict[str, dict[str, Any]] = {}
    position = 0
    for name in data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=3, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + 4 * int(torch.tensor(shape).prod()) if shape else position + 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    if header and data.draw(st.booleans()):
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(JSON)
    body = bytearray(json.dumps(header).encode())
    if data.draw(st.booleans()) and len(body) > 2:
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    put_header(
        path, bytes(body), bytes(position + data.draw(st.sampled_from([0, 0, 0, -1, 1, 4]))) if position else b""
    )
    try:
        entries, _ = read_header(path)
    except RegroupError as error:
        if str(path) not in str(error):
            pytest.fail(f"a message without its file: {error}")
        return
    try:
        with safe_open(path, "pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: entry.shape for name, entry in entries.items()
            }
    except SafetensorError as error:
        pytest.fail(f"accepted here and not there: {error}: {bytes(body)!r}")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=4),
    note=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_written_headers_are_what_the_library_reads(
    tmp_path: Path, shapes: dict[str, list[int]], note: dict[str, str]
) -> None:
    shapes.pop("__metadata__", None)
    path = tmp_path / "x.safetensors"
    specs = {name: ("F16", tuple(shape)) for name, shape in shapes.items()}
    encoded = encode_header(specs, note)
    sizes = [2 * int(torch.tensor(shape).prod()) if shape else 2 for shape in shapes.values()]
    path.write_bytes(encoded + bytes(sum(sizes)))
    assert len(encoded) % 8 == 0
    with safe_open(path, "pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            name: torch.Size(shape) for name, shape in shapes.items()
        }
        assert (file.metadata() or {}) == note
    entries, read = read_header(path)
    assert list(entries) == list(specs)
    assert read == note


def test_random_config_values_are_described_or_refused(saved: Saved) -> None:
    """Any value anywhere in a config: a layout, or a message, and nothing else."""

    @settings(deadline=None, max_examples=150)
    @given(name=st.sampled_from(["llama", "phi", "gpt_neox", "t5", "falcon", "olmo2"]), data=st.data())
    def check(name: str, data: st.DataObject) -> None:
        checkpoint = open_checkpoint(saved(name))
        key = data.draw(
            st.sampled_from([*sorted(checkpoint.config), "regroup", "sliding_window", "num_key_value_heads"])
        )
        value = data.draw(JSON)
        config = checkpoint.config | {key: value}
        # A config alone is believed, however many layers it names.
        many = key.endswith("layers") and isinstance(value, int) and value > 1000
        for headers in (checkpoint.tensors, *([] if many else [None])):
            with contextlib.suppress(RegroupError):
                regroup.detect(config, headers)

    check()


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_only_python_calls_json_is_no_header(tmp_path: Path, constant: str) -> None:
    """The library refuses it; configs that Python wrote may hold it."""
    raw = f'{{"x": {{"dtype": "F32", "shape": [], "data_offsets": [0, 4], "more": {constant}}}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(RegroupError, match="not a complete safetensors file"):
        read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
