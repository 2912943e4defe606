"""Whether transformers builds the model of a config.json and finds every weight of it: from headers, without memory.

The model's class says which tensors there must be: it is built on the meta device, and asked under which names it would
save its weights. A checkpoint with just those is complete. Older files have other names; for them transformers "loads"
tensors that have shapes and no data, and reports what it would fill with random numbers or leave aside.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import RegroupError
from .silence import quiet
from .spelled import runnable, stock_architecture

if TYPE_CHECKING:
    from ..layout.types import TensorInfo

logger = logging.getLogger(__name__)

_FLOATS = ("BF16", "F16", "F32", "F64")
# Buffers that older releases saved and newer ones make by themselves.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|attn\.bias|rotary_emb\.inv_freq|position_ids|version|embed_positions\.(weights|_float_tensor))$"
)
_NAMED = 5  # tensors that a message names
_REMEDY = "correct architectures and sizes in config.json, which may be those of another model; or "

Shape = tuple[int, ...]


def model_class(config: Mapping[str, Any], where: str) -> Any:
    """The class that a config.json names, stock or grouped by regroup; without a name, the Auto classes' choice.

    Args:
        config: the parsed ``config.json``.
        where: its path, for messages.

    Raises:
        RegroupError: it names one that is not a model of the installed transformers, or of another model type.
    """
    import transformers

    from regroup.modeling import modeling_regroup

    refuse_kernels(config, where)
    stock = None if config.get("architectures") else default_class(config.get("model_type"))
    if stock is None:
        architecture = stock_architecture(config, where)
        stock = getattr(transformers, architecture, None)
        if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
            raise RegroupError(
                "the architecture is not a model class of the installed transformers",
                file=where,
                expected=f"a class of transformers {transformers.__version__}",
                got=architecture,
                remedy="correct architectures, or install the release that knows it",
            )
    described, model_type = getattr(stock.config_class, "model_type", None), config.get("model_type")
    if described != model_type:
        raise RegroupError(
            "architectures and model_type of the config name different models",
            file=where,
            expected=f"model_type {described!r}, which {stock.__name__} has",
            got=f"model_type {model_type!r}",
            remedy="correct the one that is wrong",
        )
    return getattr(modeling_regroup, modeling_regroup.PREFIX + stock.__name__) if "regroup" in config else stock


def refuse_kernels(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that makes transformers download code for attention or experts, and run it.

    Raises:
        RegroupError: it names a repository of kernels.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and not key.endswith("_implementation"):
            refuse_kernels(value, where)
        elif key.lstrip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise RegroupError(
                "the config asks for code to be downloaded and run, which is never done here",
                file=where,
                expected="an implementation that transformers brings along",
                got=f"{key}: {value!r}"[:200],
                remedy=f"take {key} out of config.json",
            )


def default_class(model_type: object) -> Any:
    """The stock class with a language-modelling head that transformers has for a model type, or None."""
    import transformers

    # Looked up by key: its other methods do not know what it has not loaded.
    known: Any = transformers.CONFIG_MAPPING
    kind = known[model_type] if isinstance(model_type, str) and model_type in known else None
    mappings: tuple[Any, ...] = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    )
    return next((mapping[kind] for mapping in mappings if kind in mapping), None)


def check_loadable(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str | Path) -> None:
    """Refuse a checkpoint that transformers would load incompletely, or not at all.

    Args:
        config: the parsed ``config.json``.
        tensors: every tensor of the weights by name.
        where: the checkpoint's folder or file, for messages.

    Raises:
        RegroupError: the model cannot be built from the config; or a tensor is missing, unexpected, there twice under
            two names, of another shape than the model's, or quantised.
    """
    file = f"{where}/config.json"
    config = runnable(config)
    cls = model_class(config, file)
    try:
        comparison = _Comparison(_expected(cls, json.dumps(config)), tensors, str(where))
        comparison.check_known_names()
        if not comparison.complete:
            comparison.check_report(_loaded(cls, config, tensors)[1])
    except _UnbuildableError as error:
        import transformers

        raise RegroupError(
            "transformers cannot build the model that config.json describes",
            file=file,
            expected=f"a configuration of {cls.__name__} in transformers {transformers.__version__}",
            got=str(error)[:400],
            remedy="correct config.json",
        ) from error


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that keeps transformers from loading the model next to it.

    Raises:
        RegroupError: it is no JSON object, or names what transformers does not know.
    """
    from transformers import GenerationConfig

    from ..checkpoint.reader import read_json

    file = folder / "generation_config.json"
    if not file.exists():
        return
    values = read_json(file)
    try:
        with quiet():
            GenerationConfig.from_dict(values)
    # As for configs: untrusted data.
    except Exception as error:
        raise RegroupError(
            "transformers cannot read the checkpoint's settings for generation",
            file=file,
            got=f"{type(error).__name__}: {error}".strip()[:400],
            remedy="correct the file, or remove it",
        ) from error


@dataclass(frozen=True)
class _Expected:
    """What a model class saves.

    Attributes:
        name: of the class, and of the release that it is from.
        saved: name in a file to shape.
        renamed: name of a parameter to its name in a file, where that is another.
        merged: forms of names (see ``_form``) of tensors of which transformers makes one, such as a layer's experts.
        tied: name of a parameter to that of the one it shares.
        never_saved: names that the class makes by itself.
        defaults: buffers that transformers fills with zeros where a file has none.
        computed: tables of sines and cosines, which it computes where a file has none.
        prefix: of the base model.
    """

    name: str
    saved: dict[str, Shape]
    renamed: dict[str, str]
    merged: frozenset[str]
    tied: dict[str, str]
    never_saved: frozenset[str]
    defaults: frozenset[str]
    computed: frozenset[str]
    prefix: str

    def saved_as(self, name: str) -> str:
        """The name under which the class saves a tensor: older files leave the base model's prefix out, or have it."""
        for candidate in (name, self.prefix + name, name.removeprefix(self.prefix)):
            if candidate in self.saved:
                return candidate
        return name


@functools.lru_cache(maxsize=8)
def _expected(cls: Any, config: str) -> _Expected:
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    model, _ = _loaded(cls, json.loads(config), {})
    parameters: dict[str, Any] = model.state_dict()
    model._weight_conversions = None  # those of the class, whichever a checkpoint would need
    saved: dict[str, Any] = revert_weight_conversion(model, parameters)
    names: dict[int, str] = {id(value): name for name, value in saved.items()}
    renamed = {
        name: names[id(value)] for name, value in parameters.items() if id(value) in names and names[id(value)] != name
    }
    merged = {_form(name) for name in saved.keys() - parameters.keys() - set(renamed.values())}
    rules = [re.compile(rule) for rule in model._keys_to_ignore_on_load_missing or ()]
    return _Expected(
        name=f"{cls.__name__} in transformers {transformers.__version__}",
        saved={name: tuple(value.shape) for name, value in saved.items()},
        renamed=renamed,
        merged=frozenset(merged),
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        never_saved=frozenset(model._keys_to_ignore_on_save or ()),
        defaults=frozenset(name for name, _ in model.named_buffers() if any(rule.search(name) for rule in rules)),
        computed=computed_tables(model),
        prefix=f"{model.base_model_prefix}.",
    )


def computed_tables(model: Any) -> frozenset[str]:
    """Parameters that transformers fills with sines and cosines where a checkpoint has none."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__.endswith("SinusoidalPositionalEmbedding")
    )


class _UnbuildableError(Exception):
    """transformers fails on a configuration."""


def _loaded(cls: Any, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and transformers' report of what it found for it."""
    import torch

    state = {name: torch.empty(entry.shape, device="meta") for name, entry in tensors.items()}
    try:
        with quiet(), _one_device():
            return cls.from_pretrained(
                None,
                config=cls.config_class.from_dict(dict(config)),
                state_dict=state,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    # Configs are untrusted: a class that is built from one may fail in any way.
    except Exception as error:
        raise _UnbuildableError(f"{type(error).__name__}: {error}".strip()) from error


@contextlib.contextmanager
def _one_device() -> Iterator[None]:
    """transformers asks for accelerate wherever a device is named, and uses it only where there are several."""
    integration: Any = importlib.import_module("transformers.integrations.accelerate")
    is_available = integration.is_accelerate_available
    integration.is_accelerate_available = lambda *_: True
    try:
        yield
    finally:
        integration.is_accelerate_available = is_available


class _Comparison:
    """Compares the tensors of a checkpoint with those that the model's class saves."""

    def __init__(self, expected: _Expected, tensors: Mapping[str, TensorInfo], where: str) -> None:
        self.expected, self.tensors, self.where = expected, tensors, where
        # Name that the class would save to the names in the checkpoint.
        self.found: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            self.found[expected.saved_as(name)].append(name)
        self.absent = expected.saved.keys() - self.found.keys() - expected.never_saved
        self.extra = self.found.keys() - expected.saved.keys()

    @property
    def complete(self) -> bool:
        """Every tensor that the class saves is there, or tied to one that is, and no other is."""
        return not self.extra and all(self.expected.tied.get(name) in self.found for name in self.absent)

    def check_known_names(self) -> None:
        """Refuse what the names that the class saves are enough to find.

        Raises:
            RegroupError: see ``check_loadable``.
        """
        for saved, names in self.found.items():
            if len(names) > 1:
                raise RegroupError(
                    "the checkpoint holds one weight of the model twice",
                    file=self.where,
                    tensor=names[0],
                    expected=f"one tensor for {saved}",
                    got=" and ".join(names[:_NAMED]),
                    remedy="leave out the one that is not meant",
                )
        for saved, (name, *_) in self.found.items():
            if saved not in self.expected.saved:
                continue
            entry, shape = self.tensors[name], self.expected.saved[saved]
            if shape != tuple(entry.shape):
                self._misshapen(name, shape, entry.shape)
            if entry.dtype not in _FLOATS:
                raise RegroupError(
                    "a weight is not stored in floating point",
                    file=self.where,
                    tensor=name,
                    expected=", ".join(_FLOATS),
                    got=entry.dtype,
                    remedy="start from the unquantised checkpoint",
                )
        # Of several that become one, transformers takes what there is, in order, whatever the numbers.
        if any(_form(name) in self.expected.merged for name in self.tensors):
            self._refuse_missing(name for name in self.absent if _form(name) in self.expected.merged)
            self._refuse_unexpected(name for name in self.extra if _form(name) in self.expected.merged)

    def check_report(self, report: Mapping[str, Any]) -> None:
        """Refuse what transformers says that it would not find, or not use.

        Raises:
            RegroupError: see ``check_loadable``.
        """
        missing: set[str] = report["missing_keys"]
        self._refuse_missing(self.expected.renamed.get(name, name) for name in missing - self.expected.computed)
        self._refuse_unexpected(name for name in report["unexpected_keys"] if not _OLD_BUFFERS.search(name))
        for name, found, wanted in sorted(report["mismatched_keys"]):
            self._misshapen(name, wanted, found)
        if report["error_msgs"]:
            got = "; ".join(report["error_msgs"])[:400]
            raise RegroupError("transformers cannot load the checkpoint", file=self.where, got=got)
        # Older files of some families have none, and are right.
        if filled := sorted(self.absent & self.expected.defaults):
            logger.warning("%s holds no %s: transformers fills in zeros", self.where, ", ".join(filled))
        if computed := sorted(self.absent & self.expected.computed):
            logger.warning("%s holds no %s: transformers computes them", self.where, ", ".join(computed))

    def _refuse_missing(self, names: Iterable[str]) -> None:
        if missing := sorted(names):
            raise RegroupError(
                "the checkpoint lacks a tensor that the model needs",
                file=self.where,
                tensor=missing[0],
                expected=f"the tensors of {self.expected.name}",
                got=_count(missing, "missing"),
                remedy=f"{_REMEDY}download the checkpoint again, for a file may be missing",
            )

    def _refuse_unexpected(self, names: Iterable[str]) -> None:
        if unexpected := sorted(names):
            raise RegroupError(
                "the checkpoint holds a tensor that the model does not have",
                file=self.where,
                tensor=unexpected[0],
                expected=f"the tensors of {self.expected.name}",
                got=_count(unexpected, "not expected"),
                remedy=f"{_REMEDY}leave out the tensors, which transformers would not load",
            )

    def _misshapen(self, name: str, wanted: Sequence[int], found: Sequence[int]) -> NoReturn:
        raise RegroupError(
            "a tensor does not have the shape that the model needs",
            file=self.where,
            tensor=name,
            expected=f"shape {list(wanted)}",
            got=f"shape {list(found)}",
            remedy="config.json and weights may belong to different models",
        )


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _count(names: Sequence[str], what: str) -> str:
    rest = len(names) - _NAMED
    return f"{len(names)} {what}: {', '.join(names[:_NAMED])}" + (f" and {rest} more" if rest > 0 else "")
