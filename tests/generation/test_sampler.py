"""Text that a model writes itself: which tokens, from which numbers, and what it does not depend on."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import texts
import tiny
from regroup.errors import RegroupError
from regroup.generation import DegenerateTextError, Sampler, Vocabulary, open_sampler
from regroup.generation.degenerate import degenerate

DOUBLE = torch.float64
CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def sampler(name: str = "llama", *, config: Any = CONFIG, tokenizer: Any = None, **options: Any) -> Sampler:
    # Experts have no products in float64.
    model = tiny.build(name, dtype=torch.float32 if name in ("mixtral", "qwen2_moe") else DOUBLE)
    vocabulary = Vocabulary.of(tiny.VOCAB_SIZE, config, tokenizer=tokenizer)
    return Sampler(model, vocabulary, **{"seed": 3, "stream": "calibration", **options})


def numbers_of(seed: int, stream: str, number: int, count: int) -> list[float]:
    """The uniform numbers of a window, by their definition."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=DOUBLE).tolist()


def inverse(logits: Tensor, number: float, allowed: Tensor, temperature: float = 1.0) -> int:
    """The token whose part of the cumulative distribution holds the number, added up one token at a time."""
    weights = torch.where(allowed, (logits.double() / temperature).softmax(-1), 0.0).tolist()
    target, total = number * sum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if weight and total > target:
            return token
    raise AssertionError


@torch.no_grad()
def by_full_forwards(
    model: Any, numbers: list[float], start: int, ends: set[int], allowed: Tensor, temperature: float
) -> list[int]:
    """One window without a cache: every token from a forward pass over all before it."""
    ids = [start]
    for number in numbers[1:]:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(start if ids[-1] in ends and ids[-1] != start else inverse(logits, number, allowed, temperature))
    return ids


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_windows_are_what_full_forward_passes_draw_from_the_same_numbers(temperature: float) -> None:
    found = sampler(temperature=temperature)
    windows = found.windows(4, 3, 24)
    allowed = torch.arange(tiny.VOCAB_SIZE) != 0
    for row, number in zip(windows.tolist(), range(4, 7), strict=True):
        numbers = numbers_of(3, "calibration", number, 24)
        assert row == by_full_forwards(found.model, numbers, 1, {2}, allowed, temperature)
    # Other numbers give other text.
    assert windows[0].tolist() != by_full_forwards(
        found.model, numbers_of(4, "calibration", 4, 24), 1, {2}, allowed, temperature
    )


def test_a_window_depends_on_seed_stream_and_number_alone() -> None:
    together = sampler(batch=7).windows(0, 7, 20)
    assert torch.equal(sampler(batch=2).windows(0, 7, 20), together)
    assert torch.equal(sampler(batch=3).windows(2, 4, 20), together[2:6])
    # A longer window begins with the shorter one.
    assert torch.equal(sampler().windows(5, 1, 30)[:, :20], together[5:6])
    assert len({tuple(row) for row in together.tolist()}) == 7


def test_streams_and_seeds_have_texts_of_their_own() -> None:
    rows = [
        tuple(row)
        for stream in ("calibration", "evaluation", "uptraining")
        for seed in (0, 1)
        for row in sampler(stream=stream, seed=seed).windows(0, 4, 20).tolist()
    ]
    assert len(set(rows)) == len(rows)


def test_a_text_that_ends_is_followed_by_the_start_of_another() -> None:
    found = sampler()
    head: Any = found.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB_SIZE, dtype=DOUBLE))
    head.bias.data[2] = 4.0  # ends come often, now
    rows = found.windows(0, 8, 60).tolist()
    after = [b for row in rows for a, b in itertools.pairwise(row) if a == 2]
    assert len(after) > 10
    assert set(after) == {1}


def test_a_separator_both_ends_a_text_and_starts_the_next() -> None:
    # As in GPT-2: one token does both, and the model goes on by itself.
    found = sampler(config={"bos_token_id": 2, "eos_token_id": 2})
    head: Any = found.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB_SIZE, dtype=DOUBLE))
    head.bias.data[2] = 4.0
    rows = found.windows(0, 8, 60)
    assert (rows[:, 0] == 2).all()
    after = [b for row in rows.tolist() for a, b in itertools.pairwise(row[1:]) if a == 2]
    assert len(set(after)) > 5


@pytest.mark.parametrize(
    ("start", "bos", "expected"),
    [
        ("bos", 1, [1, 1, 1]),
        ("document", 1, [2, 2, 2]),
        ("bos", None, [2, 2, 2]),
        ("text", 1, [1, 1, 1]),
        ("text", None, [2, 2, 2]),
    ],
)
def test_windows_start_as_asked(start: str, bos: int | None, expected: list[int]) -> None:
    config = {**CONFIG, "bos_token_id": bos}
    assert sampler(config=config, start=start).windows(0, 3, 4)[:, 0].tolist() == expected


class Words:
    """As much of a tokenizer as tells how texts begin."""

    def __init__(self, names: dict[str, int], *, first: list[int]) -> None:
        self.names, self.first = {**{f"w{i}": i for i in range(4, 20)}, **names}, first
        self.all_special_ids = list(names.values())
        self.bos_token_id, self.eos_token_id, self.pad_token_id = 1, 2, None

    def get_vocab(self) -> dict[str, int]:
        return self.names

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*self.first, 4] if text else list(self.first)}


@pytest.mark.parametrize(
    ("names", "first", "expected"),
    [
        # Llama 2: the tokenizer puts BOS before a text.
        ({"<s>": 1, "</s>": 2}, [1], 1),
        # A chat model with a separator from pre-training, and a BOS that begins a turn.
        ({"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 3}, [], 3),
        # Both: what the tokenizer does comes first.
        ({"<s>": 1, "</s>": 2, "<|endoftext|>": 3}, [1], 1),
        # Neither.
        ({"<s>": 1, "</s>": 2}, [], 1),
    ],
)
def test_texts_start_as_the_tokenizer_starts_them(names: dict[str, int], first: list[int], expected: int) -> None:
    found = Vocabulary.of(20, CONFIG, tokenizer=Words(names, first=first))
    assert found.start("text") == expected
    assert found.start("bos") == 1


def test_every_other_window_of_a_mixture_starts_with_a_random_token() -> None:
    """Those in between are the windows of the usual start, and the others those of the random one."""
    found = {start: sampler(start=start).windows(0, 40, 3) for start in ("text", "random", "mixed")}
    assert torch.equal(found["mixed"][0::2], found["text"][0::2])
    assert torch.equal(found["mixed"][1::2], found["random"][1::2])
    assert len(set(found["mixed"][0::2, 0].tolist())) == 1
    assert len(set(found["mixed"][1::2, 0].tolist())) > 10


def test_without_bos_and_eos_a_random_token_of_text_starts() -> None:
    for found in (sampler(config={"pad_token_id": 0}), sampler(start="random")):
        starts = found.windows(0, 40, 2)[:, 0].tolist()
        assert len(set(starts)) > 20
        assert 0 not in starts


def test_a_tokenizer_without_bos_and_tokens_that_it_does_not_know() -> None:
    tokenizer = texts.tokenizer(bos=False)
    known = set(tokenizer.get_vocab().values())
    vocabulary = Vocabulary.of(200, {"vocab_size": 200}, tokenizer=tokenizer)
    assert vocabulary.bos is None
    assert vocabulary.separator == 2
    # An embedding padded beyond the tokenizer: those ids are never drawn, and padding neither.
    assert set(vocabulary.allowed.nonzero()[:, 0].tolist()) == known - {0}
    assert set(vocabulary.plain.tolist()) <= known - {0, 2}


def test_a_vocabulary_larger_than_the_embedding() -> None:
    tokenizer = texts.tokenizer()
    vocabulary = Vocabulary.of(40, {"bos_token_id": 99, "eos_token_id": [2, 77]}, tokenizer=tokenizer)
    assert vocabulary.bos == 1
    assert vocabulary.ends == {2}
    assert int(vocabulary.plain.max()) < 40
    assert Vocabulary.of(40, {"bos_token_id": 99}).bos is None


def test_ids_outside_the_tokenizer_are_not_drawn() -> None:
    found = sampler(tokenizer=texts.tokenizer(), batch=16)
    narrow = replace(found.vocabulary, allowed=torch.arange(tiny.VOCAB_SIZE) < 30)
    few = Sampler(found.model, narrow, seed=0, stream="calibration")
    assert int(few.windows(0, 8, 40).max()) < 30
    assert int(found.windows(0, 8, 40).max()) >= 30


def broken(found: Sampler, bias: Tensor, *, scale: float = 0.0) -> Sampler:
    """A sampler whose model predicts the same at every place."""
    head: Any = found.model.get_output_embeddings()
    head.weight.data *= scale
    head.bias = torch.nn.Parameter(bias.to(DOUBLE))
    return found


def peak(token: int, size: int = tiny.VOCAB_SIZE) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), size).double() * 50


@pytest.mark.parametrize(
    ("bias", "seen"),
    [
        (peak(2), "100% of the tokens end a text"),
        (peak(7), "repeats itself"),
        (torch.full((tiny.VOCAB_SIZE,), torch.nan), "NaN or infinity"),
        (torch.full((tiny.VOCAB_SIZE,), torch.inf), "NaN or infinity"),
    ],
)
def test_degenerate_text_is_refused(bias: Tensor, seen: str) -> None:
    with pytest.raises(DegenerateTextError, match=seen):
        broken(sampler(), bias).windows(0, 4, 40)
    if "NaN" not in seen:
        assert broken(sampler(check=False), bias).windows(0, 4, 40).shape == (4, 40)


def test_noise_and_small_alphabets_are_not_degenerate() -> None:
    sampler().windows(0, 4, 60)
    broken(sampler(), torch.zeros(tiny.VOCAB_SIZE)).windows(0, 4, 60)
    generator = torch.Generator().manual_seed(0)
    for alphabet in (4, 27, 256):
        noise = torch.randint(alphabet, (32, 256), generator=generator)
        assert degenerate(noise.tolist(), ()) is None
    text = list(texts.TEXT[:73].encode()) + list(b"and now for something completely different: a larch. the larch!")
    assert degenerate([text], ()) is None
    assert degenerate([text * 8], ()) is not None
    # The same text in every window is one text.
    assert degenerate([text] * 8, ()) is not None


CAUSAL = [name for name, family in tiny.FAMILIES.items() if family.kind == "causal"]
PAIRS = [name for name, family in tiny.FAMILIES.items() if family.kind == "seq2seq"]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_writes_what_its_full_forward_passes_draw(name: str) -> None:
    found = sampler(name)
    row = found.windows(0, 2, 12)[1].tolist()
    allowed = torch.arange(tiny.VOCAB_SIZE) != 0
    assert row == by_full_forwards(found.model, numbers_of(3, "calibration", 1, 12), 1, {2}, allowed, 1.0)


@torch.no_grad()
def answer_by_full_forwards(found: Sampler, source: list[int], numbers: list[float]) -> list[int]:
    ids: list[int] = []
    for number in numbers:
        before = torch.tensor([[found.vocabulary.decoder_start, *ids]])
        out = found.model(input_ids=torch.tensor([source]), decoder_input_ids=before, use_cache=False)
        ids.append(inverse(out.logits[0, -1], number, found.vocabulary.allowed))
        if ids[-1] in found.vocabulary.ends:
            break
    return ids


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_answers_to_the_model_s_own_text(name: str) -> None:
    start = tiny.FAMILIES[name].kwargs["decoder_start_token_id"]
    found = sampler(name, config={**CONFIG, "decoder_start_token_id": start})
    pairs = found.pairs(0, 3, 10)
    for number, (source, target) in enumerate(pairs):
        numbers = numbers_of(3, "calibration/target", number, 10)
        assert target == answer_by_full_forwards(found, source, numbers)
        first = numbers_of(3, "calibration/first", number, 1)[0]
        begin = found.vocabulary.plain[int(first * len(found.vocabulary.plain))]
        text = answer_by_full_forwards(found, [int(begin), 2], numbers_of(3, "calibration/source", number, 10))
        assert source == text
    assert found.pairs(1, 1, 10) == pairs[1:2]


def test_t5_fills_a_gap_in_its_own_text() -> None:
    found = sampler("t5", config={**CONFIG, "decoder_start_token_id": 0})
    found.vocabulary = replace(found.vocabulary, sentinels=(95, 94))
    pairs = found.pairs(0, 12, 12)
    for number, (source, target) in enumerate(pairs):
        assert source.count(95) == 1
        assert source[-1] == 2
        # The gap is somewhere in what it wrote when asked to fill a lone sentinel.
        text = answer_by_full_forwards(found, [95, 2], numbers_of(3, "calibration/source", number, 12))
        body = [token for token in text if token not in (95, 94, 2, 1)]
        place = source.index(95)
        tail = source[place + 1 : -1]
        tail = tail[:-1] if tail and tail[-1] == 94 else tail
        assert source[:place] == body[:place]
        assert tail == body[len(body) - len(tail) :]
        assert target == answer_by_full_forwards(found, source, numbers_of(3, "calibration/target", number, 12))
    assert any(len(source) > 4 for source, _ in pairs)


def test_a_checkpoint_is_opened(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    texts.tokenizer().save_pretrained(folder)
    windows = open_sampler(folder, seed=3, stream="calibration", device="cpu").windows(0, 4, 16)
    assert windows.dtype == torch.int64
    # float32 against float64: the numbers are the same, and hardly a token falls on the other side.
    expected = sampler(tokenizer=texts.tokenizer()).windows(0, 4, 16)
    assert float((windows == expected).float().mean()) > 0.8


def test_what_cannot_be_asked() -> None:
    wrong: list[dict[str, Any]] = [{"stream": "other"}, {"start": "middle"}, {"temperature": 0.0}]
    for options in wrong:
        with pytest.raises(RegroupError):
            sampler(**options)
