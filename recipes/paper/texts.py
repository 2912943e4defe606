"""The text of the experiments, divided so that no two uses of it overlap.

Books are cut into passages at the ends of paragraphs, the passages are shuffled, and each use gets its own:
pre-training, uptraining, calibration, fine-tuning. Evaluation is on books of other authors.

- *pronunciation*: a word to its phonemes (a dictionary; `g2p_parent.py` says more of its symbols).
- *restoration*: a clause of a book without capitals, spaces and punctuation to the clause as it was printed.
- *continuation*: the words that follow a passage, told from three that follow elsewhere.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from regroup.data import read_pairs
from regroup.errors import RegroupError

PAD, END, UNKNOWN = 0, 1, 2  # token ids, as in T5
SENTINELS = 100
PASSAGE = 2000  # characters
CLAUSE = (6, 16)  # letters and digits of a clause to restore
CHOICES = 4
COMMON = 20  # a character that is rarer in the books is unknown
FILES = ("gutenberg-train.txt.gz", "gutenberg-valid.txt.gz", "g2p-train.tsv", "g2p-valid.tsv", "g2p-test.tsv")


@dataclass(frozen=True)
class Texts:
    """Files below the work folder, by use."""

    folder: Path

    @property
    def pretraining(self) -> Path:
        return self.folder / "pretraining.jsonl"

    @property
    def uptraining(self) -> Path:
        return self.folder / "uptraining.jsonl"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.jsonl"

    @property
    def continuation(self) -> Path:
        return self.folder / "continuation.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def tuning(self, task: str) -> Path:
        return self.folder / f"{task}-train.jsonl"

    def dev(self, task: str) -> Path:
        return self.folder / f"{task}-dev.jsonl"


def prepare(data: Path, work: Path, *, pretraining: int, uptraining: int, calibration: int, held_out: int) -> Texts:
    """Divide the text; numbers are of characters, ``held_out`` of words, clauses and passages.

    Raises:
        RegroupError: a file is missing, or there is too little text.
    """
    for name in FILES:
        if not (data / name).is_file():
            raise RegroupError(
                "the text of the experiments is not there",
                file=data / name,
                expected=", ".join(FILES),
                remedy="books are plain text, gzipped; dictionaries have a word, a tab and its pronunciation a line",
            )
    texts = Texts(work / "texts")
    if (texts.folder / "complete").exists():
        return texts
    texts.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    books = _read(data / FILES[0])
    passages = _passages(books)
    draw.shuffle(passages)
    uses = {texts.pretraining: pretraining, texts.uptraining: uptraining, texts.calibration: calibration}
    for path, characters in uses.items():
        _write(path, ({"text": text} for text in _take(passages, characters, path)))
    lines = [line for text in passages for line in _clauses(text)]
    other = _passages(_read(data / FILES[1]))
    draw.shuffle(other)
    _write(texts.held_out, ({"text": text} for text in other[: len(other) // 2]))
    unseen = [line for text in other[len(other) // 2 :] for line in _clauses(text)]
    pairs = {
        (texts.tuning, "restoration"): [(bare(line), line) for line in lines],
        (texts.dev, "restoration"): [(bare(line), line) for line in unseen],
        (texts.tuning, "pronunciation"): list(read_pairs(data / FILES[2])),
        (texts.dev, "pronunciation"): list(read_pairs(data / FILES[3])),
    }
    for (place, task), found in pairs.items():
        draw.shuffle(found)
        kept = found
        if place == texts.dev:
            # Short clauses are in many books: what was learned by heart is not asked.
            learned = {source for source, _ in pairs[texts.tuning, task]}
            kept = [pair for pair in found if pair[0] not in learned][:held_out]
        _write(place(task), ({"source": source, "target": target} for source, target in kept))
    _write(texts.continuation, _continuations(other[len(other) // 2 :], held_out, draw))
    symbols = {character for pair in pairs[texts.tuning, "pronunciation"] for side in pair for character in side}
    new_tokenizer(books, symbols).save_pretrained(texts.tokenizer)
    (texts.folder / "complete").touch()
    return texts


def bare(line: str) -> str:
    """A line without capitals, spaces and punctuation."""
    return "".join(character for character in line.lower() if character.isalnum())


def new_tokenizer(books: str, symbols: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a character, books' and phonemes' in one vocabulary, with T5's sentinels; ``</s>`` ends a text."""
    common = {character for character, count in Counter(books).items() if count >= COMMON}
    characters = sorted(common | set(symbols))
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN}
    vocabulary |= {character: number for number, character in enumerate(characters, len(vocabulary))}
    sentinels = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    vocabulary |= {sentinel: number for number, sentinel in enumerate(sentinels, len(vocabulary))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
    )


def _read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def _passages(text: str) -> list[str]:
    """Pieces of some ``PASSAGE`` characters that end where a paragraph does."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PASSAGE)
        end = len(text) if end < 0 else end + 2
        # Paragraphs are filled lines; one line each is what running text looks like elsewhere.
        pieces.append(re.sub(r"(?<!\n)\n(?!\n)", " ", text[start:end]))
        start = end
    return pieces


def _take(passages: list[str], characters: int, path: Path) -> list[str]:
    taken: list[str] = []
    length = 0
    while length < characters:
        if not passages:
            raise RegroupError(
                "there is too little text for this scale", file=path, expected=f"{characters:,} characters"
            )
        taken.append(passages.pop())
        length += len(taken[-1])
    return taken


def _clauses(passage: str) -> list[str]:
    """Clauses of a passage that are neither short nor long, without the indentation of verse."""
    found = (re.sub(r"\s+", " ", line).strip() for line in re.findall(r"[^.!?,;:\n]+[.!?,;:]", passage))
    return [line for line in found if CLAUSE[0] <= len(bare(line)) <= CLAUSE[1]]


def _continuations(passages: Sequence[str], count: int, draw: random.Random) -> list[dict[str, object]]:
    """Rows of a source, several continuations, and which is the real one."""
    cut = [(text[:100], text[100:140]) for text in passages if len(text) >= 140][:count]
    rows = []
    for number, (source, real) in enumerate(cut):
        others = draw.sample([end for place, (_, end) in enumerate(cut) if place != number], CHOICES - 1)
        answer = draw.randrange(CHOICES)
        choices = [*others[:answer], real, *others[answer:]]
        rows.append({"source": source, "choices": choices, "answer": answer})
    return rows


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
