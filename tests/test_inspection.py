"""``regroup inspect``: bytes against a count by hand, from a folder, a config, a GGUF file and a hub repository."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

import tiny
from helpers import config_of, copy, head_map, refused, run
from regroup import RegroupError, inspect
from regroup.checkpoint import fetch, is_hub_id, open_checkpoint, remote_headers
from regroup.console import human_bytes
from regroup.inspection import Summary

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8": 1}
WINDOWS = {"mistral": [6, 6], "qwen2": [None, 5, 5], "gemma2": [5, None], "phi3": [7, 7]}


def counted(name: str, heads: dict[str, int], context: int, batch: int, encoder: int, width: int) -> int:
    """Bytes of a cache, number by number: a key and a value for each head, place and sequence."""
    family, total = tiny.FAMILIES[name], 0
    for number, (path, groups) in enumerate(heads.items()):
        cross = path.endswith(("EncDecAttention", "encoder_attn"))
        window = WINDOWS.get(name, [None] * 9)[number]
        for _ in range(batch):
            for position in range(encoder if cross else context):
                if window is None or position >= context - window:
                    total += 2 * groups * family.head_dim * width
    return total


@pytest.mark.parametrize("name", ["llama", "llama_grouped", *WINDOWS, "bart", "t5", "whisper", "bloom", "gpt2"])
def test_cache_bytes_are_what_a_count_says(name: str, saved: Saved, converted: Converted) -> None:
    for kind in ("all", "mixed"):
        summary, heads = inspect(str(converted(name, kind))), head_map(name, kind)
        for context, batch, encoder in ((1, 1, 1), (3, 2, 5), (20, 3, 11)):
            for dtype, width in BYTES.items():
                expected = counted(name, heads, context, batch, encoder, width)
                got = summary.kv_bytes(dtype, context=context, batch=batch, encoder_context=encoder)
                assert got == expected
        fewer = {path: min(3, groups) for path, groups in heads.items()}
        assert summary.with_kv_heads(3).kv_bytes("F32", context=9) == counted(name, fewer, 9, 1, 9, 4)
    assert counted(name, heads, 3, 1, 3, 4) != counted(name, dict.fromkeys(heads, 1), 3, 1, 3, 4)
    assert inspect(str(saved(name))).layers == inspect(str(saved(name) / "config.json")).layers


@pytest.mark.parametrize("name", ["llama", "bart", "mistral"])
def test_json_is_what_the_functions_say(name: str, saved: Saved) -> None:
    arguments = ("--json", "--kv-heads", "3,1", "--context", 50, "--batch", 4, "--encoder-context", 9)
    status, out, _ = run("inspect", saved(name), *arguments)
    assert status == 0
    facts = json.loads(out)
    heads = head_map(name, "all")
    assert (facts["format"], facts["family"], len(facts["layers"])) == ("safetensors", name, len(heads))
    for label, groups in (("now", 6), ("3", 3), ("1", 1)):
        map_ = dict.fromkeys(heads, groups)
        for dtype in ("F32", "BF16", "F8"):
            costs = facts["kv_cache"][label][dtype]
            assert costs["kv_bytes"] == counted(name, map_, 50, 4, 9, BYTES[dtype])
            assert costs["kv_bytes_per_token"] == counted(name, map_, 1, 1, 1, BYTES[dtype])


@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_every_family_is_shown(name: str, converted: Converted) -> None:
    for source in (converted(name, "all"), converted(name, "mixed")):
        status, out, message = run("inspect", source)
        assert status == 0, message
        assert tiny.FAMILIES[name].model_type in out
        assert "KV heads" in out


def test_a_config_alone(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    for source in (tmp_path, tmp_path / "config.json"):
        summary = inspect(str(source))
        assert (summary.format, summary.parameters, summary.dtype) == ("config", None, None)
        assert run("inspect", source)[0] == 0
    assert "no weights" in refused("plan", tmp_path, "--kv-heads", 2)


@pytest.mark.parametrize("numbers", ["0", "-1", "4", "7", "a", "3,", ""])
def test_impossible_kv_heads(numbers: str, saved: Saved) -> None:
    message = refused("inspect", saved("llama"), f"--kv-heads={numbers}")
    assert "got:" in message


def write_gguf(path: Path, architecture: str = "llama", **values: Any) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    facts: dict[str, Any] = {
        "block_count": 3,
        "embedding_length": 48,
        "attention.head_count": 6,
        "attention.head_count_kv": 6,
        **values,
    }
    for key, value in facts.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 48), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [(6, 6, 8)] * 3),
        ({"attention.head_count_kv": 2}, [(6, 2, 8)] * 3),
        ({"attention.head_count_kv": None}, [(6, 6, 8)] * 3),
        ({"attention.head_count_kv": [6, 3, 1]}, [(6, 6, 8), (6, 3, 8), (6, 1, 8)]),
        ({"attention.head_count_kv": [6, 0, 2], "attention.head_count": [6, 0, 6]}, [(6, 6, 8), (6, 2, 8)]),
        ({"attention.head_count": [8, 6, 8], "attention.head_count_kv": [8, 6, 2]}, [(8, 8, 6), (6, 6, 6), (8, 2, 6)]),
        ({"attention.key_length": 10, "attention.value_length": 10}, [(6, 6, 10)] * 3),
    ],
)
def test_gguf_headers(values: dict[str, Any], expected: list[tuple[int, int, int]], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", **values)
    summary = inspect(str(path))
    found = [(x.num_attention_heads, x.num_key_value_heads, x.head_dim) for x in summary.layers]
    assert found == expected
    assert (summary.format, summary.family, summary.parameters) == ("gguf", "llama", 4 * 48)
    assert summary.kv_bytes("F16", context=7) == sum(2 * g * d * 7 * 2 for _, g, d in expected)
    status, out, message = run("inspect", path, "--json")
    assert status == 0, message
    assert json.loads(out)["kv_cache"]["now"]["BF16"]["kv_bytes_per_token"] == sum(4 * g * d for _, g, d in expected)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_count": None}, "block_count"),
        ({"attention.head_count": None}, "head_count"),
        ({"attention.head_count": 0}, "heads"),
        ({"attention.head_count_kv": [6, 3]}, "2 layers"),
        ({"attention.head_count_kv": "six"}, "head_count_kv"),
        ({"attention.key_length": 192, "attention.value_length": 128}, "keys 192, values 128"),
    ],
)
def test_gguf_headers_that_say_too_little(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", **values)
    assert words in refused("inspect", path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense" * 9, b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_files_that_are_no_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert "x.gguf" in refused("inspect", path)


def test_a_gguf_cut_short_or_absent(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf").read_bytes()
    for length in (30, len(whole) // 3, len(whole) // 2):
        (tmp_path / "x.gguf").write_bytes(whole[:length])
        assert "x.gguf" in refused("inspect", tmp_path / "x.gguf")
    assert "absent.gguf" in refused("inspect", tmp_path / "absent.gguf")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "a/b/c", "../x", "no such model", "x?y"])
def test_sources_that_are_nothing(source: str, tmp_path: Path) -> None:
    for command in (("inspect", source), ("plan", source, "--kv-heads", 1)):
        message = refused(*command)
        assert "does not exist" in message
        assert "hub id such as" in message
    refused("convert", source, tmp_path / "result", "--kv-heads", 1, "--calibration", "none")


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0")
    assert "not a folder" in refused(
        "convert", tmp_path / "x.safetensors", tmp_path / "y", "--kv-heads", 1, "--calibration", "none"
    )
    refused("inspect", tmp_path / "x.safetensors")


def test_offline_a_hub_id_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text("text")
    commands = [("inspect",), ("plan", "--kv-heads", 1), ("evaluate", "--data", tmp_path / "x.txt")]
    for command, *rest in [*commands, ("convert", tmp_path / "result", "--kv-heads", 1)]:
        message = refused(command, "owner/no-such-model", *rest)
        for word in ("neither a local folder nor a hub repository", "owner/no-such-model", "offline", "remedy:"):
            assert word in message
    with pytest.raises(RegroupError, match="neither a local folder"):
        fetch("owner/no-such-model")
    assert not (tmp_path / "result").exists()


def test_what_may_be_a_hub_id() -> None:
    assert all(map(is_hub_id, ["gpt2", "meta-llama/Llama-2-7b-hf", "a/b.c_d-e"]))
    assert not any(map(is_hub_id, ["", "a/b/c", "/a", "a/", "../a", "a/../b", "a b", ".a", "a/..", "a\n"]))


def remote(folder: Path) -> Any:
    """What ``get_safetensors_metadata`` returns, made from a folder."""
    checkpoint = open_checkpoint(folder)
    return SimpleNamespace(
        files_metadata={
            file: SimpleNamespace(
                tensors={
                    name: SimpleNamespace(dtype=x.dtype, shape=list(x.shape), data_offsets=(x.start, x.end))
                    for name, x in entries.items()
                }
            )
            for file, entries in checkpoint.shards.items()
        }
    )


def test_hub_headers_are_enough(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, file: str, *, revision: str | None = None) -> str:
        asked.append((repository, revision))
        return str(saved("bart") / file)

    def headers(_: Any, repository: str, *, revision: str | None = None) -> Any:
        asked.append((repository, revision))
        return remote(saved("bart"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", headers)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights were downloaded"))
    summary = inspect("owner/bart", revision="v2")
    local = inspect(str(saved("bart")))
    assert (summary.layers, summary.parameters) == (local.layers, local.parameters)
    status, out, _ = run("plan", "owner/bart", "--kv-heads", 2, "--revision", "v2")
    assert status == 0
    assert json.loads(out)["layers"][0]["num_key_value_heads"] == 2
    assert asked == [("owner/bart", "v2")] * 4


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# Whichever HTTP client this release of huggingface_hub uses.
CLIENT: Any = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
NO_CONNECTION = [
    CLIENT.ConnectError("no route"),
    CLIENT.ReadTimeout("too slow"),
    OSError("no route"),
    LocalEntryNotFoundError("not cached"),
    NotASafetensorsRepoError("no safetensors"),
    huggingface_hub.errors.SafetensorsParsingError("bad header"),
    EntryNotFoundError("404"),
]


@pytest.mark.parametrize("error", NO_CONNECTION, ids=lambda e: type(e).__name__)
def test_hub_failures_are_explained(error: Exception, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", failing(error))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(saved("llama") / "config.json"))
    for call in (fetch, remote_headers):
        with pytest.raises(RegroupError, match=r"neither a local folder nor a hub[\s\S]*remedy"):
            call("owner/name")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(error))
    assert "remedy:" in refused("inspect", "owner/name")


def test_what_is_downloaded(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[list[str]] = []

    def download(_: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert revision == "main"
        ignored.append(ignore_patterns)
        return str(saved("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    arguments = ("convert", "owner/name", tmp_path / "result", "--kv-heads", 2, "--revision", "main")
    assert run(*arguments)[0] == 0
    assert {"*.py", "*.bin", "*.gguf"} <= set(ignored[0])
    assert "*.safetensors" not in ignored[0]
    card = (tmp_path / "result" / "README.md").read_text()
    assert "base_model: owner/name" in card
    fetch("owner/name", revision="main", pickles=True)
    assert "*.bin" not in ignored[1]
    assert "*.py" in ignored[1]


def test_a_summary_of_other_head_counts() -> None:
    layers = summarize_layers([(8, 8), (6, 6)])
    with pytest.raises(RegroupError, match="divided"):
        layers.with_kv_heads(4)
    assert [x.num_key_value_heads for x in layers.with_kv_heads(2).layers] == [2, 2]


def summarize_layers(heads: list[tuple[int, int]]) -> Summary:
    from regroup.inspection import LayerSummary

    layers = tuple(LayerSummary(f"blk.{i}", "self", h, g, 8, None, 0) for i, (h, g) in enumerate(heads))
    return Summary("x", "gguf", "llama", 64, None, None, None, layers)


def test_a_folder_with_pickles_is_not_a_config_alone(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "--allow-pickle" in refused("inspect", folder)
    assert config_of(folder)["model_type"] == "llama"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_inspect_and_convert_count_the_cache_in_one_dtype_and_name_it(
    name: str, dtype: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("regroup.console.out.width", 160)
    folder = tmp_path / "original"
    shutil.copytree(saved(name), folder)
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    status, out, message = run("inspect", folder, "--kv-heads", "2,1")
    assert status == 0, message
    assert f"{dtype}, per token" in " ".join(out.replace("┃", " ").split())
    first = [re.split(r" *│ *", line)[2] for line in out.splitlines() if re.match(r"│ (current|2|1) ", line)]
    status, _, message = run("convert", folder, tmp_path / "result", "--kv-heads", 1, "--method", "mean", "--dry-run")
    assert status == 0, message
    assert f"KV cache {first[0]} → {first[2]} per token in {dtype};" in message
    facts = json.loads(run("inspect", folder, "--kv-heads", "2,1", "--json")[1])
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    elements = sum(2 * layer["num_key_value_heads"] * layer["head_dim"] for layer in facts["layers"])
    assert facts["kv_cache"]["now"][facts["kv_cache_dtype"]]["kv_bytes_per_token"] == size * elements
    assert human_bytes(size * elements) == first[0]
