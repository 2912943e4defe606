"""The model card that travels with a converted checkpoint."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..plans import PLAN_FILE, RESULT_FILE, Result
from ..safe_text import code_span, visible
from .preview import Prepared

# Names that Markdown shows as they are.
_PLAIN = re.compile(r"[A-Za-z0-9]([\w./ -]*[A-Za-z0-9])?", re.ASCII)
# What the card says of a model that was not trained since, and no more after uptraining.
TRAIN_FIRST = "**Merging alone costs quality; continue training before use.**"
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def model_card(source: str, prepared: Prepared, result: Result) -> str:
    """Markdown with metadata: the original, what was merged and how, the plan's hash, versions, how to load it.

    Args:
        source: what the user named as the original model.
        prepared: what is written. The licence and the language of the original README.md are kept.
        result: the plan with everything that was found.
    """
    from huggingface_hub import ModelCardData

    layout, folder = prepared.layout, prepared.checkpoint.folder
    card = next((folder / path for path in prepared.companions if path.as_posix() == "README.md"), None)
    hub_id = source if not Path(source).exists() else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        tags=["grouped-query-attention", "regroup"],
        **_kept(card),
    )
    counts = Counter(
        (layer.original_num_key_value_heads, layer.num_key_value_heads, *layer.methods) for layer in result.plan.layers
    )
    rows = "\n".join(
        f"| {number} | {before} | {after} | {key} | {value} |" for (before, after, key, value), number in counts.items()
    )
    name = visible(hub_id or Path(source).resolve().name)
    text = f"On calibration text: `{RESULT_FILE}`." if result.calibration is not None else "From the weights alone."
    load = "" if prepared.preview.stock else ", trust_remote_code=True"
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("regroup-gqa", "torch", "transformers")
    )
    return f"""---
{data}
---

# {name if _PLAIN.fullmatch(name) else code_span(name)} with grouped-query attention

Converted from {code_span(name)} by regroup (`regroup-gqa`): key and value heads were merged within groups
(Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", EMNLP 2023).
{TRAIN_FIRST}

| attention layers | KV heads before | KV heads now | keys by | values by |
| --- | --- | --- | --- | --- |
{rows}

- Family: {layout.family}. Plan: `{PLAN_FILE}`, hash `{prepared.plan.digest()}`. {text}
- Written by {versions}.
- Load with `AutoModel….from_pretrained(path{load})` or `regroup.load(path)`.
"""


def _kept(card: Path | None) -> dict[str, Any]:
    if card is None:
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        # The library warns about a card without metadata, which is nothing to worry anybody with.
        if not card.read_text(encoding="utf-8").lstrip().startswith("---"):
            return {}
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError) as error:
        raise RegroupError(
            "the model card of the original cannot be read",
            file=card,
            got=str(error)[:200],
            remedy="correct or remove it",
        ) from error
    return {key: data[key] for key in _KEPT if key in data}
