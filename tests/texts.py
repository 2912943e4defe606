"""A tokenizer that fits the tiny checkpoints, made in code."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny

# Letters, digits, line ends, and characters of two, three and four bytes.
TEXT = "the cat sat on the mat; the hat is flat.\nnaïve café: 步步 🙂 or 42 cats\n" * 40


def tokenizer(*, bos: bool = True, eos: bool = True) -> Any:
    """Byte-level BPE with no more tokens than the tiny checkpoints have: pad 0, bos 1, eos 2, as in ``tiny``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=tiny.VOCAB_SIZE, special_tokens=special, show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    names = {"pad_token": "<pad>"} | ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
