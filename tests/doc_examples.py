"""The examples of a page of the documentation: found, parsed against the command line, and given what they need."""

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
_COMMANDS: Any = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what is in it, its line in the page, and the name of the file that it shows."""

    language: str
    text: str
    line: int
    file: str | None = None


@dataclass(frozen=True)
class Command:
    """A command of a shell block: its words, whether it is run, and what the page says that it prints, if it does."""

    words: tuple[str, ...]
    runs: bool
    printed: str | None = None

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """What ``regroup`` is given, by whatever it is started; None where it is another program."""
        if self.words[0].rsplit("/")[-1] == "regroup":
            return self.words[1:]
        if "regroup.cli" in self.words:
            return self.words[self.words.index("regroup.cli") + 1 :]
        return None


def blocks(page: str) -> list[Block]:
    found = []
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", page, re.M | re.S):
        before = page[: block.start()]
        # Named by a comment, or where there are none by the text before it.
        name = re.match(r"# (\S+\.yaml)\n", block[2]) or re.search(r"`(\S+\.json)`:\n\n$", before)
        found.append(Block(block[1], block[2], before.count("\n") + 1, name[1] if name else None))
    return found


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
    """Why the command line would not take these arguments: an unknown command or option, a value of another type."""
    name, command, rest = "regroup", _COMMANDS, list(arguments)
    while hasattr(command, "commands"):
        if rest and rest[0] in {"--help", "--version"}:
            return None
        if not rest or rest[0] not in command.commands:
            return f"{name}: no such command: {' '.join(rest)}"
        name, command, rest = f"{name} {rest[0]}", command.commands[rest[0]], rest[1:]
    try:
        command.make_context(name, rest)
    except typer.Exit:
        return None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return f"{name}: {error.format_message()}"  # type: ignore[attr-defined]
    return None


def launched(words: tuple[str, ...]) -> None:
    """Parse the options of a launcher of several processes; ``SystemExit`` where it does not take them."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])
    elif words[:2] == ("accelerate", "launch"):
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args(words[2:])


def furnish(folder: Path, *, layers: int) -> None:
    """What the examples start from, under the names that they use: models of the same heads with few, random weights,
    and a few thousand tokens of text."""
    _llama(folder / "llama-2-7b", layers=layers, heads=32, kv_heads=32)
    _llama(folder / "original", layers=1, heads=8, kv_heads=4)
    (folder / "meta-llama").mkdir()
    (folder / "meta-llama/Llama-2-7b-hf").symlink_to(folder / "llama-2-7b")
    t5 = T5Config(vocab_size=tiny.VOCAB_SIZE, d_model=24, d_kv=2, d_ff=32, num_heads=12, num_layers=12)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5-base")
    for name in ("held-out.txt", "train.txt", "valid.txt"):
        # A step of training takes 4,096 tokens.
        (folder / name).write_text(texts.TEXT * (8 if name == "train.txt" else 2), encoding="utf-8")
    for name in ("text.jsonl", "train.jsonl", "held-out.jsonl"):
        (folder / name).write_text(f"{json.dumps({'text': texts.TEXT})}\n" * 6, encoding="utf-8")
    rows = [{"source": "the cat", "target": "sat on the mat"}, {"source": "the hat", "target": "is flat"}]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _llama(folder: Path, *, layers: int, heads: int, kv_heads: int) -> None:
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)
