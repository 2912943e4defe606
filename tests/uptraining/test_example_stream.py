"""Streams: every source gives its documents, one order for any number of processes, and resuming at every position."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import texts
from regroup import RegroupError
from regroup.data import files, tables, token_windows
from regroup.data.files import TextFile
from regroup.data.sources import find_sources
from regroup.uptraining.objective import Causal, Pairs, SpanCorruption, make_objective
from regroup.uptraining.stream import ExampleStream, held_out_examples, open_stream
from regroup.uptraining.teacher import check_same_tokenizer

TOKENIZER = texts.tokenizer()
VOCAB = 96
_DRAW = random.Random(5)
DOCUMENTS = [
    "".join(_DRAW.choice(["the cat ", "sat\n", "naïve ", "步", "🙂", "42 "]) for _ in range(_DRAW.randrange(1, 40)))
    for _ in range(60)
]
PAIRS = [(document[:20], document[20:40] or "cat") for document in DOCUMENTS]
CAUSAL = make_objective("causal", TOKENIZER, window=16)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, tables):
        monkeypatch.setattr(module, "CHUNK_BYTES", 300)


def opened(paths: Sequence[str | Path] | str | Path, objective: Any = CAUSAL, **options: Any) -> ExampleStream:
    names = [paths] if isinstance(paths, (str, Path)) else paths
    options = {"vocab_size": VOCAB, "shuffle_buffer": 1, **options}
    return open_stream([str(name) for name in names], TOKENIZER, objective, **options)


def rows(batches: Any) -> list[list[int]]:
    """Inputs and labels of every row."""
    return [
        [*inputs, *labels]
        for batch in batches
        for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]


def lines(path: Path, documents: Sequence[str] = DOCUMENTS) -> Path:
    text = "".join(json.dumps({"text": document, "id": 1}, ensure_ascii=False) + "\n" for document in documents)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_bytes(text.encode())
    return path


def parquet(path: Path, documents: Sequence[str] = DOCUMENTS) -> Path:
    table = pyarrow.table({"id": list(range(len(documents))), "text": list(documents)})
    pyarrow.parquet.write_table(table, path, row_group_size=17)
    return path


def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl")
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{number:03}.txt").write_bytes(document.encode())
    found = [
        rows(opened(source).batches(1))
        for source in (
            lines(tmp_path / "a.jsonl"),
            lines(tmp_path / "a.json"),
            lines(tmp_path / "a.jsonl.gz"),
            parquet(tmp_path / "a.parquet"),
            tmp_path / "texts",
            f"hf:{tmp_path / 'set'}",
        )
    ]
    assert found == [found[0]] * len(found)
    expected = token_windows(DOCUMENTS, TOKENIZER, length=16)[0].tolist()
    assert [row[:16] for row in found[0]][: len(expected)] == expected


def test_every_kind_of_pairs_gives_the_same_examples(tmp_path: Path) -> None:
    pairs = [tuple(side.replace("\n", " ") for side in pair) for pair in PAIRS]
    (tmp_path / "a.tsv").write_bytes("".join(f"{a}\t{b}\r\n" for a, b in pairs).encode())
    table = [{"source": a, "target": b} for a, b in pairs]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, table)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, table)))
    objective = make_objective("pairs", TOKENIZER, window=9, start_token=2)
    found = [
        rows(opened(source, objective).batches(1))
        for source in (*(tmp_path / f"a.{kind}" for kind in ("tsv", "jsonl", "parquet")), f"hf:{tmp_path / 'set'}")
    ]
    assert found == [found[0]] * 4
    assert len(found[0]) == len(PAIRS)


def test_a_long_text_is_one_document_read_in_pieces(tmp_path: Path) -> None:
    text = "\n".join(DOCUMENTS)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "a.txt.gz"):
        chunks = list(TextFile(tmp_path / name).chunks())
        assert len(chunks) > 5
        assert "".join(chunk.documents[0] for chunk in chunks) == text
        assert [chunk.begins for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        assert [chunk.ends for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    ids = [token for batch in opened(tmp_path / "a.txt").batches(1) for token in batch["input_ids"][0].tolist()]
    assert TOKENIZER.eos_token_id not in ids


@given(st.text(alphabet="a\n🙂步ü", max_size=60), st.integers(5, 20))
def test_pieces_end_between_characters(text: str, size: int) -> None:
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(files, "CHUNK_BYTES", size)
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        chunks = list(TextFile(path).chunks())
        assert "".join(chunk.documents[0] for chunk in chunks) == text
        for number, chunk in enumerate(chunks):
            assert list(TextFile(path).chunks(chunk.position)) == chunks[number:]


def source_named(kind: str, folder: Path) -> str:
    if kind == "hf":
        folder = folder / "set"
        folder.mkdir()
        # Two shards.
        lines(folder / "a.jsonl", DOCUMENTS[:25])
        lines(folder / "b.jsonl", DOCUMENTS[25:])
        return f"hf:{folder}"
    if kind == "parquet":
        return str(parquet(folder / "a.parquet"))
    if kind == "txt":
        (folder / "a.txt").write_text("\n".join(DOCUMENTS))
        return str(folder / "a.txt")
    return str(lines(folder / f"a.{kind}"))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "hf"])
def test_reading_resumes_from_any_chunk(kind: str, tmp_path: Path) -> None:
    (source,) = find_sources([source_named(kind, tmp_path)], pairs=False)
    chunks = list(source.chunks())
    assert len(chunks) > 5
    for number, chunk in enumerate(chunks):
        position = json.loads(json.dumps(chunk.position))
        assert [(c.documents, c.begins, c.ends) for c in source.chunks(position)] == [
            (c.documents, c.begins, c.ends) for c in chunks[number:]
        ]


def objective_named(name: str) -> Any:
    if name == "pairs":
        return make_objective("pairs", TOKENIZER, window=9, start_token=2)
    if name == "causal":
        return Causal(16, 1, 2, document_bos=True, isolate=True)
    return SpanCorruption(30, 2, tuple(range(90, 80, -1)), 0)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "hf"])
@pytest.mark.parametrize("name", ["causal", "span-corruption"])
def test_resuming_anywhere_gives_the_same_remaining_examples(kind: str, name: str, tmp_path: Path) -> None:
    """At every batch of two epochs, with fresh objects: 1 process and 2, and another number than before."""
    source, objective = source_named(kind, tmp_path), objective_named(name)
    options: dict[str, Any] = {"objective": objective, "shuffle_buffer": 7, "seed": 3, "epochs": 2}
    whole = rows(opened(source, **options).batches(4))
    assert len(whole) > 60
    states = []
    stream = opened(source, **options)
    for _ in stream.batches(4):
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert len(states) * 4 == len(whole)
    assert {state["cursor"]["epoch"] for state in states} == {0, 1}
    for number, state in enumerate(states[:-1], 1):
        if kind == "hf" and number % 10:  # opening a data set takes long
            continue
        resumed = opened(source, **options)
        resumed.load_state_dict(state)
        assert resumed.examples == number * 4
        # All that remains every now and then, and the next batches everywhere.
        limit = None if number % 7 == 0 or kind == "hf" else 2
        assert rows(itertools.islice(resumed.batches(4), limit)) == whole[number * 4 :][: limit and limit * 4]
        if number % 5 == 0:
            shares = []
            for rank in range(2):
                part = opened(source, **options)
                part.load_state_dict(state)
                shares.append(rows(itertools.islice(part.batches(4, rank, 2), 3)))
            joined = [row for pair in zip(*shares, strict=True) for row in pair]
            assert joined == whole[number * 4 :][: len(joined)]


def test_a_resumed_stream_can_be_resumed_again(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    options: dict[str, Any] = {"shuffle_buffer": 5, "seed": 1}
    whole = rows(opened(source, **options).batches(2))
    found: list[list[int]] = []
    state = None
    while True:
        stream = opened(source, **options)
        if state is not None:
            stream.load_state_dict(state)
        part = rows(itertools.islice(stream.batches(2), 3))
        if not part:
            break
        found += part
        state = json.loads(json.dumps(stream.state_dict()))
    assert found == whole


def test_a_second_iterator_resumes_where_the_first_stood(tmp_path: Path) -> None:
    stream = opened(lines(tmp_path / "a.jsonl"), shuffle_buffer=5)
    whole = rows(opened(tmp_path / "a.jsonl", shuffle_buffer=5).batches(2))
    first = rows(itertools.islice(stream.batches(2), 4))
    assert first + rows(stream.batches(2)) == whole


def test_states_of_batches_before_are_remembered(tmp_path: Path) -> None:
    """What fetches ahead asks for the state after what was trained on."""
    source = lines(tmp_path / "a.jsonl")
    stream = opened(source, shuffle_buffer=5)
    batches = stream.batches(2)
    next(batches)
    expected = stream.state_dict()
    next(batches)
    next(batches)
    assert stream.examples == 6
    assert stream.state_dict(2) == expected
    assert stream.state_dict() == stream.state_dict(6) != expected
    with pytest.raises(RegroupError, match="does not remember"):
        stream.state_dict(3)
    fresh = opened(source, shuffle_buffer=5)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.state_dict(0)["examples"] == 0


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["causal", "span-corruption", "pairs"])
def test_the_order_does_not_depend_on_the_processes(world: int, name: str, tmp_path: Path) -> None:
    source, objective = lines(tmp_path / "a.jsonl"), objective_named(name)
    if name == "pairs":
        source.write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in PAIRS))
    options: dict[str, Any] = {"shuffle_buffer": 7, "seed": 3}

    def unpadded(batches: Any) -> list[list[list[int]]]:
        return [
            [[x for x in part if x not in (0, -100)] for part in (inputs, labels)]
            for batch in batches
            for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]

    whole = unpadded(opened(source, objective, **options).batches(6))
    shares = [unpadded(opened(source, objective, **options).batches(6, rank, world)) for rank in range(world)]
    assert [row for group in zip(*shares, strict=True) for row in group] == whole
    states = []
    for rank in range(world):
        stream = opened(source, objective, **options)
        next(stream.batches(6, rank, world))
        states.append(stream.state_dict())
    assert all(state == states[0] for state in states)


def test_micro_batches_are_pieces_of_a_share(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    whole = rows(opened(source).batches(6, 1, 2))
    stream = opened(source)
    batches = stream.batches(6, 1, 2, micro_batch=2)
    pieces = list(itertools.islice(batches, 4))
    assert [len(piece["input_ids"]) for piece in pieces] == [2, 1, 2, 1]
    assert rows(pieces) == whole[:6]
    assert stream.examples == 12


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_order(workers: int, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    options: dict[str, Any] = {"shuffle_buffer": 7, "epochs": 2}
    alone, helped = opened(source, **options), opened(source, workers=workers, **options)
    for one, other in itertools.islice(zip(alone.batches(3), helped.batches(3), strict=True), 30):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert alone.state_dict() == helped.state_dict()
    assert rows(opened(source, **options).batches(3)) == rows(opened(source, workers=workers, **options).batches(3))


def test_each_epoch_has_every_example_once_in_another_order(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    plain = rows(opened(source).batches(1))
    stream = opened(source, shuffle_buffer=11, epochs=3)
    found, epochs = [], []
    for batch in stream.batches(1):
        found += rows([batch])
        epochs.append(stream.epoch)
    n = len(plain)
    parts = [found[start : start + n] for start in range(0, len(found), n)]
    assert [sorted(part) for part in parts] == [sorted(plain)] * 3
    assert len({str(part) for part in [plain, *parts]}) == 4
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}
    endless = opened(source, shuffle_buffer=11, epochs=None)
    assert len(list(itertools.islice(endless.batches(1), 5 * n))) == 5 * n


def test_seed_and_buffer_decide_the_order(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    orders = {
        str(rows(opened(source, seed=seed, shuffle_buffer=size).batches(1)))
        for seed, size in ((0, 1), (1, 1), (0, 9), (1, 9), (0, 10_000))
    }
    # Without a buffer the seed has nothing to decide.
    assert len(orders) == 4
    assert rows(opened(source, seed=4, shuffle_buffer=9).batches(1)) == rows(
        opened(source, seed=4, shuffle_buffer=9).batches(1)
    )


def test_a_buffer_draws_every_place(tmp_path: Path) -> None:
    """Each example is about as likely to come first as any other of the buffer."""
    source = lines(tmp_path / "a.jsonl")
    plain = rows(opened(source).batches(1))
    firsts = [rows([next(opened(source, seed=seed, shuffle_buffer=4).batches(1))])[0] for seed in range(200)]
    counts = [firsts.count(row) for row in plain[:5]]
    assert min(counts[:4]) > 25
    assert counts[4] == 0


def test_noise_differs_between_epochs_and_not_between_runs(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    objective = objective_named("span-corruption")
    first = rows(opened(source, objective, epochs=2).batches(1))
    n = len(first) // 2
    assert first == rows(opened(source, objective, epochs=2).batches(1))
    assert sum(a == b for a, b in zip(first[:n], first[n:], strict=True)) < n / 4


def test_the_last_batch_is_whole(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    n = len(rows(opened(source).batches(1)))
    size = n // 2 + 1
    stream = opened(source)
    assert len(rows(stream.batches(size))) == size
    assert stream.examples == size


def test_held_out_examples_are_the_first_and_the_same(tmp_path: Path) -> None:
    source = str(lines(tmp_path / "a.jsonl"))
    objective = objective_named("span-corruption")
    found = held_out_examples(source, TOKENIZER, objective, limit=5, vocab_size=VOCAB)
    again = held_out_examples(source, TOKENIZER, objective, limit=5, vocab_size=VOCAB)
    assert rows([objective.collate(found)]) == rows([objective.collate(again)])
    assert rows([objective.collate(found)]) == rows(opened(source, objective).batches(1))[:5]
    assert len(held_out_examples(source, TOKENIZER, CAUSAL, limit=10**6, vocab_size=VOCAB)) > 20


def test_tokens_are_estimated(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", DOCUMENTS * 5)
    exact = sum(len(ids) for ids in TOKENIZER(DOCUMENTS * 5, add_special_tokens=False)["input_ids"])
    estimate = opened(source).estimated_tokens()
    assert estimate == pytest.approx(exact, rel=0.3)
    assert opened(parquet(tmp_path / "a.parquet")).estimated_tokens()
    assert opened(lines(tmp_path / "a.jsonl.gz")).estimated_tokens() is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"x", "less data than one example"),
        ("a.txt", b"ab\xffc", r"not UTF-8[\s\S]*byte 2"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x y" * 999, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl", b"\n\n", "less data than one example"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"not valid JSON[\s\S]*a\.jsonl:2"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl:3"),
        ("a.jsonl", b'{"text": 7}', r"does not hold[\s\S]*a\.jsonl:1"),
        ("a.jsonl", b'{"text": "\xff"}', r"not UTF-8"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_data_that_cannot_be_used(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RegroupError, match=words):
        rows(opened(tmp_path / name).batches(1))


def test_a_bad_line_is_found_where_it_is_after_resuming(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    source.write_bytes(source.read_bytes() + b"[1]\n")
    with pytest.raises(RegroupError, match=r"a\.jsonl:61"):
        rows(opened(source).batches(1))
    stream = opened(source)
    for _ in itertools.islice(stream.batches(1), 40):
        pass
    resumed = opened(source)
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(RegroupError, match=r"a\.jsonl:61"):
        rows(resumed.batches(1))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("x")
    for name, words in (
        (str(tmp_path / "none.txt"), "no such file"),
        ("data/none.jsonl", "no such file"),
        ("none", "no such file"),
        (str(tmp_path / "empty"), "holds no data"),
        (f"hf:{tmp_path / 'none'}", "data set cannot be read"),
    ):
        with pytest.raises(RegroupError, match=words):
            opened(name)
    with pytest.raises(RegroupError, match="no data was given"):
        opened([])


def test_an_empty_side_is_found_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("the cat\tsat\nthe\t\n")
    with pytest.raises(RegroupError, match=r"empty side[\s\S]*a\.tsv"):
        opened(tmp_path / "a.tsv", objective_named("pairs"))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(RegroupError, match=r"lacks a column[\s\S]*words"):
        opened(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(RegroupError, match="row 2 of row group 1"):
        opened(tmp_path / "a.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(RegroupError, match="does not hold"):
        opened(f"hf:{tmp_path / 'set'}")


def test_tokens_outside_the_vocabulary_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    largest = max(max(ids) for ids in TOKENIZER(DOCUMENTS)["input_ids"] if ids)
    opened(source, vocab_size=largest + 1)
    with pytest.raises(RegroupError, match=rf"outside the model's vocabulary[\s\S]*{largest}"):
        rows(opened(source, vocab_size=largest).batches(1))
    with pytest.raises(RegroupError, match="special tokens"):
        opened(source, SpanCorruption(30, 2, (500, 499, 498), 0))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match="a multiple of 3"):
        opened(lines(tmp_path / "a.jsonl")).batches(4, 0, 3)


def test_states_of_another_stream_are_refused(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl")
    state = opened(source).state_dict()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    opened(lines(moved / "a.jsonl")).load_state_dict(state)
    for stream, words in (
        (opened(source, seed=1), "seed: 1"),
        (opened(source, shuffle_buffer=2), "shuffle-buffer: 2"),
        (opened(source, Causal(8, 1, 2)), "window=8"),
        (opened(lines(tmp_path / "b.jsonl")), r"b\.jsonl"),
        (opened(lines(moved / "a.jsonl", DOCUMENTS[:50])), "data"),
    ):
        with pytest.raises(RegroupError, match=words):
            stream.load_state_dict(state)
    with pytest.raises(RegroupError, match="another stream"):
        opened(source).load_state_dict({})


def test_tokenizers_that_differ_are_refused() -> None:
    check_same_tokenizer(TOKENIZER, texts.tokenizer())
    with pytest.raises(RegroupError, match="special tokens"):
        check_same_tokenizer(TOKENIZER, texts.tokenizer(bos=False))
    more = texts.tokenizer()
    more.add_tokens(["<new>"])
    with pytest.raises(RegroupError, match=r"tokens[\s\S]*<new>"):
        check_same_tokenizer(TOKENIZER, more)
    from tokenizers import pre_tokenizers

    other = texts.tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(RegroupError, match="sample text"):
        check_same_tokenizer(TOKENIZER, other)


def test_pairs_are_collated_to_the_longest(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in PAIRS))
    objective = Pairs(9, 5, 2, 0)
    batch: dict[str, Tensor] = next(opened(source, objective).batches(8))
    assert batch["input_ids"].shape[1] <= 9
    assert batch["labels"].shape[1] <= 5
