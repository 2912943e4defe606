"""Whether a model has an output head at all: known from its class, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_json
from ..errors import RegroupError
from .expected import default_class, model_class
from .spelled import spelled


def require_head(folder: str | Path, *, words: bool = True) -> None:
    """Refuse a checkpoint whose class gives hidden states alone, such as ``LlamaModel``.

    Args:
        folder: the checkpoint.
        words: the head has to be one over the vocabulary, and not that of a classifier.

    Raises:
        RegroupError: there is no such head; or see ``expected.model_class``.
    """
    file = Path(folder) / "config.json"
    require_head_of(read_json(file), file, words=words)


def require_head_of(config: Mapping[str, Any], file: str | Path, *, words: bool = True) -> None:
    """The same of a parsed ``config.json``; ``file`` is its path, for messages."""
    import transformers

    config, _ = spelled(dict(config))
    cls = model_class(config, str(file))
    mapping: Any = transformers.MODEL_MAPPING
    bases: tuple[type, ...] = (mapping[cls.config_class],)
    if cls.can_generate() if words else not issubclass(cls, bases):
        return
    known = default_class(config.get("model_type"))
    raise RegroupError(
        f"the model has no {'language-modelling' if words else 'output'} head, without which it predicts nothing",
        file=file,
        expected=f'architectures such as ["{known.__name__}"]' if known else "a class with a language-modelling head",
        got=cls.__name__,
        remedy="name that class there, if the checkpoint holds its head or the head is the embedding"
        if issubclass(cls, bases)
        else "start from a language model; this one was trained for another task",
    )
