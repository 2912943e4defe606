"""Models with grouped key/value heads that stock `transformers` classes cannot express, and how to load them.

`modeling_regroup.py` holds the classes and is copied into every checkpoint that needs them. Importing this package
imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegroupError
from .spelled import stock_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MODELING_FILE", "grouped_config", "load", "load_tokenizer"]

MODELING_FILE = Path(__file__).with_name("modeling_regroup.py")


def grouped_config(config: dict[str, Any], num_key_value_heads: dict[str, int]) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint whose attention modules have these numbers of key/value heads.

    ``config`` is the original model's, stock or itself grouped by regroup; it is not changed. ``num_key_value_heads``
    maps the path of each converted attention module, relative to ``model.base_model``, to its number. The result names
    a ``Regroup…`` architecture, and the ``auto_map`` by which the Auto classes find it in ``modeling_regroup.py``.

    Raises RegroupError where the configuration has no architecture or one that `transformers` does not map for its
    ``model_type``.
    """
    from regroup.modeling import modeling_regroup

    architecture = stock_architecture(config, "config.json")
    model_type = config.get("model_type", "")
    auto_map = modeling_regroup.auto_map(model_type, architecture)
    target = f"{MODELING_FILE.stem}.{modeling_regroup.PREFIX}{architecture}"
    if target not in auto_map.values():
        raise RegroupError(
            "no Auto class of the installed transformers knows the architecture",
            file="config.json",
            expected=f"an architecture of model_type {model_type!r}",
            got=architecture,
            remedy="correct architectures or model_type, or install the transformers release that knows them",
        )
    grouped = dict(config)
    # The stock class is built first, so it needs the size of the layer with the most heads.
    if isinstance(config.get("num_key_value_heads"), int):
        grouped["num_key_value_heads"] = max(num_key_value_heads.values(), default=config["num_key_value_heads"])
    grouped["architectures"] = [f"{modeling_regroup.PREFIX}{architecture}"]
    grouped["auto_map"] = auto_map
    grouped["regroup"] = {"format": modeling_regroup.FORMAT, "num_key_value_heads": dict(num_key_value_heads)}
    return grouped


def load(
    path: str | Path, *, progress: bool = True, config: dict[str, Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint folder, grouped by regroup or stock, as the class that its config.json names.

    Code in the folder is never run: the classes come from the installed regroup and transformers. Every tensor that the
    class needs must be there, and no other (see ``modeling.expected``).

    Args:
        path: the folder; no hub id.
        progress: show transformers' bar.
        config: in place of the folder's config.json.
        kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``, …).
            ``attn_implementation="regroup"`` needs no ``regroup.register()`` before.

    Returns:
        The model.

    Raises:
        RegroupError: there is no config.json, its architecture is unknown, ``trust_remote_code`` is asked for, a tensor
            is missing or unexpected or does not fit the model, or the family has no choice of the attention
            implementation that is asked for.
    """
    from safetensors import SafetensorError

    from regroup.checkpoint import open_checkpoint
    from regroup.checkpoint.companions import refuse_special
    from regroup.checkpoint.forms import refuse_adapter

    from .expected import check_generation_config, check_loadable, model_class
    from .silence import without_bars
    from .spelled import spelled

    file = Path(path) / "config.json"
    refuse_special(Path(path))
    refuse_adapter(Path(path))
    if not file.is_file():
        raise RegroupError("the folder is not a checkpoint", file=path, expected="a config.json in it")
    if kwargs.pop("trust_remote_code", False):
        raise RegroupError("no code from a checkpoint is run here", file=path, remedy="leave trust_remote_code out")
    checkpoint = open_checkpoint(Path(path))
    given = config is not None
    config, changed = spelled(checkpoint.config if config is None else config)
    cls = model_class(config, str(file))
    if kwargs.get("attn_implementation") == "regroup":
        from regroup.attention import interface

        interface.check_family(cls.config_class)
    check_loadable(config, checkpoint.tensors, path)
    check_generation_config(Path(path))
    if given or changed:
        kwargs["config"] = cls.config_class.from_dict(config)
    try:
        with contextlib.nullcontext() if progress else without_bars():
            # Pickles are never read here; ``regroup convert --allow-pickle`` makes safetensors of them. Code of the
            # folder, for generation say, would otherwise be run by whoever answers transformers' question with yes.
            return cls.from_pretrained(path, **{"use_safetensors": True, **kwargs}, trust_remote_code=False)
    # A damaged file that transformers reads itself raises all kinds of errors. The last is safetensors' own, also for
    # names that are not UTF-8.
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise RegroupError(
            "transformers cannot load the checkpoint",
            file=path,
            got=" ".join(str(error).split())[:800] or type(error).__name__,
        ) from error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        RegroupError: there is none, or it needs something that is not installed.
    """
    from transformers import AutoTokenizer

    from regroup.checkpoint.companions import refuse_special

    if Path(folder).is_dir():
        refuse_special(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises that itself, and damage shows in all kinds of ways
        if "trust_remote_code" in str(error):
            raise RegroupError(
                "the tokenizer needs code that comes with the checkpoint, which is never run here",
                file=folder,
                expected="a tokenizer.json, or files of a tokenizer class that transformers brings along",
                remedy="if you trust the code, load the tokenizer with trust_remote_code=True, save it "
                "as a tokenizer.json, and take auto_map out of tokenizer_config.json",
            ) from error
        raise RegroupError(
            "the checkpoint has no tokenizer that can be loaded",
            file=folder,
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            remedy="copy the tokenizer's files into the folder",
        ) from error
