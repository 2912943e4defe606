"""Tables of docs/real-models.md in Markdown, from records of ``python -m recipes.real``."""

from __future__ import annotations

from typing import Any

from regroup.safe_text import code_span, visible

from .ways import CONVERSIONS, TRAININGS

TITLES = {way.name: way.title for way in (*CONVERSIONS, *TRAININGS)}


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def heading(*cells: object) -> list[str]:
    return [row(*cells), row(*("---" for _ in cells))]


def sections(*records: dict[str, Any]) -> list[str]:
    """All records, one after the other."""
    lines: list[str] = []
    for record in records:
        lines += [*([""] if lines else []), *section(record)]
    return lines


def section(record: dict[str, Any]) -> list[str]:
    """A record: the original model, then for each size of its cache quality, cost and samples."""
    settings, results = record["configuration"], record["results"]
    lines = [f"## {settings['original']}", "", _settings(record), ""]
    lines += heading("original model", "nats per token")
    for name, found in results["original"].items():
        lines.append(row(name, f"{found['nats_per_token']:.3f} ± {found['standard_error']:.3f}"))
    for shape in settings["shapes"]:
        rows = [entry for entry in results["rows"] if entry["shape"] == shape["name"]]
        if rows:
            lines += ["", f"### {_initial(shape['title'])}", "", *quality(rows), "", *cost(rows)]
            lines += ["", *samples(results, shape["name"])]
    return lines


def summary(record: dict[str, Any]) -> list[str]:
    """The first size of the cache alone: excess loss by way and tokens of uptraining."""
    shape, results = record["configuration"]["shapes"][0]["name"], record["results"]
    names = list(results["original"])
    lines = heading("", "tokens of uptraining", *names)
    whole = (f"{found['nats_per_token']:.2f}" for found in results["original"].values())
    lines.append(row("original model: nats per token", "", *whole))
    for entry in results["rows"]:
        if entry["shape"] == shape:
            found = (entry["texts"][name] for name in names)
            excess = (f"{one['excess_nats_per_token']:+.2f} ± {one['excess_standard_error']:.2f}" for one in found)
            lines.append(row(TITLES[entry["way"]], f"{entry['tokens']:,}" if entry["tokens"] else "", *excess))
    return lines


def _initial(title: str) -> str:
    return title[:1].upper() + title[1:]


def _settings(record: dict[str, Any]) -> str:
    settings, machine = record["configuration"], record["machine"]
    given = settings["texts"]["given"]["name"]
    starts = " that begin where documents do" if settings["document_starts"] else ""
    return (
        f"{settings['windows']} windows of {settings['window']} tokens of each held-out text{starts}; given text: "
        f"{given}; {settings['calibration_tokens']:,} calibration tokens. {record['date'][:10]}, {machine['cores']} "
        f"cores, {machine['processor']}."
    )


def quality(rows: list[dict[str, Any]]) -> list[str]:
    """Excess loss on each text with its paired error and its comparison, KL and agreement."""
    names = list(rows[0]["texts"])
    lines = heading(
        "",
        "tokens",
        *(f"{name}: over the original" for name in names),
        *(f"{name}: of `mean`'s / the paper's" for name in names),
        "KL",
        "top-1, %",
        "seeds",
    )
    for entry in rows:
        found = [entry["texts"][name] for name in names]
        lines.append(
            row(
                TITLES[entry["way"]] + ("" if entry["rate"] is None else f", rate {entry['rate']:g}"),
                f"{entry['tokens']:,}",
                *(f"{one['excess_nats_per_token']:+.3f} ± {one['excess_standard_error']:.3f}" for one in found),
                *(_share(one.get("against")) for one in found),
                " / ".join(f"{one['kl_nats_per_token']:.3f}" for one in found),
                " / ".join(f"{100 * one['top1_agreement']:.1f}" for one in found),
                entry["seeds"],
            )
        )
    return lines


def _share(against: dict[str, Any] | None) -> str:
    if against is None:
        return "–"
    share = "" if against["share_of_its_excess"] is None else f"{against['share_of_its_excess']:.0%}, "
    return f"{share}{against['difference']:+.3f} ± {against['standard_error']:.3f}"


def cost(rows: list[dict[str, Any]]) -> list[str]:
    """Time and memory of each command."""
    lines = heading("", "tokens", "command", "seconds", "processor seconds", "peak memory, GB")
    for entry in rows:
        for command, used in entry["took"].items():
            seconds = ("–" if used[name] is None else f"{used[name]:,.0f}" for name in ("seconds", "cpu_seconds"))
            memory = f"{used['peak_memory_bytes'] / 1e9:.1f}"
            lines.append(row(TITLES[entry["way"]], f"{entry['tokens']:,}", f"`{command}`", *seconds, memory))
    return lines


def samples(results: dict[str, Any], shape: str) -> list[str]:
    """Greedy continuations of the first prompt, side by side with the original's."""
    lines: list[str] = []
    for number, prompt in enumerate(results["prompts"]):
        lines += [*([""] if lines else []), *heading(f"after {_quoted(prompt)}", "tokens", "greedy continuation")]
        for entry in results["samples"]:
            key = entry["row"]
            if key is None or key[0] == shape:
                name, tokens = ("original model", "") if key is None else (TITLES[key[1]], f"{key[2]:,}")
                lines.append(row(name, tokens, _quoted(entry["texts"][number])))
    return lines


def _quoted(text: str) -> str:
    # In a table, a bar divides cells even within code.
    return code_span(visible(text).replace("|", "¦")) if text else ""
