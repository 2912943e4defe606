"""Defaults of what a recipe leaves open, by the family that is trained and by the objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from ..errors import RegroupError
from ..families import FAMILIES
from .optimizer import HAS_MUON
from .recipe import Recipe


@dataclass(frozen=True)
class FamilyDefaults:
    """How a family was pre-trained, as far as uptraining continues it.

    Attributes:
        learning_rate: the peak of its model of about 7 billion parameters; smaller ones bear more.
        source: of that figure.
    """

    learning_rate: float
    source: str


_OTHERS = FamilyDefaults(3e-4, "the peak of Llama 7B, for want of the family's own")
DEFAULTS = {
    "llama": FamilyDefaults(3e-4, "Touvron et al. 2023, arXiv:2302.13971, table 2: 7B"),
    "olmo": FamilyDefaults(3e-4, "Groeneveld et al. 2024, arXiv:2402.00838, section 3: 7B"),
    "gpt_neox": FamilyDefaults(1.2e-4, "Biderman et al. 2023, arXiv:2304.01373, table 1: Pythia 6.9B"),
    "opt": FamilyDefaults(1.2e-4, "Zhang et al. 2022, arXiv:2205.01068, table 1: 6.7B"),
    "bloom": FamilyDefaults(1.2e-4, "BigScience 2022, arXiv:2211.05100, table 3: 7.1B"),
}
# Pre-trained as T5 was: Adafactor and 1 / sqrt(step) for a million steps.
T5_STEPS = 1_000_000
WEIGHT_DECAY = 0.1
HIDDEN_WEIGHT = 10.0
BATCH = 8
# Distillation of decoders: few windows a step, since steps are what a short run lacks.
DISTILL_BATCH = 4
# Of Muon, found on a model of width 64; what a matrix bears falls with the root of its width, as its elements do.
_MUON_RATE, _MUON_WIDTH = 2e-3, 64
ATTENTION_RATE = 4.0


def resolved(
    recipe: Recipe, family: str, encoder_decoder: bool, hidden_size: int = _MUON_WIDTH
) -> tuple[Recipe, list[str]]:
    """The recipe with nothing left open, and a line for each choice that was made.

    ``family`` is transformers' ``model_type``, ``hidden_size`` the width of the model. A decoder with a teacher is
    distilled with Muon, in windows that each hold one document where the text fills such windows. Without a teacher
    the pre-training is continued: T5 models with Adafactor, span corruption, and the inverse square root of the step
    from step 1,000,000 on (Raffel et al. 2020, arXiv:1910.10683, section 3.1.2), other families with AdamW and a cosine
    with a new warm-up (Ibrahim et al. 2024, arXiv:2403.08763). Pairs are fine-tuned as in Ainslie et al. 2023, section
    3.1: constant rate 0.001 for T5 models, dropout 0.1.

    Raises:
        RegroupError: settings that exclude each other.
    """
    t5 = family in FAMILIES and FAMILIES[family].t5_pretraining
    chosen: list[str] = []

    def choose(name: str, value: object, why: str) -> None:
        nonlocal recipe
        recipe = replace(recipe, **{name: value})
        chosen.append(f"{name.replace('_', '-')}: {_shown(value)} ({why})")

    if recipe.objective == "auto":
        if not encoder_decoder:
            choose("objective", "causal", "a decoder")
        elif t5:
            choose("objective", "span-corruption", "as T5 was pre-trained")
        else:
            choose("objective", "pairs", "an encoder-decoder that was not pre-trained as T5")
    if encoder_decoder == (recipe.objective == "causal"):
        raise RegroupError(
            "the objective is for another kind of model",
            expected="span-corruption or pairs for an encoder-decoder, causal for a decoder",
            got=f"{recipe.objective} for {family}",
            remedy="leave --objective out",
        )
    tuning = recipe.objective == "pairs"
    distilled = recipe.teacher is not None and recipe.objective == "causal"
    if recipe.optimizer == "auto":
        if distilled and HAS_MUON and not recipe.fsdp:
            choose("optimizer", "muon", "with a teacher")
        else:
            choose("optimizer", "adafactor" if t5 else "adamw", "as T5 was pre-trained" if t5 else "the usual one")
    if recipe.optimizer == "muon":
        _check_muon(recipe)
    if not recipe.batch_size:
        choose("batch_size", DISTILL_BATCH if distilled else BATCH, "sequences in a step")
    if recipe.windows == "auto":
        # Whether the data allow it is seen when they are read.
        recipe = replace(recipe, windows="documents?" if distilled else "packed")
    if recipe.schedule == "auto":
        if tuning:
            choose("schedule", "constant", "fine-tuning in Ainslie et al. 2023")
        elif t5:
            choose("schedule", "inverse-sqrt", "as T5 was pre-trained")
        else:
            choose("schedule", "cosine", "with a new warm-up, Ibrahim et al. 2024")
    if recipe.schedule == "inverse-sqrt" and recipe.original_steps is None:
        if not t5:
            raise RegroupError(
                "the schedule inverse-sqrt continues one whose length is not known",
                expected="the steps of the original model's pre-training",
                got="none",
                remedy="pass --original-steps, or another --schedule",
            )
        choose("original_steps", T5_STEPS, "steps of T5's pre-training")
    if recipe.learning_rate is None:
        if recipe.schedule == "inverse-sqrt":
            assert recipe.original_steps is not None
            # T5 holds its rate for the first 10,000 steps.
            rate = 1 / sqrt(max(recipe.original_steps, 10_000))
            choose("learning_rate", rate, f"1 / sqrt({recipe.original_steps:,})")
        elif recipe.optimizer == "muon":
            rate = float(f"{_MUON_RATE * sqrt(_MUON_WIDTH / hidden_size):.2g}")
            choose("learning_rate", rate, f"of matrices, at width {hidden_size}")
        elif t5:
            choose("learning_rate", 1e-3, "fine-tuning in Ainslie et al. 2023")
        else:
            known = DEFAULTS.get(family, _OTHERS)
            choose("learning_rate", known.learning_rate, known.source)
    if recipe.attention_rate is None and recipe.optimizer == "muon":
        choose("attention_rate", ATTENTION_RATE, "times the rate, for the projections of converted layers")
    if recipe.weight_decay is None:
        decays = recipe.optimizer == "adamw" and not tuning
        choose("weight_decay", WEIGHT_DECAY if decays else 0.0, "of matrices" if decays else "none")
    if tuning and recipe.dropout is None:
        choose("dropout", 0.1, "fine-tuning in Ainslie et al. 2023")
    return _distilled(recipe, chosen)


def _check_muon(recipe: Recipe) -> None:
    if not HAS_MUON:
        raise RegroupError(
            "this version of PyTorch has no Muon",
            expected="PyTorch 2.9 or later",
            remedy="install it, or pass --optimizer adamw",
        )
    if recipe.fsdp:
        raise RegroupError(
            "Muon needs whole matrices, which sharding divides",
            expected="--optimizer adamw or adafactor with --fsdp",
            got="muon",
            remedy="leave --optimizer or --fsdp out",
        )


def _distilled(recipe: Recipe, chosen: list[str]) -> tuple[Recipe, list[str]]:
    if recipe.teacher is None:
        named = [name for name in ("hidden_weight", "top_k", "teacher_cache") if getattr(recipe, name) is not None]
        if named:
            raise RegroupError(
                "distillation is asked for without a teacher",
                expected="a teacher",
                got=", ".join(name.replace("_", "-") for name in named),
                remedy="pass --teacher ORIGINAL",
            )
        return recipe, chosen
    weight = recipe.hidden_weight
    if recipe.teacher_cache is not None:
        if weight:
            raise RegroupError(
                "the teacher's cache keeps no hidden states",
                expected="hidden-weight 0 with --teacher-cache",
                got=weight,
                remedy="leave --hidden-weight or --teacher-cache out",
            )
        weight = 0.0
    elif weight is None:
        weight = HIDDEN_WEIGHT
        chosen.append(f"hidden-weight: {weight:g} (hidden states are matched as well as logits)")
    return replace(recipe, hidden_weight=weight), chosen


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
