"""The teacher: whether it fits the student, and its logits for a batch, computed or read from the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import fetch, fingerprint
from ..checkpoint.reader import read_json, refuse_pickles
from ..errors import RegroupError
from ..modeling import load, load_tokenizer
from ..modeling.lm_head import require_head
from .cache import TeacherCache
from .distill import TopK, layer_outputs, top_k
from .head import Head, Unprojected, separate_head, tapped
from .memory import let_go, mapped_ranges
from .objective import IGNORED, Objective
from .recipe import Recipe

# How families name the number of (decoder) layers, and the width of their outputs.
_LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTHS = ("d_model", "hidden_size", "n_embd")


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher gives for a batch.

    Attributes:
        logits: (batch, length, vocabulary) in the teacher's dtype, or what stands for them, or their ``TopK`` at the
            positions that carry loss.
        hidden: after each layer, (batch, length, hidden) each; empty where they were not asked for.
    """

    logits: Tensor | Unprojected | TopK
    hidden: tuple[Tensor, ...] = ()


class Teacher:
    """A teacher, loaded when something is needed that the cache does not hold.

    Args:
        load: loads the model, in its own dtype, on its device.
        k: tokens that are kept apart, or None for all.
        temperature: of the softmax that ``k`` is taken of.
        cache: see there; needs ``k``, and holds no hidden states.
        hidden: whether outputs have hidden states.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        k: int | None = None,
        temperature: float = 1.0,
        cache: TeacherCache | None = None,
        hidden: bool = False,
    ) -> None:
        assert cache is None or not hidden
        self._load, self.k, self.temperature, self.cache, self.hidden = load, k, temperature, cache, hidden
        self.rows_computed = self.rows_read = 0

    @cached_property
    def model(self) -> Any:
        return self._load().eval().requires_grad_(False)

    @cached_property
    def head(self) -> Head | None:
        """What gives its logits a chunk at a time; None where only all at once are right."""
        return separate_head(self.model)

    @cached_property
    def _mapped(self) -> list[tuple[int, int]]:
        return mapped_ranges(self.model)

    @property
    def loaded(self) -> Any:
        """The model if it was needed, or None."""
        return self.__dict__.get("model")

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], targets: Tensor, numbers: Sequence[int]) -> TeacherOutput:
        """Logits and hidden states for a batch; ``TopK`` at the positions that carry loss.

        Args:
            inputs: of the model's forward, on its device.
            targets: (batch, length), see ``mixed_loss``.
            numbers: of the examples in the global order.
        """
        counts = (targets != IGNORED).sum(1).tolist() if self.cache is not None else []
        if self.cache is not None:
            found = self.cache.read(numbers, counts, targets.device)
            if found is not None:
                self.rows_read += len(targets)
                return TeacherOutput(found)
        self.rows_computed += len(targets)
        with tapped(self.head) if self.head is not None else contextlib.nullcontext() as tap:
            outputs = self.model(**inputs, output_hidden_states=self.hidden)
        # While the student learns, its activations are there in place of the teacher's weights.
        let_go(self._mapped)
        logits: Tensor | Unprojected = outputs.logits
        if self.head is not None and tap is not None and tap.hidden is not None:
            logits = Unprojected(tap.hidden, self.head)
        hidden = layer_outputs(outputs) if self.hidden else ()
        if self.k is None:
            return TeacherOutput(logits, hidden)
        known = top_k(logits, targets, self.k, self.temperature)
        if self.cache is None:
            return TeacherOutput(known, hidden)
        self.cache.write(numbers, counts, known)
        # What was rounded is used at once, so that a run with a full cache learns the same.
        return TeacherOutput(self.cache.read(numbers, counts, targets.device) or known)


def open_cache(recipe: Recipe, folder: Path, stream: Any, objective: Objective, vocab_size: int) -> TeacherCache | None:
    """The cache of the teacher's logits, if the recipe names a folder for it.

    Raises:
        RegroupError: the recipe does not say how many logits, or the folder holds those of another run.
    """
    if recipe.teacher_cache is None:
        return None
    if recipe.top_k is None:
        raise RegroupError(
            "the teacher's cache keeps the largest logits alone",
            expected="their number, together with --teacher-cache",
            remedy="add --top-k 32 or so",
        )
    most = recipe.window if recipe.objective == "causal" else recipe.max_target or recipe.window
    if recipe.objective == "span-corruption":
        most = recipe.window  # targets are shorter than inputs
    facts = {
        **stream.state_dict()["of"],
        "epochs": recipe.epochs,
        "teacher": fingerprint(folder),
        "temperature": recipe.temperature,
    }
    return TeacherCache(recipe.teacher_cache, facts, k=recipe.top_k, positions=most, vocabulary=vocab_size)


def open_teacher(recipe: Recipe, folder: Path, cache: TeacherCache | None, encoder_decoder: bool) -> Teacher:
    """The teacher; without a cache it is loaded at once, so that one that does not load is refused here.

    Raises:
        RegroupError: another kind of model, or fewer tokens than logits are wanted.
    """

    def loaded() -> Any:
        device = _device(recipe)
        require_head(folder)
        model: Any = load(folder, dtype="auto", progress=False)
        if device.type == "cpu" and model.dtype == torch.float16:
            model = model.float()  # CPUs compute float16 several times slower, and no better
        if bool(model.config.is_encoder_decoder) != encoder_decoder:
            raise RegroupError("the teacher is another kind of model", file=folder)
        model.config.use_cache = False
        return model.to(device)

    if recipe.top_k is not None:
        vocabulary = int(read_json(folder / "config.json")["vocab_size"])
        if recipe.top_k >= vocabulary:
            raise RegroupError("there are not that many tokens", expected=f"below {vocabulary}", got=recipe.top_k)
    teacher = Teacher(
        loaded, k=recipe.top_k, temperature=recipe.temperature, cache=cache, hidden=bool(recipe.hidden_weight)
    )
    if cache is None:
        _ = teacher.model  # now, so that a teacher that does not load is refused before the first step
    return teacher


def _device(recipe: Recipe) -> torch.device:
    from accelerate import PartialState

    if recipe.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(PartialState().device or "cuda")


def check_teacher(recipe: Recipe, folder: Path, tokenizer: Any, student: Any) -> Path | None:
    """The teacher's folder, downloaded where it is a hub id; None where the recipe has none.

    Args:
        recipe: names it.
        folder, tokenizer, student: of the model that is trained.

    Raises:
        RegroupError: another vocabulary, another tokenizer, or hidden states that cannot be matched.
    """
    if recipe.teacher is None:
        return None
    teacher = fetch(recipe.teacher)
    refuse_pickles(teacher)  # a copy is made once, not by every process and every resumed run
    vocab_size = student.get_input_embeddings().weight.shape[0]
    config = read_json(teacher / "config.json")
    size = config.get("vocab_size")
    if size != vocab_size:
        raise RegroupError(
            "the teacher has another vocabulary",
            file=teacher,
            expected=f"{vocab_size} tokens, as {folder} has",
            got=size,
            remedy="the teacher is the checkpoint that the model was converted from",
        )
    check_same_tokenizer(tokenizer, load_tokenizer(teacher))
    own, other = (_shape_of(found) for found in (read_json(folder / "config.json"), config))
    if recipe.hidden_weight and own != other:
        raise RegroupError(
            "the teacher's hidden states are of another shape, and cannot be matched",
            file=teacher,
            expected=_shape_said(own),
            got=_shape_said(other),
            remedy="pass --hidden-weight 0, or the checkpoint that the model was converted from as --teacher",
        )
    return teacher


def _shape_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """Layers whose outputs are compared, and their width, by whichever names a family has for them."""
    layers = next((config[name] for name in _LAYERS if name in config), None)
    return layers, next((config[name] for name in _WIDTHS if name in config), None)


def _shape_said(shape: tuple[Any, Any]) -> str:
    return f"{shape[0]} layers of {shape[1]}"


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose tokenizer gives tokens other ids: its logits would be of other tokens.

    Raises:
        RegroupError: the vocabularies or the special tokens differ, or a sample text is cut differently.
    """
    sample = "The cat sat; naïve café 步步 🙂\n\tx = 10_000  # 2.5%"

    def facts(tokenizer: Any) -> dict[str, dict[str, int | None]]:
        ids = tokenizer(sample)["input_ids"]
        return {
            "tokens": tokenizer.get_vocab(),
            "special tokens": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
            "tokens of a sample text": {f"token {place}": token for place, token in enumerate(ids)},
        }

    other = facts(teacher)
    for what, ours in facts(student).items():
        theirs = other[what]
        odd = sorted(
            key for key in {*ours, *theirs} if (key in ours, ours.get(key)) != (key in theirs, theirs.get(key))
        )
        if odd:
            raise RegroupError(
                "the teacher's tokenizer is not the student's",
                expected=f"the same {what}",
                got=f"{len(odd)} differ, such as {odd[0]!r}: {ours.get(odd[0])} and {theirs.get(odd[0])}",
                remedy="use the original model of this checkpoint as the teacher",
            )
