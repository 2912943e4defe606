"""The examples of a page of the documentation: found, parsed against the command line, and what they need made small."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import texts
import tiny
from regroup.cli import app

# A comment in a block: what follows, to the block's end, is parsed and not run.
NOT_RUN = "# not run in CI: "
_VERBS: Any = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what is in it, and its line in the page."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command of a shell block: its words, whether it is run, and what the page says that it prints, if it does."""

    words: tuple[str, ...]
    runs: bool
    printed: str | None = None

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """What ``regroup`` is given, by whatever it is started; None where it is another program."""
        for index, word in enumerate(self.words):
            if word.rsplit("/")[-1] == "regroup" and index == 0 or word == "regroup.cli" and self.words[index - 1] == "-m":
                return self.words[index + 1 :]
        return None


def blocks(page: str) -> list[Block]:
    return [
        Block(found[1], found[2], page[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of shell (a line each) or of a session (behind prompts, with what they print)."""
    runs = True
    if block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            line, _, printed = part.partition("\n")
            yield Command(tuple(shlex.split(line, comments=True)), runs, printed)
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith(NOT_RUN):
            runs = False
        if words := tuple(shlex.split(line, comments=True)):
            yield Command(words, runs)


def misused(arguments: tuple[str, ...]) -> str | None:
    """Why the command line would not take these arguments: an unknown verb or option, a value of another type."""
    verb, command, rest = "regroup", _VERBS, list(arguments)
    while hasattr(command, "commands"):
        if rest and rest[0] in {"--help", "--version"}:
            return None
        if not rest or rest[0] not in command.commands:
            return f"{verb}: no such verb: {' '.join(rest)}"
        verb, command, rest = f"{verb} {rest[0]}", command.commands[rest[0]], rest[1:]
    try:
        command.make_context(verb, rest)
    except typer.Exit:
        return None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return f"{verb}: {error.format_message()}"  # type: ignore[attr-defined]
    return None


def furnish(folder: Path, *, layers: int) -> None:
    """What the examples start from, under the names that they use: models of the same heads with few, random weights,
    and a few thousand tokens of text."""
    tokenizer = texts.tokenizer()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=4,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    llama.save_pretrained(folder / "llama-2-7b")
    tokenizer.save_pretrained(folder / "llama-2-7b")
    (folder / "meta-llama").mkdir()
    for name in ("parent", "meta-llama/Llama-2-7b-hf"):
        (folder / name).symlink_to(folder / "llama-2-7b")
    t5 = T5Config(vocab_size=tiny.VOCAB_SIZE, d_model=24, d_kv=2, d_ff=32, num_heads=12, num_layers=12)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5-base")
    for name in ("held-out.txt", "train.txt", "valid.txt"):
        (folder / name).write_text(texts.TEXT * 6, encoding="utf-8")
    for name in ("text.jsonl", "train.jsonl"):
        (folder / name).write_text(f"{json.dumps({'text': texts.TEXT})}\n" * 6, encoding="utf-8")
    rows = [{"source": "the cat", "target": "sat on the mat"}, {"source": "the hat", "target": "is flat"}]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
