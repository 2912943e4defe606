"""Which models each table and figure of the paper needs, and what their results come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from .settings import ALPHA, Scale
from .variants import OURS, Variant

# Table 1's rows: name, parent, KV heads (None: as many as heads; "groups": the scale's), method.
ROWS: tuple[tuple[str, str, int | str | None, str], ...] = (
    ("MHA small", "small", None, "mean"),
    ("MHA large", "large", None, "mean"),
    ("MQA large", "large", 1, "mean"),
    ("GQA large", "large", "groups", "mean"),
    ("MQA large, ours", "large", 1, OURS),
    ("GQA large, ours", "large", "groups", OURS),
)
# Figure 4's, from one large parent to one KV head.
METHODS = ("mean", "first", "random", OURS)
SCRATCH = "MQA large, from scratch"
# What fine-tuned answers have to be compared with: the same number of further tokens, and no pre-training at all.
CONTINUED, UNTRAINED = "MHA large, continued", "MHA large, untrained"


def table(family: str, scale: Scale, seed: int) -> dict[str, Variant]:
    """Table 1, and what Figure 3 draws of it."""
    found = {}
    for name, parent, heads, method in ROWS:
        count = scale.groups if heads == "groups" else heads
        assert not isinstance(count, str)
        found[name] = Variant(family, parent, count, method, 0.0 if count is None else ALPHA, seed)
    return found


def methods(family: str, seed: int) -> dict[str, Variant]:
    """Figure 4."""
    return {method: Variant(family, "large", 1, method, ALPHA, seed) for method in METHODS}


def proportions(family: str, scale: Scale, seed: int) -> dict[tuple[str, int, float], Variant]:
    """Figure 5: method, KV heads and α."""
    return {
        (method, heads, alpha): Variant(family, "large", heads, method, alpha, seed)
        for method in ("mean", OURS)
        for heads in (1, scale.groups)
        for alpha in scale.alphas
    }


def scratch(family: str, seed: int) -> Variant:
    """Appendix A's: one KV head from the first step of pre-training on."""
    return Variant(family, "scratch", None, seed=seed)


def fine_tuned(scale: Scale, seed: int) -> dict[str, Variant]:
    """The encoder-decoders whose answers are compared: Table 1's, appendix A's, and two to judge them by."""
    family = "encoder-decoder"
    return {
        **table(family, scale, seed),
        CONTINUED: Variant(family, "large", alpha=ALPHA, seed=seed),
        UNTRAINED: Variant(family, "untrained", seed=seed),
        SCRATCH: scratch(family, seed),
    }


def variants(family: str, scale: Scale) -> list[Variant]:
    """All of them, once each, in an order that begins with the longest trainings."""
    found: dict[Variant, None] = {}
    for seed in range(scale.seeds):
        for part in (table(family, scale, seed), methods(family, seed), proportions(family, scale, seed)):
            found |= dict.fromkeys(part.values())
        found[scratch(family, seed)] = None
    if family == "encoder-decoder":
        found |= dict.fromkeys(tuned(scale))
    return sorted(found, key=lambda variant: -variant.alpha)


def tuned(scale: Scale) -> list[Variant]:
    """Encoder-decoders that are fine-tuned."""
    seeds = range(max(scale.seeds, scale.tuning_seeds))
    return [variant for seed in seeds for variant in fine_tuned(scale, seed).values()]


def trained(found: Iterable[Variant]) -> list[Variant]:
    """Without those that differ in the seed of fine-tuning alone."""
    return list({variant.name: variant for variant in found}.values())


Quality = Callable[[Variant], dict[str, Any]]


def summarise(scale: Scale, loss: Quality, answers: Quality, seconds: dict[str, Any]) -> dict[str, Any]:
    """Every table and figure, from the results of single models.

    Args:
        scale: of the runs.
        loss: of a variant on held-out text, by name of the measure.
        answers: of a fine-tuned encoder-decoder, by name of the measure; larger is better.
        seconds: a sample, by family and name of Table 1's row.
    """
    tuning = {
        name: spread([answers(fine_tuned(scale, seed)[name]) for seed in range(scale.tuning_seeds)])
        for name in fine_tuned(scale, 0)
    }
    return {
        "encoder-decoder": {
            **_family("encoder-decoder", scale, (loss, answers), loss, seconds),
            "fine_tuning": [{"model": name, **found} for name, found in tuning.items()],
        },
        "decoder": _family("decoder", scale, (loss,), loss, seconds),
    }


def _family(
    family: str, scale: Scale, ways: tuple[Quality, ...], loss: Quality, seconds: dict[str, Any]
) -> dict[str, Any]:
    def row(name: str) -> dict[str, Any]:
        return _over(scale, lambda seed: table(family, scale, seed)[name], *ways)

    def way(method: str) -> dict[str, Any]:
        return _over(scale, lambda seed: methods(family, seed)[method], loss)

    def proportion(key: tuple[str, int, float]) -> dict[str, Any]:
        return _over(scale, lambda seed: proportions(family, scale, seed)[key], loss)

    names = list(table(family, scale, 0))
    return {
        "table_1": [{"model": name, **row(name), **seconds.get(family, {}).get(name, {})} for name in names],
        "figure_4": [{"method": method, **way(method)} for method in METHODS],
        "figure_5": [
            {"method": key[0], "num_key_value_heads": key[1], "alpha": key[2], **proportion(key)}
            for key in proportions(family, scale, 0)
        ],
        "appendix_a": [
            {"model": SCRATCH, **_over(scale, lambda seed: scratch(family, seed), *ways)},
            *({"model": name, **row(name)} for name in names if name != "MHA small"),
        ],
    }


def _over(scale: Scale, pick: Callable[[int], Variant], *ways: Quality) -> dict[str, Any]:
    """All measures of a variant, over seeds."""
    found = [{key: value for way in ways for key, value in way(pick(seed)).items()} for seed in range(scale.seeds)]
    return spread(found)


def spread(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and each seed's value of every number."""
    merged: dict[str, Any] = {}
    for key, value in found[0].items():
        values = [row[key] for row in found]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            merged[key] = {
                "mean": mean(values),
                "standard_deviation": stdev(values) if len(values) > 1 else None,
                "seeds": values,
            }
    return merged


def plain(scale: Scale) -> dict[str, Any]:
    """A scale's numbers for the record."""
    return asdict(scale)
