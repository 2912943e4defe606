"""Tokenizers into GGUF files and back: how text is cut, which tokens are special, and what is refused by name."""

from __future__ import annotations

import importlib.machinery
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from helpers import refused, run
from regroup import RegroupError
from regroup.checkpoint import read_gguf
from regroup.errors import human_bytes, two_sizes
from regroup.exports import llama_cpp
from regroup.exports.gguf_texts import check_same, ids_of, texts_for
from regroup.exports.gguf_tokenizer import vocabulary
from regroup.exports.gguf_vocabulary import tokenizer_of
from regroup.exports.pretokenizers import PRE_TOKENIZERS, PROBE, REFUSED, recognise
from regroup.modeling import load_tokenizer

DOES_NOT_WORK = "llama-cpp-python does not work here"
needs_llama_cpp = pytest.mark.skipif(llama_cpp.unsupported_reason(()) is not None, reason=DOES_NOT_WORK)

# What GPT-2's alphabet of bytes makes of a text, to be read: spaces are Ġ, newlines Ċ, tabs ĉ.
CUTS: dict[str, list[tuple[str, list[str]]]] = {
    "gpt-2": [("I'll  see 2024!\n", ["I", "'ll", "Ġ", "Ġsee", "Ġ2024", "!", "Ċ"])],
    "smollm": [
        ("I'll  see 2024!\n", ["I", "'ll", "Ġ", "Ġsee", "Ġ", "2", "0", "2", "4", "!", "Ċ"]),
        ("a  1", ["a", "ĠĠ", "1"]),
    ],
    "llama-bpe": [("I'LL  see 20245!\n\n x", ["I", "'LL", "Ġ", "Ġsee", "Ġ", "202", "45", "!ĊĊ", "Ġx"])],
    "qwen2": [("(see 20\n", ["(see", "Ġ", "2", "0", "Ċ"])],
    "gpt-4o": [("isn't camelCase", ["isn't", "Ġcamel", "Case"])],
    "tekken": [("isn't camelCase", ["isn", "'t", "Ġcamel", "Case"])],
    "default": [("a==b 1234", ["a", "==", "b", "Ġ", "123", "4"])],
    "falcon": [("a 1234.", ["a", "Ġ", "123", "4", "."])],
    "deepseek-v3": [("1234 ab", ["123", "4", "Ġab"])],
    "bloom": [("a, b.  c", ["a", ",", "Ġb", ".Ġ", "Ġc"])],
    "tiny_aya": [("1234567", ["1", "234", "567"])],
    "superbpe": [("a b 12345", ["aĠbĠ", "12", "345"])],
    "ufakzeka": [("Ali'den", ["Ali", "'den"])],
    "jais-2": [(f"a{' ' * 7}b", ["a", "Ġ" * 4, "Ġ" * 2, "Ġb"])],
}


@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_as_the_name_says(name: str) -> None:
    for text, wanted in CUTS[name]:
        assert [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)] == wanted


def test_names_are_distinguished() -> None:
    """Each name is recognised by its own cuts, or by those of a name that cuts alike."""
    for row in PRE_TOKENIZERS.values():
        found = recognise(row.build(), ignore_merges=row.ignore_merges, raw=row.raw)
        assert found is not None
        assert found[1]
        assert found[0].build().pre_tokenize_str(PROBE) == row.build().pre_tokenize_str(PROBE)
        if row.original:
            found = recognise(row.build(row.original), ignore_merges=row.ignore_merges)
            assert found is not None
            assert not found[1]
    assert recognise(pre_tokenizers.Whitespace(), ignore_merges=False) is None
    assert recognise(None, ignore_merges=False) is None


def trained(pre: Any, *, raw: bool = False, ignore_merges: bool = False, size: int = 700) -> Tokenizer:
    """A tokenizer whose merges know nothing of how text is cut, so that each cut shows in its ids."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges, byte_fallback=raw))
    special = ["<s>", "</s>", "<|im_start|>"]
    if raw:
        made.normalizer = normalizers.Replace(" ", "▁")
        special += [f"<0x{number:02X}>" for number in range(256)]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(PROBE) - 5, 4000)
    chunks = [PROBE[at : at + 2 + at % 4] for at in starts]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=[] if raw else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([chunk for chunk in chunks if not raw or "\n" not in chunk], trainer)
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    return made


def fast(made: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|im_start|>"]
    )


def in_file(folder: Path, made: Tokenizer, pre: str | None, **more: Any) -> Path:
    """A GGUF file with a tokenizer and a model of one layer, by the format's library alone."""
    data = json.loads(made.to_str())
    ids = data["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tokenizer_model(more.get("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<|im_start|>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(more.get("add_bos", False))
    writer.add_chat_template("{{ messages }}")
    width = 8
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": width}
    for key, value in {**numbers, "head_count": 2, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{key}")(value)
    shapes = {"attn_norm": (width,), "attn_q": (width, width), "attn_k": (4, width), "attn_v": (4, width)}
    shapes |= {"attn_output": (width, width), "ffn_norm": (width,)}
    shapes |= {f"ffn_{part}": (width, width) for part in ("gate", "up", "down")}
    names = {"token_embd.weight": (len(tokens), width), "output_norm.weight": (width,)}
    noise = np.random.default_rng(1)
    for name, shape in {**names, **{f"blk.0.{name}.weight": shape for name, shape in shapes.items()}}.items():
        writer.add_tensor(name, noise.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def vocabularies() -> dict[bool, Tokenizer]:
    return {raw: trained(None, raw=raw) for raw in (False, True)}


def ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return ids_of(tokenizer, texts)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_there_and_back(name: str, vocabularies: dict[bool, Tokenizer], tmp_path: Path) -> None:
    """From a file to transformers and into a file again: the same way to cut text, under a name that means it."""
    row = PRE_TOKENIZERS[name]
    made = tokenizer_of(read_gguf(in_file(tmp_path, vocabularies[row.raw], name)))
    again = vocabulary(made, len(made))
    assert PRE_TOKENIZERS[again.pre].splits == row.splits or again.pre in ("qwen2", "gpt-2")
    assert PRE_TOKENIZERS[again.pre].ignore_merges == row.ignore_merges
    assert again.differences == ()
    # Not the cuts that a file without the name would get.
    if name not in ("default",) and not row.raw:
        other = tokenizer_of(read_gguf(in_file(tmp_path, vocabularies[False], None)))
        assert ids(made, [PROBE]) != ids(other, [PROBE])
    if llama_cpp.unsupported_reason(()) is None:
        texts = texts_for(made)
        in_file(tmp_path, vocabularies[row.raw], name)
        assert llama_cpp.ask(tmp_path / "m.gguf", {"texts": texts})["ids"] == ids(made, texts)


def test_smollm_survives_the_commands(vocabularies: dict[bool, Tokenizer], tmp_path: Path) -> None:
    """The pre-tokenizer that used to be lost on the way to transformers, and refused on the way back."""
    file = in_file(tmp_path, vocabularies[False], "smollm", add_bos=True)
    status, _, message = run("export", file, tmp_path / "hf", "--to", "hf")
    assert status == 0, message
    assert "pre-tokenizer smollm" in message
    found = load_tokenizer(tmp_path / "hf")
    data = json.loads(vocabularies[False].to_str())
    # The same by hand: single digits, then GPT-2's way.
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    own = Tokenizer.from_str(json.dumps(data))
    for text in (PROBE, "In 2024  there were 12 a\tb\n\n", "<|im_start|>user 1"):
        assert found(text)["input_ids"] == [0, *own.encode(text).ids]
    data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][1]
    assert found(PROBE)["input_ids"] != [0, *Tokenizer.from_str(json.dumps(data)).encode(PROBE).ids]
    assert found.chat_template == "{{ messages }}"
    status, _, message = run("export", tmp_path / "hf", tmp_path / "again.gguf", "--to", "gguf")
    assert status == 0, message
    fields = gguf.GGUFReader(str(tmp_path / "again.gguf")).fields
    before = gguf.GGUFReader(str(file)).fields
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert fields[f"tokenizer.ggml.{key}"].contents() == before[f"tokenizer.ggml.{key}"].contents(), key
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"


@pytest.mark.parametrize(
    ("pre", "model", "word"),
    [
        ("no-such-name", "gpt2", "no-such-name"),
        (REFUSED[0], "gpt2", REFUSED[0]),
        ("smollm", "bert", "bert"),
        ("smollm", "rwkv", "rwkv"),
        ("smollm", "t5", "t5"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    pre: str, model: str, word: str, vocabularies: dict[bool, Tokenizer], tmp_path: Path
) -> None:
    file = in_file(tmp_path, vocabularies[False], pre, model=model)
    message = refused("export", file, tmp_path / "hf", "--to", "hf", "--no-check")
    assert word in message
    assert "cannot be rebuilt" in message
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        (pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated"), (r"Split '\\w+|\\W+'", "a way to cut text")),
        (pre_tokenizers.Whitespace(), ("Whitespace",)),
        (pre_tokenizers.Metaspace(), ("Metaspace",)),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), ("add_prefix_space",)),
    ],
)
def test_other_cuts_are_refused_by_name(pre: Any, words: tuple[str, ...], vocabularies: dict[bool, Tokenizer]) -> None:
    made = Tokenizer.from_str(vocabularies[False].to_str())
    made.pre_tokenizer = pre
    with pytest.raises(RegroupError) as caught:
        vocabulary(fast(made), 700)
    assert [word for word in words if word not in str(caught.value)] == []


def test_known_differences_are_said(vocabularies: dict[bool, Tokenizer]) -> None:
    """Cuts that llama.cpp only comes near to, composed characters, and spaces around special tokens."""
    made = Tokenizer.from_str(vocabularies[False].to_str())
    row = PRE_TOKENIZERS["gpt-4o"]
    made.pre_tokenizer = row.build(row.original)
    made.normalizer = normalizers.NFC()
    found = vocabulary(fast(made), 700)
    assert found.pre == "gpt-4o"
    assert len(found.differences) == 2
    predicted = found.predicted(fast(made))
    text = "ПриветМир nai\u0308ve"
    assert [made.encode(text).ids] != [predicted.encode(text).ids]
    assert made.encode("camelCase isn't").ids == predicted.encode("camelCase isn't").ids


def test_other_ids_are_refused() -> None:
    with pytest.raises(RegroupError, match="'shorter'"):
        check_same(["longer text", "shorter"], [[1, 2], [3]], [[1, 3], [4]], "an engine")
    assert "2 texts" in check_same(["a", "b"], [[1], [2]], [[1], [2]], "an engine")


def broken(folder: Path, code: str) -> None:
    (folder / "llama_cpp").mkdir(parents=True)
    (folder / "llama_cpp" / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import no_such_library", "no_such_library"),
        ("__version__ = '0.1'", "Llama"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os._exit(0)", "exit status 0"),
    ],
)
def test_a_broken_llama_cpp_is_not_the_files_fault(
    code: str,
    word: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(tmp_path / "site", code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    spec = importlib.machinery.ModuleSpec("llama_cpp", None)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: spec)
    llama_cpp._unsupported_reason.cache_clear()
    try:
        status, _, message = run("export", saved("llama"), tmp_path / "m.gguf", "--to", "gguf")
    finally:
        llama_cpp._unsupported_reason.cache_clear()
    assert status == 0, message
    assert "does not work here" in message
    assert word in message
    assert "logits were not compared with llama.cpp" in message
    assert "tensors bit for bit" in message


def test_a_progress_bar_does_not_leak(saved: Callable[[str], Path], tmp_path: Path, capfd: Any) -> None:
    assert run("export", saved("llama"), tmp_path / "m.gguf", "--to", "gguf")[0] == 0
    status, _, message = run("export", tmp_path / "m.gguf", tmp_path / "hf", "--to", "hf")
    assert status == 0
    out, err = capfd.readouterr()
    for said in (message, out, err):
        assert "de-quantizing" not in said
        assert "it/s" not in said


def test_sizes_are_seen() -> None:
    assert human_bytes(1234) == "1.205 KiB"
    assert human_bytes(7) == "7 B"
    assert two_sizes(10**9, 10**9 - 1) == ("1,000,000,000 B", "999,999,999 B")
    assert two_sizes(2**20, 2**10) == ("1 MiB", "1 KiB")


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "{}", "out", "--kv-heads", 1),
        ("plan", "{}", "--kv-heads", 1),
        ("verify", "{}", "{}"),
        ("bench", "decode", "{}"),
    ],
)
def test_a_gguf_file_for_a_folder(command: tuple[Any, ...], tmp_path: Path) -> None:
    file = tmp_path / "m $(touch x).gguf"
    file.write_bytes(b"GGUF" + b"\0" * 40)
    given = [file if part == "{}" else tmp_path / part if part == "out" else part for part in command]
    message = refused(*given)
    assert f"regroup export '{file}' '{file.with_name('m $(touch x)-hf')}' --to hf" in message
