"""The recipes of the encoder-decoder experiment: the error rate by hand, the tokenizer, two steps of training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import load_recipe

WORDS = (
    "skill\tskˈɪl\nstory\tstˈɔɹi\nwhat's\twˌʌts\nchip\tʧˈɪp\nUSA\tjˌuˌɛsˈA\n"
    "dermis\tdˈɜɹməs\nanodic\tænˈɑdɪk\nkingship\tkˈɪŋʃˌɪp\nkiloton\tkˈɪlətˌʌn\nenrol\tɪnɹˈOl\n"
) * 2


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_recipe("g2p_parent", monkeypatch)


@pytest.fixture
def conversion(parent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_recipe("g2p_conversion", monkeypatch)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "distance"),
    [
        ("skˈɪl", "skˈɪl", 0),
        ("", "skˈɪl", 5),
        ("skˈɪl", "", 5),
        ("skɪl", "skˈɪl", 1),  # left out
        ("skˈɪlz", "skˈɪl", 1),  # inserted
        ("skˈɛl", "skˈɪl", 1),  # replaced
        ("ˈskɪl", "skˈɪl", 2),  # a moved symbol is one left out and one inserted
        ("ba", "ab", 2),
        ("kitten", "sitting", 3),
    ],
)
def test_edit_distance_by_hand(parent: ModuleType, hypothesis: str, reference: str, distance: int) -> None:
    assert parent.edit_distance(hypothesis, reference) == distance


def test_error_rate_is_over_all_symbols_not_a_mean_over_words(parent: ModuleType) -> None:
    # 1 of 1 and 0 of 9: one in ten, where the mean over words would be a half.
    assert parent.phoneme_error_rate(["a", "kˈɪlətˌʌn"], ["ə", "kˈɪlətˌʌn"]) == 1 / 10
    assert parent.phoneme_error_rate(["skˈɪl"], ["skˈɪl"]) == 0
    assert parent.phoneme_error_rate(["", ""], ["ab", "c"]) == 1
    assert parent.phoneme_error_rate(["abcd"], ["x"]) == 4


def test_stress_marks_count_unless_they_are_struck(parent: ModuleType) -> None:
    assert parent.phoneme_error_rate(["ˈskɪl"], ["skˈɪl"]) == 2 / 5
    assert parent.phoneme_error_rate(["ˈskɪl"], ["skˈɪl"], stress=False) == 0
    assert parent.phoneme_error_rate(["ˌskɛl"], ["skˈɪl"], stress=False) == 1 / 4


def test_hypotheses_must_match_references(parent: ModuleType) -> None:
    with pytest.raises(ValueError, match="argument 2"):
        parent.phoneme_error_rate(["a"], ["a", "b"])


def test_intervals_hold_the_rate_and_compare_equal_words(conversion: ModuleType) -> None:
    wrong, symbols = [0, 1, 2, 1] * 50, [5, 6, 7, 8] * 50
    found = conversion.intervals(wrong, wrong, symbols)
    low, high = found["phoneme_error_rate_95"]
    assert low < sum(wrong) / sum(symbols) < high
    assert found["excess_95"] == [0, 0]
    low, high = conversion.intervals([w + 1 for w in wrong], wrong, symbols)["excess_95"]
    assert 0 < low < len(wrong) / sum(symbols) < high


def test_calibration_sample_is_shuffled_and_reproducible(conversion: ModuleType, tmp_path: Path) -> None:
    pairs = [(f"{i}", f"{i}") for i in range(100)]
    files = [tmp_path / name for name in "abc"]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        conversion.write_sample(pairs, 50, seed, file)
    first, second, other = (file.read_text().splitlines() for file in files)
    assert first == second != other
    assert len(set(first)) == 50
    assert first != sorted(first)


def test_tokenizer_round_trip(parent: ModuleType, tmp_path: Path) -> None:
    from regroup.modeling import load_tokenizer

    pairs = [tuple(line.split("\t")) for line in WORDS.splitlines()]
    parent.new_tokenizer(pairs).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in (side for pair in pairs for side in pair):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) + 1  # one token a symbol, and the end
        assert ids[-1] == parent.END
        assert parent.UNKNOWN not in ids
        assert tokenizer(text_target=text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("sЖ")["input_ids"] == [tokenizer("s")["input_ids"][0], parent.UNKNOWN, parent.END]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (parent.PAD, parent.END)


def test_two_steps_of_training_and_a_conversion(
    parent: ModuleType,
    conversion: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, folder, result = tmp_path / "words.tsv", tmp_path / "parent", tmp_path / "record.json"
    data.write_text(WORDS, encoding="utf-8")
    parent.main(data, data, data, folder, steps=2, batch=8, warmup=1)
    assert "test: phoneme error rate" in capsys.readouterr().out
    training = json.loads((folder / "training.json").read_text())
    assert training["training_words"] == 20
    assert training["loss_curve"]["rows"][0][0] == 2
    assert 0 < training["test"]["nats_per_token"] < 2 * math.log(50)

    kept = tuple(variant for variant in conversion.VARIANTS if variant[0] in ("first", "text: lowrank, output"))
    monkeypatch.setattr(conversion, "VARIANTS", kept)
    conversion.main(folder, data, data, kv_heads="8,2", words=20, batch=5, output=result)
    value = json.loads(result.read_text())
    assert str(tmp_path) not in result.read_text()
    base, *rows = value["results"]["rows"]
    assert (base["method"], base["num_key_value_heads"], base["excess"]) == ("parent", 8, 0)
    assert [row["num_key_value_heads"] for row in rows] == [8, 8, 2, 2]
    # As many heads as before is the same model; fewer are not.
    assert rows[0]["nats_per_token"] == base["nats_per_token"]
    assert rows[2]["nats_per_token"] != base["nats_per_token"]


def test_training_is_deterministic(parent: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = tmp_path / "words.tsv"
    data.write_text(WORDS, encoding="utf-8")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        parent.main(data, data, data, tmp_path / name, steps=2, batch=8, warmup=1, seed=seed)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
