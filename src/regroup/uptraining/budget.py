"""How much an uptraining run does: from α to tokens, steps and FLOPs, by arithmetic alone.

Ainslie et al. 2023 continue pre-training for a fraction α of the original steps with the original batch, which is a
fraction α of the original tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from ..errors import RegroupError

_UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}

# Hub id, or the beginning of one (it then ends in a hyphen or underscore), to the tokens of its pre-training and where
# that figure is from. Repeated tokens count as often as they were trained on. Models whose makers did not publish a
# figure are left out.
KNOWN_PRETRAINING_TOKENS: dict[str, tuple[int, str]] = {
    "huggyllama/llama-7b": (10**12, "Touvron et al. 2023, arXiv:2302.13971, table 2"),
    "huggyllama/llama-13b": (10**12, "Touvron et al. 2023, arXiv:2302.13971, table 2"),
    "huggyllama/llama-30b": (14 * 10**11, "Touvron et al. 2023, arXiv:2302.13971, table 2"),
    "huggyllama/llama-65b": (14 * 10**11, "Touvron et al. 2023, arXiv:2302.13971, table 2"),
    "meta-llama/Llama-2-": (2 * 10**12, "Touvron et al. 2023, arXiv:2307.09288, table 1"),
    "openlm-research/open_llama_": (10**12, "model card of openlm-research/open_llama_7b"),
    "allenai/OLMo-7B-hf": (246 * 10**10, "Groeneveld et al. 2024, arXiv:2402.00838, table 1"),
    "allenai/OLMo-2-1124-7B": (4 * 10**12, "model card of allenai/OLMo-2-1124-7B"),
    "allenai/OLMo-2-1124-13B": (5 * 10**12, "model card of allenai/OLMo-2-1124-13B"),
    "EleutherAI/pythia-": (143_000 * 2_097_152, "Biderman et al. 2023, arXiv:2304.01373, section 2"),
    "EleutherAI/gpt-j-6b": (402 * 10**9, "model card of EleutherAI/gpt-j-6b"),
    "EleutherAI/gpt-neox-20b": (150_000 * 1538 * 2048, "Black et al. 2022, arXiv:2204.06745, section 3"),
    "facebook/opt-": (300 * 10**9, "Zhang et al. 2022, arXiv:2205.01068, section 2.2"),
    "bigscience/bloom": (366 * 10**9, "BigScience 2022, arXiv:2211.05100, table 3"),
    "tiiuae/falcon-rw-1b": (350 * 10**9, "model card of tiiuae/falcon-rw-1b"),
    "tiiuae/falcon-rw-7b": (350 * 10**9, "model card of tiiuae/falcon-rw-7b"),
    "tiiuae/falcon-7b": (15 * 10**11, "Almazrouei et al. 2023, arXiv:2311.16867"),
    "tiiuae/falcon-40b": (10**12, "Almazrouei et al. 2023, arXiv:2311.16867"),
    "mosaicml/mpt-7b": (10**12, "model card of mosaicml/mpt-7b"),
    "mosaicml/mpt-30b": (10**12, "model card of mosaicml/mpt-30b"),
    "google/gemma-7b": (6 * 10**12, "Gemma Team 2024, arXiv:2403.08295"),
    "microsoft/phi-1_5": (150 * 10**9, "Li et al. 2023, arXiv:2309.05463"),
    "microsoft/phi-2": (14 * 10**11, "model card of microsoft/phi-2"),
    "stabilityai/stablelm-3b-4e1t": (4 * 10**12, "model card of stabilityai/stablelm-3b-4e1t"),
    "stabilityai/stablelm-2-1_6b": (2 * 10**12, "Bellagente et al. 2024, arXiv:2402.17834"),
    "deepseek-ai/deepseek-llm-7b-base": (2 * 10**12, "DeepSeek-AI 2024, arXiv:2401.02954"),
    "LLM360/Amber": (126 * 10**10, "model card of LLM360/Amber"),
    "google/t5-v1_1-": (
        10**6 * 2048 * 512,
        "Raffel et al. 2020, arXiv:1910.10683, section 3.7: 1M steps of 2^11 × 512",
    ),
    "google-t5/t5-": (10**6 * 2048 * 512, "Raffel et al. 2020, arXiv:1910.10683, section 3.7: 1M steps of 2^11 × 512"),
    "google/mt5-": (10**6 * 1024 * 1024, "Xue et al. 2021, arXiv:2010.11934, section 3.2: 1M steps of 1024 × 1024"),
}


@dataclass(frozen=True)
class Budget:
    """How much a run does.

    Attributes:
        tokens: that are trained on: ``steps × tokens_per_step``.
        steps: optimizer steps.
        tokens_per_step: ``batch_size × window``; of an encoder-decoder, tokens of the encoder's input.
        alpha: ``tokens / pretraining_tokens`` as it was asked for, or as it came out; None where the original
            model's tokens are not known.
        pretraining_tokens: of the original model, or None.
        student_flops: forward and backward of the whole run.
        teacher_flops: the teacher's forward of the whole run; 0 without a teacher.
        asked_tokens: before rounding up to whole steps.
        student_flops_per_token, teacher_flops_per_token: see ``plan_budget``.
    """

    tokens: int
    steps: int
    tokens_per_step: int
    alpha: float | None
    pretraining_tokens: int | None
    student_flops: int
    teacher_flops: int
    asked_tokens: int
    student_flops_per_token: int
    teacher_flops_per_token: int

    def explain(self) -> list[str]:
        """The arithmetic, one line per step of it, for a person."""
        lines = []
        if self.alpha is not None and self.pretraining_tokens is not None:
            lines.append(f"α = {self.alpha:.3g} of {self.pretraining_tokens:,} pre-training tokens")
        lines += [
            f"{self.asked_tokens:,} tokens / {self.tokens_per_step:,} per step = {self.steps:,} steps, rounded up",
            f"{self.steps:,} steps × {self.tokens_per_step:,} tokens = {self.tokens:,} tokens",
            f"student: {self.tokens:,} tokens × {_short(self.student_flops_per_token)}FLOPs forward and backward "
            f"= {self.student_flops:.3g} FLOPs",
        ]
        if self.teacher_flops:
            lines.append(
                f"teacher: {self.tokens:,} tokens × {_short(self.teacher_flops_per_token)}FLOPs forward "
                f"= {self.teacher_flops:.3g} FLOPs, {self.teacher_flops / self.student_flops:.0%} of the student's"
            )
        return lines


def known_pretraining_tokens(name: str) -> tuple[int, str] | None:
    """Tokens of a known model's pre-training and their source, or None.

    ``name`` is a hub id such as ``"meta-llama/Llama-2-7b-hf"``; case does not matter, the longest entry wins.
    """
    found = [known for known in KNOWN_PRETRAINING_TOKENS if _names(known.lower(), name.lower())]
    return KNOWN_PRETRAINING_TOKENS[max(found, key=len)] if found else None


def _names(known: str, name: str) -> bool:
    """An entry that ends in a hyphen or an underscore is the beginning of names, another is a whole name."""
    return name.startswith(known) if known[-1] in "-_" else name == known


def parse_count(text: str | int) -> int:
    """``"2T"``, ``"300B"``, ``"65k"``, ``"1.5M"`` or ``"1000"`` to a number; units are powers of 1000.

    Raises:
        RegroupError: not a positive whole number.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([kmbgt]?)", str(text).strip().lower())
    if found:
        value = Fraction(found[1].replace("_", "").replace(",", "")) * 10 ** _UNITS[found[2]]
        if value > 0 and value.denominator == 1:
            return int(value)
    raise RegroupError(
        "a number cannot be read",
        expected="a positive whole number such as 1000, 65k, 1.5M, 300B or 2T (powers of 1000)",
        got=repr(text),
    )


def plan_budget(
    *,
    alpha: float | None = None,
    pretraining_tokens: int | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    batch_size: int,
    window: int,
    parameters: int,
    embedding_parameters: int = 0,
    layers: int,
    hidden: int,
    teacher_parameters: int | None = None,
    teacher_embedding_parameters: int | None = None,
) -> Budget:
    """What a run costs. Exactly one of α (with the original model's tokens), tokens and steps is given.

    A token costs 6·N + 12·L·E·T FLOPs forward and backward and 2·N + 4·L·E·T forward alone (PaLM, Chowdhery et al.
    2022, arXiv:2204.02311, appendix B; the 2·N and 6·N are of Kaplan et al. 2020, arXiv:2001.08361, section 2.1). N
    counts the weights that are multiplied, and attention is counted in full, not the causal half. In an
    encoder-decoder, half of N sees a token of the input and half one of the output: 6·N for each token of input is
    then too much.

    Args:
        alpha: share of the pre-training tokens, in (0, 1].
        pretraining_tokens: of the original model. Together with ``tokens`` or ``steps`` it only serves to compute α.
        tokens: rounded up to whole steps, as the tokens of α are.
        steps: optimizer steps.
        batch_size: sequences in an optimizer step, over all processes.
        window: tokens per sequence (T).
        parameters: all weights of the student.
        embedding_parameters: those of them that are looked up and not multiplied: the input embeddings, unless they
            are tied to the output.
        layers: attention layers (L).
        hidden: width of attention, heads × head_dim (E).
        teacher_parameters: all weights of the teacher; None without one. Its L and E are taken to be the student's.
        teacher_embedding_parameters: ``embedding_parameters`` by default.

    Raises:
        RegroupError: none or more than one was given, or a number is out of range.
    """
    for name, value in (("batch size", batch_size), ("window", window), ("layers", layers), ("hidden size", hidden)):
        _at_least_one(name, value)
    for name, value in (("tokens", tokens), ("steps", steps), ("pre-training tokens", pretraining_tokens)):
        if value is not None:
            _at_least_one(name, value)
    per_step = batch_size * window
    asked = _asked_tokens(alpha, pretraining_tokens, tokens, steps, per_step)
    count = ceil(Fraction(asked, per_step))
    total = count * per_step
    attention = layers * hidden * window
    student = 6 * (parameters - embedding_parameters) + 12 * attention
    teacher = 0
    if teacher_parameters is not None:
        looked_up = embedding_parameters if teacher_embedding_parameters is None else teacher_embedding_parameters
        teacher = 2 * (teacher_parameters - looked_up) + 4 * attention
    if alpha is None and pretraining_tokens is not None:
        alpha = total / pretraining_tokens
    return Budget(
        tokens=total,
        steps=count,
        tokens_per_step=per_step,
        alpha=alpha,
        pretraining_tokens=pretraining_tokens,
        student_flops=total * student,
        teacher_flops=total * teacher,
        asked_tokens=asked,
        student_flops_per_token=student,
        teacher_flops_per_token=teacher,
    )


def _asked_tokens(
    alpha: float | None, pretraining_tokens: int | None, tokens: int | None, steps: int | None, per_step: int
) -> int:
    given = [name for name, value in (("alpha", alpha), ("tokens", tokens), ("steps", steps)) if value is not None]
    if len(given) != 1:
        raise RegroupError(
            "the length of the run is not given" if not given else "the length of the run is given more than once",
            expected="one of: alpha with pretraining-tokens, tokens, steps",
            got=", ".join(given) or "none of them",
            remedy="pass --alpha 0.05 --pretraining-tokens 2T, or --tokens 100M, or --steps 1000",
        )
    if tokens is not None:
        return tokens
    if steps is not None:
        return steps * per_step
    assert alpha is not None
    if not 0 < alpha <= 1:
        raise RegroupError("alpha is a share of the pre-training", expected="above 0, at most 1", got=alpha)
    if pretraining_tokens is None:
        raise RegroupError(
            "alpha is a share of the pre-training, and how long that was is not known",
            expected="the original model's pre-training tokens",
            got="none",
            remedy="pass --pretraining-tokens 2T (its model card or paper says how many), or --tokens or --steps",
        )
    # Decimal arithmetic: 0.07 of 100 tokens are 7, not the next float above it.
    return ceil(Fraction(repr(float(alpha))) * pretraining_tokens)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise RegroupError(f"the {name} of a budget must be positive", expected="at least 1", got=value)


def _short(value: float) -> str:
    """A number with an SI prefix, to be followed by its unit."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
