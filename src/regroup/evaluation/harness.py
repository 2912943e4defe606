"""Tasks of lm-evaluation-harness, on checkpoints that it could not load itself."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fetch
from ..devices import device_named
from ..errors import RegroupError
from ..extras import require
from ..modeling import load_tokenizer
from ..record import record
from .run import check_dtype, load_for_scoring


def evaluate_harness(
    model: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness (Gao et al. 2024) on a checkpoint of any family, grouped ones included.

    The model is loaded here and handed over, so that families that stock transformers cannot group work too.

    Args:
        model: a checkpoint folder or hub id.
        tasks: names that the harness knows.
        include: folder with more task files.
        limit: rows of each task at most.
        batch_size, dtype, device: as in ``evaluate``.

    Returns:
        A record: for each task every metric that the harness reports, with its standard error.

    Raises:
        RegroupError: the harness is not installed, or knows no such task.
    """
    require("lm-eval", "lm_eval")
    from lm_eval import simple_evaluate  # pyright: ignore[reportPrivateImportUsage]
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    check_dtype(dtype)
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise RegroupError(
                "the harness knows no such task",
                expected="a name of `lm-eval ls tasks`, or of a file below --include-path",
                got=name,
            )
    folder, place = fetch(model), device_named(device)
    loaded, tokenizer = load_for_scoring(folder, dtype, place), load_tokenizer(folder)
    backend = "seq2seq" if loaded.config.is_encoder_decoder else "causal"
    # Their decorators hide what both take.
    made: Any = HFLM
    evaluator: Any = simple_evaluate
    wrapped = made(pretrained=loaded, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
    found = evaluator(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    results = {
        task: {name: value for name, value in values.items() if _is_figure(value)}
        for task, values in found["results"].items()
    }
    configuration = {
        "model": model,
        "tasks": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": torch.device(place).type,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    return record("evaluate/harness", configuration, {"tasks": results})


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
