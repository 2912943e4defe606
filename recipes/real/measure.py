"""Loss of a model on held-out texts, window by window, its distance from the original, and greedy samples.

    python -m recipes.real.measure MODEL --text NAME=FILE --teacher ORIGINAL --prompt "Once upon" -o found.json

`regroup evaluate` gives the same means; single windows are kept here, so that any two models can be compared on equal
text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from regroup.data import causal_batches, read_texts, token_windows
from regroup.evaluation import score
from regroup.evaluation.run import load_for_scoring
from regroup.modeling import load_tokenizer


def main(
    model: Path,
    text: Annotated[list[str], typer.Option(help="NAME=FILE; may be repeated.")],
    teacher: Annotated[Path | None, typer.Option()] = None,
    window: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option()] = 32,
    document_starts: Annotated[bool, typer.Option("--document-starts")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    new: Annotated[int, typer.Option(help="Tokens of a sample.")] = 40,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("measured.json"),
) -> None:
    tokenizer, student = load_tokenizer(model), load_for_scoring(model, "float32", "cpu")
    original = None if teacher is None else load_for_scoring(teacher, "float32", "cpu")
    found: dict[str, Any] = {"texts": {}, "samples": [sample(student, tokenizer, words, new) for words in prompt or []]}
    for named in text:
        name, _, file = named.partition("=")
        cut, _ = token_windows(
            read_texts(file), tokenizer, length=window, limit=windows, document_starts=document_starts, file=file
        )
        found["texts"][name] = [of_window(student, original, row) for row in cut.split(1)]
    part = output.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(output)


def of_window(student: Any, original: Any, window: torch.Tensor) -> dict[str, Any]:
    """Means over the predicted tokens of one window."""
    found = score(student, causal_batches(window, 1), teacher=original)
    return {
        "tokens": found.tokens,
        "nats": found.nats_per_token,
        "original_nats": found.teacher_nats_per_token,
        "kl": found.kl_nats_per_token,
        "top1": found.top1_agreement,
    }


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """What the model finds most likely after a prompt: the continuation alone."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    typer.run(main)
