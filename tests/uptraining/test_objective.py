"""Packing, span corruption and pairs, against plain loops and against what the originals say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import regroup
import texts
import tiny
from regroup import RegroupError
from regroup.data import IGNORED, pair_batches, token_windows
from regroup.uptraining.objective import (
    Causal,
    Pairs,
    SpanCorruption,
    Tokens,
    keeps_documents_apart,
    make_objective,
)

STORIES = Path(__file__).parents[3] / "shared/models/stories260k"
BOS, EOS = 1, 2
SENTINELS = tuple(range(199, 99, -1))
DOCUMENTS = st.lists(st.lists(st.integers(3, 30), max_size=12), min_size=1, max_size=8)


def packed(objective: Any, documents: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    return objective.pack(Tokens(list(documents)), {})[0]


def naive_windows(
    documents: Sequence[Sequence[int]], window: int, bos: int | None, eos: int | None, document_bos: bool
) -> list[list[tuple[int, int]]]:
    """Windows of (token, number of its document), built token by token; a window's own first token has number -1."""
    windows: list[list[tuple[int, int]]] = []
    now: list[tuple[int, int]] = []

    def put(token: int, document: int) -> None:
        if not now and bos is not None:
            now.append((bos, -1))
        now.append((token, document))
        if len(now) == window:
            windows.append(now[:])
            now.clear()

    for number, document in enumerate(documents):
        if now and document_bos and bos is not None:
            put(bos, number)
        for token in document:
            put(token, number)
        if eos is not None:
            put(eos, number)
    return windows


@given(DOCUMENTS, st.integers(2, 9), st.booleans(), st.booleans(), st.booleans())
def test_windows_and_borders_are_those_of_a_naive_packer(
    documents: list[list[int]], window: int, bos: bool, document_bos: bool, cross: bool
) -> None:
    first = BOS if bos else None
    objective = Causal(window, first, EOS, document_bos and bos, cross_documents=cross, isolate=True)
    expected = naive_windows(documents, window, first, EOS, document_bos and bos)
    examples = packed(objective, documents)
    assert [example["ids"].tolist() for example in examples] == [[token for token, _ in row] for row in expected]
    if not examples:
        return
    batch = objective.collate(examples)
    assert batch["input_ids"].tolist() == [[token for token, _ in row] for row in expected]
    for row, labels, positions in zip(expected, batch["labels"].tolist(), batch["position_ids"].tolist(), strict=True):
        assert labels[0] == IGNORED
        position = 0
        for place in range(1, window):
            (_, before), (token, document) = row[place - 1], row[place]
            # After the window's own first token, a document resumes; it is no border.
            border = document != before and before != -1
            position = 0 if border else position + 1
            assert labels[place] == (IGNORED if border and not cross else token)
            assert positions[place] == position
    assert objective.count_tokens(batch) == sum(label != IGNORED for row in batch["labels"].tolist() for label in row)


@given(DOCUMENTS, st.lists(st.integers(0, 100), max_size=5), st.integers(2, 9), st.booleans())
def test_where_chunks_end_does_not_matter(
    documents: list[list[int]], cuts: list[int], window: int, document_bos: bool
) -> None:
    """Whole or cut anywhere, in the middle of documents too, the same windows come out."""
    for objective in (
        Causal(window, BOS, EOS, document_bos),
        SpanCorruption(window + 6, EOS, SENTINELS, 0),
    ):
        whole = packed(objective, documents)
        flat = [(number, token) for number, document in enumerate(documents) for token in [*document, None]]
        borders = sorted({0, len(flat), *(cut for cut in cuts if cut < len(flat))})
        examples, carry = [], {}
        for start, end in itertools.pairwise(borders):
            # None stands for the end of a document.
            parts: list[list[int]] = []
            begins = start == 0 or flat[start - 1][1] is None
            fresh = True
            for _, token in flat[start:end]:
                if fresh:
                    parts.append([])
                fresh = token is None
                if token is not None:
                    parts[-1].append(token)
            more, carry = objective.pack(Tokens(parts, begins, ends=flat[end - 1][1] is None), carry)
            examples += more
        for key in ("ids", "starts"):
            if whole and key in whole[0]:
                assert [example[key].tolist() for example in examples] == [example[key].tolist() for example in whole]
        assert len(examples) == len(whole)


def test_windows_are_those_of_evaluation() -> None:
    """A tokenizer that adds nothing by itself: the same windows as ``regroup evaluate`` cuts."""
    tokenizer = texts.tokenizer()
    documents = [texts.TEXT[:300], texts.TEXT[300:900], "", "x"]
    objective = make_objective("causal", tokenizer, window=16)
    assert objective == Causal(16, BOS, EOS)
    examples = packed(objective, objective.encode(tokenizer, documents))
    expected, _ = token_windows(documents, tokenizer, length=16)
    assert torch.equal(objective.collate(examples)["input_ids"][: len(expected)], expected)
    assert len(examples) - len(expected) in (0, 1)  # the last document's end is a token more


def test_long_documents_are_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regroup.data.text._PIECE", 50)
    tokenizer = texts.tokenizer()
    documents = [texts.TEXT[:300], "", texts.TEXT[:40]]
    found = make_objective("causal", tokenizer, window=8).encode(tokenizer, documents)
    assert [tokenizer.decode(ids) for ids in found] == documents
    assert make_objective("causal", tokenizer, window=8).encode(tokenizer, ["", ""]) == [[], []]


def test_a_document_begins_as_the_tokenizer_begins_it() -> None:
    from tokenizers import processors

    tokenizer = texts.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    assert make_objective("causal", tokenizer, window=8) == Causal(8, BOS, EOS, document_bos=True)
    assert make_objective("causal", texts.tokenizer(eos=False), window=8) == Causal(8, BOS, None, document_bos=True)
    assert make_objective("causal", texts.tokenizer(bos=False), window=8) == Causal(8, None, EOS)
    crossing = make_objective("causal", tokenizer, window=8, cross_documents=True, isolate=True)
    assert isinstance(crossing, Causal)
    assert not crossing.isolate


def test_no_mask_and_no_positions_unless_documents_are_kept_apart() -> None:
    examples = packed(Causal(4, BOS, EOS), [[5, 6, 7], [8, 9]])
    assert set(Causal(4, BOS, EOS).collate(examples)) == {"input_ids", "labels"}
    assert set(Causal(4, BOS, EOS, isolate=True).collate(examples)) == {"input_ids", "labels", "position_ids"}


@pytest.mark.parametrize(("name", "apart"), [("llama", True), ("gpt2", True), ("opt", False), ("falcon_alibi", False)])
def test_families_that_keep_documents_apart(name: str, apart: bool) -> None:
    model = tiny.build(name)
    model.train()
    assert keeps_documents_apart(model) == apart
    assert model.training


@pytest.mark.parametrize(("name", "apart"), [("llama", True), ("opt", False)])
def test_tokens_that_do_not_differ_do_not_decide_it(name: str, apart: bool) -> None:
    """A vocabulary's first rows are often bytes that were never trained; what differs between them is rounding."""
    model = tiny.build(name)
    with torch.no_grad():
        rows: Any = model.get_input_embeddings().weight
        rows[3:12] = rows[3]
    first, other = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[9, 10, 11, 6, 7, 8]])
    seen = [model(input_ids=ids, use_cache=False).logits[0, 3:] for ids in (first, other)]
    assert torch.equal(*seen)  # the control: by these nothing can be told
    assert keeps_documents_apart(model) == apart


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k checkpoint is not next to the project")
def test_a_pretrained_llama_keeps_documents_apart() -> None:
    assert keeps_documents_apart(regroup.load(STORIES))


def test_documents_in_a_window_are_computed_as_if_alone() -> None:
    model = tiny.build("llama")
    documents = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
    objective = Causal(12, BOS, EOS, document_bos=True, isolate=True)
    batch = objective.collate(packed(objective, documents))
    with torch.no_grad():
        joined = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([[BOS, *d, EOS]]), use_cache=False).logits[0] for d in documents]
        crossing = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    expected = torch.cat(alone)[:12]
    assert torch.allclose(joined, expected, atol=1e-4)
    assert not torch.allclose(crossing, expected, atol=1e-2)


def test_loss_does_not_cross_borders() -> None:
    """transformers' own loss on the labels is the mean over documents alone, of what is inside a document."""
    model = tiny.build("llama")
    documents = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
    objective = Causal(12, BOS, EOS, document_bos=True, isolate=True)
    batch = objective.collate(packed(objective, documents))
    with torch.no_grad():
        found = model(**batch, use_cache=False).loss
        nats = []
        # The second end is the thirteenth token.
        for ids in ([BOS, *documents[0], EOS], [BOS, *documents[1]]):
            rows = torch.tensor([ids])
            log_p = model(input_ids=rows, use_cache=False).logits[0].log_softmax(-1)
            nats += [-log_p[place, ids[place + 1]] for place in range(len(ids) - 1)]
    assert objective.count_tokens(batch) == len(nats)
    assert torch.allclose(found, torch.stack(nats).mean(), atol=1e-5)


def restored(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text from a corrupted input and its target."""
    spans: dict[int, list[int]] = {}
    now: list[int] = []
    for token in target[:-1]:
        if token in sentinels:
            now = spans[token] = []
        else:
            now.append(token)
    return [part for token in source[:-1] for part in spans.get(token, [token])]


@settings(max_examples=60)
@given(st.integers(8, 300), st.integers(0, 2**32))
def test_a_target_restores_its_input(window: int, seed: int) -> None:
    objective = SpanCorruption(window, EOS, SENTINELS, start_token=0)
    rng = random.Random(seed)
    ids = [rng.randrange(3, 100) for _ in range(objective.raw_length)]
    (example,) = packed(objective, [ids])
    noisy = objective.corrupt(example, random.Random(seed))
    source, target = noisy["input"].tolist(), noisy["target"].tolist()
    assert restored(source, target, SENTINELS) == ids
    assert source[-1] == target[-1] == EOS
    assert source[0] not in SENTINELS
    assert target[0] == SENTINELS[0]
    spans = [token for token in source if token in SENTINELS]
    assert spans == list(SENTINELS[: len(spans)]) == [token for token in target if token in SENTINELS]
    noise, count = objective.noise
    assert len(spans) == count
    assert len(target) == objective.target_length == noise + count + 1
    assert len(source) == len(ids) - noise + count + 1 <= window
    # No two spans touch: each sentinel but the last is followed by text.
    assert all(a not in SENTINELS or b not in SENTINELS for a, b in itertools.pairwise(source))
    # Another draw is another noise, and the text itself does not change.
    assert restored(target, source, SENTINELS) != ids
    assert example["ids"].tolist() == ids


def test_the_lengths_are_those_of_t5() -> None:
    """From T5's own ``random_spans_helper``: 512 tokens of input hold 568 of text, and its targets have 114."""
    objective = SpanCorruption(512, EOS, SENTINELS, start_token=0)
    assert (objective.raw_length, objective.target_length) == (568, 114)
    assert objective.noise == (85, 28)


def test_noise_is_fifteen_percent_in_spans_of_three_anywhere() -> None:
    objective = SpanCorruption(128, EOS, SENTINELS, start_token=0)
    size = objective.raw_length
    example = {"ids": np.arange(1000, 1000 + size, dtype=np.int32)}
    masked = np.zeros(size)
    lengths: list[int] = []
    draws = 2000
    for seed in range(draws):
        target = objective.corrupt(example, random.Random(seed))["target"].tolist()
        masked[[token - 1000 for token in target if token >= 1000]] += 1
        length = 0
        for token in target[1:]:
            if token >= 1000:
                length += 1
            else:
                lengths.append(length)
                length = 0
    assert masked.sum() / draws / size == pytest.approx(0.15, abs=0.005)
    assert np.mean(lengths) == pytest.approx(3, abs=0.1)
    assert set(range(1, 8)) <= set(lengths)
    # Each token is noise about as often as the others, but for the first, which never is, and the last, always.
    assert masked[0] == 0
    assert masked[-1] == draws
    assert masked[5:-15].min() > 0.08 * draws
    assert masked[5:-15].max() < 0.25 * draws


def test_every_mask_is_equally_likely() -> None:
    """Brute force over all partitions of a small piece."""
    objective = SpanCorruption(10, EOS, SENTINELS, start_token=0, density=0.4, mean_span=2.0)
    noise, spans = objective.noise
    size = objective.raw_length
    assert spans > 1
    example = {"ids": np.arange(1000, 1000 + size, dtype=np.int32)}
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        target = tuple(objective.corrupt(example, random.Random(seed))["target"].tolist())
        seen[target] = seen.get(target, 0) + 1

    def partitions(items: int, parts: int) -> int:
        return 1 if parts == 1 else sum(partitions(items - first, parts - 1) for first in range(1, items - parts + 2))

    assert len(seen) == partitions(noise, spans) * partitions(size - noise, spans)
    assert min(seen.values()) > 0.6 * 6000 / len(seen)
    assert max(seen.values()) < 1.5 * 6000 / len(seen)


def test_batches_of_span_corruption_need_no_padding() -> None:
    objective = SpanCorruption(20, EOS, SENTINELS, start_token=7)
    raw = packed(objective, [list(range(3, 90)), list(range(3, 50))])
    batch = objective.collate([objective.corrupt(example, random.Random(1)) for example in raw])
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape == (len(raw), 20)
    assert batch["decoder_input_ids"][:, 0].tolist() == [7] * len(raw)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert objective.count_tokens(batch) == batch["labels"].numel()
    joined = [*range(3, 90), *range(3, 50)]
    assert [token for example in raw for token in example["ids"]] == joined[: len(raw) * objective.raw_length]


def sentinel_tokenizer(form: str, eos: bool = True) -> Any:
    words = ["<pad>", "</s>", "<unk>", "a", *(form.format(number) for number in range(3))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    names: dict[str, Any] = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", **names)


@pytest.mark.parametrize("form", ["<extra_id_{}>", "▁<extra_id_{}>"])
def test_sentinels_come_from_the_tokenizer(form: str) -> None:
    objective = make_objective("span-corruption", sentinel_tokenizer(form), window=16, start_token=0)
    assert objective == SpanCorruption(16, 1, (4, 5, 6), 0)


@pytest.mark.parametrize(
    ("name", "tokenizer", "options", "words"),
    [
        ("causal", texts.tokenizer(bos=False, eos=False), {}, "lacks an end-of-sequence token"),
        ("causal", texts.tokenizer(), {"window": 1}, "too short"),
        ("mlm", texts.tokenizer(), {}, "not known"),
        ("span-corruption", texts.tokenizer(), {"start_token": 0}, "lacks sentinels"),
        ("span-corruption", texts.tokenizer(eos=False), {"start_token": 0}, "lacks an end"),
        ("span-corruption", sentinel_tokenizer("<extra_id_{}>"), {}, "decoder begins"),
        ("span-corruption", sentinel_tokenizer("<extra_id_{}>"), {"start_token": 0, "window": 512}, "at most 3 spans"),
        ("pairs", texts.tokenizer(), {}, "decoder begins"),
    ],
)
def test_objectives_that_cannot_be(name: str, tokenizer: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RegroupError, match=words):
        make_objective(name, tokenizer, **{"window": 16, **options})


def test_pairs_are_batched_as_for_evaluation() -> None:
    tokenizer = texts.tokenizer()
    pairs = [("the cat sat on the mat", "flat"), ("hat", "the hat is flat"), ("on", "is")]
    objective = make_objective("pairs", tokenizer, window=6, max_target=4, start_token=2)
    assert objective == Pairs(6, 4, 2, 0)
    batch = objective.collate(packed(objective, objective.encode(tokenizer, pairs)))
    assert batch["input_ids"].shape[1] <= 6
    assert batch["labels"].shape[1] <= 4
    for number, pair in enumerate(pairs):
        (alone,) = pair_batches([pair], tokenizer, batch_size=1, start_token=2, max_length=6)
        length, target = alone.inputs["input_ids"].shape[1], min(4, alone.targets.shape[1])
        assert torch.equal(batch["input_ids"][number, :length], alone.inputs["input_ids"][0])
        assert torch.equal(batch["labels"][number, :target], alone.targets[0, :target])
        before = alone.inputs["decoder_input_ids"]
        assert torch.equal(batch["decoder_input_ids"][number, :target], before[0, :target])
        assert batch["attention_mask"][number].sum() == length
        assert batch["decoder_attention_mask"][number].sum() == target
        assert (batch["labels"][number, target:] == IGNORED).all()
        assert (batch["decoder_input_ids"][number] >= 0).all()
    assert objective.count_tokens(batch) == int(batch["decoder_attention_mask"].sum())


def test_pairs_with_an_empty_side_are_refused() -> None:
    tokenizer = texts.tokenizer()
    objective = make_objective("pairs", tokenizer, window=6, start_token=2)
    with pytest.raises(RegroupError, match="empty side"):
        packed(objective, objective.encode(tokenizer, [("a", "")]))
