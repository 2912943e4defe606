"""Packages that only some commands need, by the extra of ``regroup-gqa`` that installs them."""

from __future__ import annotations

import importlib.util

from .errors import RegroupError

# Each module, as it is imported, and the package that holds it.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "accelerate": "accelerate",
        "datasets": "datasets",
        "matplotlib": "matplotlib",
        "pyarrow": "pyarrow",
        "tensorboard": "tensorboard",
    },
    "evaluate": {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"},
    "report": {"altair": "altair", "jinja2": "Jinja2", "matplotlib": "matplotlib", "vl_convert": "vl-convert-python"},
    "gguf": {"gguf": "gguf"},
    "lm-eval": {"lm_eval": "lm-eval"},
}


def require(extra: str, *modules: str) -> None:
    """Check that modules of an extra can be imported, before the work that needs them.

    Args:
        extra: a key of ``EXTRAS``.
        modules: keys of its entry.

    Raises:
        RegroupError: one is not installed; the error names its package and the extra.
    """
    for module in modules:
        package = EXTRAS[extra][module]
        if importlib.util.find_spec(module) is None:
            raise RegroupError(
                "a Python package that this needs is not installed",
                expected=package,
                remedy=f"pip install 'regroup-gqa[{extra}]'",
            )
