"""The demonstration's text and the original model shipped with it."""

import json
from importlib import resources
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from regroup.demo import corpus
from regroup.errors import RegroupError

PARENT = Path(str(resources.files("regroup.demo") / "parent"))


def test_the_list_is_sorted_relative_and_without_repeats() -> None:
    files = corpus.corpus_files()
    assert list(files) == sorted(set(files))
    assert all(path.endswith(".py") and not Path(path).is_absolute() and ".." not in path for path in files)


def test_the_split_covers_the_list_and_is_disjoint() -> None:
    training, held_out = set(corpus.training_files()), set(corpus.held_out_files())
    assert training | held_out == set(corpus.corpus_files())
    assert not training & held_out


def test_the_held_out_share_is_about_a_twentieth() -> None:
    share = len(corpus.held_out_files()) / len(corpus.corpus_files())
    assert 0.03 < share < 0.08


def test_the_split_is_the_one_the_parent_was_trained_with() -> None:
    # Written out: a change of rule or list would leak training text into every held-out number.
    assert corpus.held_out_files() == (
        "concurrent/futures/process.py",
        "copyreg.py",
        "email/__init__.py",
        "email/_encoded_words.py",
        "email/contentmanager.py",
        "importlib/_bootstrap_external.py",
        "multiprocessing/connection.py",
        "opcode.py",
        "sched.py",
        "secrets.py",
        "tkinter/constants.py",
        "tkinter/dialog.py",
        "token.py",
        "tomllib/__init__.py",
        "traceback.py",
        "venv/__init__.py",
        "xml/sax/xmlreader.py",
        "zoneinfo/__init__.py",
    )


def test_this_python_has_nearly_all_files() -> None:
    found = corpus.availability()
    assert len(found.present) + len(found.missing) == len(corpus.corpus_files())
    assert len(found.present) > 0.9 * len(corpus.corpus_files())


def test_texts_are_read_whole_and_in_order() -> None:
    texts = dict(corpus.held_out_text())
    assert list(texts) == [path for path in corpus.held_out_files() if (corpus.stdlib_folder() / path).is_file()]
    assert texts["sched.py"] == (corpus.stdlib_folder() / "sched.py").read_text(encoding="utf-8")


def test_missing_files_are_skipped(tmp_path: Path) -> None:
    for path in corpus.corpus_files():
        if path != "argparse.py":
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("pass\n")
    assert corpus.availability(tmp_path).missing == ("argparse.py",)
    read = [path for path, _ in corpus.training_text(tmp_path)]
    assert read == [path for path in corpus.training_files() if path != "argparse.py"]


@pytest.mark.parametrize("read", [corpus.training_text, corpus.held_out_text])
def test_an_absent_library_is_refused_before_the_first_text(read, tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match="standard library") as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_parent_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in PARENT.iterdir()}
    assert sum(sizes.values()) < 6_000_000
    assert sizes["model.safetensors"] < 5_900_000
    assert {"config.json", "generation_config.json", "tokenizer.json", "training.json"} <= set(sizes)


def test_the_parent_is_multi_head() -> None:
    config = json.loads((PARENT / "config.json").read_text())
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 8
    assert config["head_dim"] == 24


def test_the_parents_record_agrees_with_the_corpus() -> None:
    record = json.loads((PARENT / "training.json").read_text())
    assert record["training_files"] == len(corpus.training_files())
    assert record["held_out"]["files"] == len(corpus.held_out_files())
    assert record["held_out"]["nats_per_token_after"] < record["held_out"]["nats_per_token_before"]


def test_the_tokenizer_gives_back_what_it_read() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    text = "def f(x):\n    return 'naïve — ☃'  # two  spaces\n\n\tif x :pass , \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer) == json.loads((PARENT / "config.json").read_text())["vocab_size"]
