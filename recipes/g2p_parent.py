"""Train a small encoder-decoder from nothing that reads words aloud: letters in, phonemes out.

    DATA=../shared/data/g2p
    python recipes/g2p_parent.py $DATA-train.tsv $DATA-valid.tsv $DATA-test.tsv --output g2p-parent

It has the shape of T5 1.1 (relative position bias, gated GELU, untied embeddings) with 8 heads, three layers a side and
1.4 million parameters, and is the parent that `g2p_conversion.py` converts. One thread of an ordinary processor is
enough. Equal seed, machine and versions give equal weights.

Files hold a word, a tab and its pronunciation a line. In these pronunciations every character is one symbol: a phoneme
(affricates and diphthongs have a letter of their own, as ʧ and O) or a stress mark, ˈ or ˌ. There are no length marks
or diacritics to attach. The *phoneme error rate* is the number of symbols that are inserted, left out or wrong over the
number of symbols in the reference, stress marks counted as symbols; without stress, they are struck from both sides
first."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from regroup.data import IGNORED, Batch, pair_batches, read_pairs
from regroup.evaluation import score
from regroup.record import machine

PAD, END, UNKNOWN = 0, 1, 2  # token ids, as in T5
STRESS = str.maketrans("", "", "ˈˌ")
POOL = 16  # batches whose pairs are sorted by length together: like lengths share a batch, yet epochs differ
LOG_EVERY = 50  # steps between lines of the log and points of the recorded loss curve

Pairs = Sequence[tuple[str, str]]


def edit_distance(hypothesis: str, reference: str) -> int:
    """The least number of symbols inserted, left out or replaced that makes one string the other (Levenshtein)."""
    row = list(range(len(reference) + 1))
    for i, symbol in enumerate(hypothesis, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(reference, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != wanted))
    return row[-1]


def errors(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[int], list[int]]:
    """Wrong symbols and symbols of the reference, word by word."""
    wrong = [edit_distance(h, r) for h, r in zip(hypotheses, references, strict=True)]
    return wrong, [len(r) for r in references]


def phoneme_error_rate(hypotheses: Sequence[str], references: Sequence[str], *, stress: bool = True) -> float:
    """Wrong symbols over symbols of the references, over all words together; it can exceed 1.

    Without ``stress``, stress marks are struck from both sides first.
    """
    if not stress:
        hypotheses = [h.translate(STRESS) for h in hypotheses]
        references = [r.translate(STRESS) for r in references]
    wrong, symbols = errors(hypotheses, references)
    return sum(wrong) / sum(symbols)


def new_tokenizer(pairs: Pairs) -> PreTrainedTokenizerFast:
    """One token a character, letters and phonemes in one vocabulary; every text ends in ``</s>``."""
    characters = sorted({character for pair in pairs for side in pair for character in side})
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN}
    vocabulary |= {character: number for number, character in enumerate(characters, len(vocabulary))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int, dropout: float) -> T5ForConditionalGeneration:
    """A randomly initialised T5 1.1: 8 heads of 16 dimensions, as many KV heads."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=16,
        d_ff=320,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=8,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=END,
    )
    config.decoder_start_token_id = PAD
    # T5 1.1 has a head of its own and does not scale what enters it. Transformers reads both from
    # tie_word_embeddings=False in config.json, but ties every new model, and without tying would also give encoder and
    # decoder embeddings of their own. So the head is cut loose here, and the config then says what is stored.
    config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    model.all_tied_weights_keys.pop("lm_head.weight")
    config.tie_word_embeddings = False
    # The stock deviation is 1, which makes the first logits of an untied head about ±11.
    for embedding in (model.shared, model.lm_head):
        nn.init.normal_(embedding.weight, std=config.d_model**-0.5)
    return model


def training_batches(
    pairs: Pairs, tokenizer: PreTrainedTokenizerFast, size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Endless batches of pairs of like length; order, company and batches are new in each epoch."""
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for first in range(0, len(order), POOL * size):
            pool = [pairs[i] for i in order[first : first + POOL * size]]
            batches = list(pair_batches(pool, tokenizer, batch_size=size, start_token=PAD))
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def schedule(step: int, warmup: int, steps: int) -> float:
    """The share of the peak learning rate at `step`: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: T5ForConditionalGeneration,
    batches: Iterator[Batch],
    steps: int,
    *,
    learning_rate: float,
    warmup: int,
    weight_decay: float,
    log: Callable[[int, float], None],
) -> None:
    """AdamW with warm-up and cosine; ``log`` is told the step and the mean loss since the last call, nats per token."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, warmup, steps))
    model.train()
    recent: list[float] = []
    for step, batch in enumerate(islice(batches, steps), 1):
        logits = model(**batch.inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            log(step, sum(recent) / len(recent))
            recent = []
    model.eval()


@torch.inference_mode()
def pronounce(model: Any, tokenizer: Any, words: Sequence[str], batch_size: int = 256) -> list[str]:
    """Greedy pronunciations of words, in their order.

    A pronunciation is cut off at twice the letters of the longest word in its batch, and 8 symbols: no entry of the
    dictionary is longer, but a broken model need not end at all. Words of like length share a batch.
    """
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    said = [""] * len(words)
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        inputs = tokenizer([words[i] for i in part], return_tensors="pt", padding=True, return_token_type_ids=False)
        limit = 2 * len(words[part[-1]]) + 8
        ids = model.generate(**inputs, do_sample=False, num_beams=1, use_cache=True, max_new_tokens=limit)
        # Decoding would skip tokens that are unknown; they are errors, and one symbol each.
        texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in _symbols(ids.tolist())]
        for i, text in zip(part, texts, strict=True):
            said[i] = text.replace("<unk>", "\N{REPLACEMENT CHARACTER}")
    return said


def _symbols(rows: list[list[int]]) -> Iterator[list[int]]:
    """What stands between the start token and the end, paddings on the way struck."""
    for row in rows:
        end = row.index(END) if END in row else len(row)
        yield [token for token in row[:end] if token != PAD]


def evaluate(model: Any, tokenizer: Any, pairs: Pairs, said: Sequence[str]) -> dict[str, float]:
    """Error rates of the pronunciations ``said``, and the loss on the reference ones, in nats per token, end included.

    A word is wrong if any of its symbols is.
    """
    references = [pronunciation for _, pronunciation in pairs]
    loss = score(model, pair_batches(pairs, tokenizer, batch_size=256, start_token=PAD))
    return {
        "words": len(pairs),
        "phoneme_error_rate": phoneme_error_rate(said, references),
        "phoneme_error_rate_without_stress": phoneme_error_rate(said, references, stress=False),
        "word_error_rate": sum(a != b for a, b in zip(said, references, strict=True)) / len(pairs),
        "nats_per_token": loss.nats_per_token,
    }


def main(
    training: Path,
    validation: Path,
    test: Path,
    output: Annotated[Path, typer.Option(help="Folder for the finished checkpoint.")],
    steps: Annotated[int, typer.Option(min=1)] = 2200,
    batch: Annotated[int, typer.Option(min=1, help="Words a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 2e-3,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of linear warm-up.")] = 200,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train tokenizer and model, and write a checkpoint folder with a record of its training (training.json)."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs, valid, held = (list(read_pairs(path)) for path in (training, validation, test))
    tokenizer = new_tokenizer(pairs)
    model = new_model(len(tokenizer), dropout)

    start, curve = time.monotonic(), []

    def log(step: int, loss: float) -> None:
        curve.append([step, round(loss, 4)])
        typer.echo(f"step {step}: {loss:.4f} nats per token, {time.monotonic() - start:.0f} s")

    batches = training_batches(pairs, tokenizer, batch, generator)
    train(
        model,
        batches,
        steps,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        log=log,
    )
    seconds = time.monotonic() - start

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    found = {
        name: evaluate(model, tokenizer, part, pronounce(model, tokenizer, [word for word, _ in part]))
        for name, part in (("validation", valid), ("test", held))
    }
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "text": {"training": training.name, "validation": validation.name, "test": test.name},
        "training_words": len(pairs),
        "parameters": model.num_parameters(),
        **found,
        "steps": steps,
        "epochs": round(steps * batch / len(pairs), 2),
        "batch_words": batch,
        "dropout": dropout,
        "optimizer": {"name": "AdamW", "betas": [0.9, 0.98], "weight_decay": weight_decay, "clip_norm": 1.0},
        "learning_rate": {"peak": learning_rate, "warmup_steps": warmup, "decay": "cosine to 0 at the last step"},
        "seed": seed,
        "wall_seconds": round(seconds),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "loss_curve": {"columns": ["step", "mean_nats_per_token"], "rows": curve},
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, result in found.items():
        typer.echo(
            f"{name}: phoneme error rate {result['phoneme_error_rate']:.2%}, without stress "
            f"{result['phoneme_error_rate_without_stress']:.2%}, {result['nats_per_token']:.4f} nats per token"
        )


if __name__ == "__main__":
    typer.run(main)
