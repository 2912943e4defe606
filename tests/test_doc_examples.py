"""The examples of the users' pages, run as they stand, with small stand-ins for the models that they name."""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from doc_examples import NOT_RUN, Block, blocks, commands, furnish, launched, misused
from helpers import run
from regroup.uptraining.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHELL = {"sh", "console"}
# Pages for users, with what has been done before they begin. attention.md and decoding.md have tests of their own.
RUN: dict[str, list[str]] = {
    "README.md": [],
    "docs/quick-start.md": [],
    "docs/llama-2-7b.md": [],
    "docs/choosing-g.md": [],
    "docs/plans.md": [],
    "docs/evaluating.md": ["convert original converted --kv-heads 2 --method mean"],
    "docs/uptraining.md": [],
    "docs/verifying.md": ["convert llama-2-7b llama-2-7b-gqa8 --kv-heads 8 --calibration none"],
    "docs/export.md": [
        "convert llama-2-7b llama-2-7b-gqa8 --kv-heads 8 --method mean",
        "convert llama-2-7b llama-2-7b-mixed --layers 0:16,1:8 --method mean",
    ],
    "docs/reporting.md": [
        "convert original converted --kv-heads 2 --method mean",
        "plan original --kv-heads 2 -o plan.json",
        "evaluate original --task qa.yaml --outputs original.outputs.jsonl",
        "uptrain converted --data train.txt --steps 2 --window 32 --batch-size 2 -o run",
    ],
}
# The deepest layer that a page names.
LAYERS = {"docs/plans.md": 32, "docs/export.md": 2}
# Half a minute each; .ci/run runs them next to the suite.
LONG = {"README.md", "docs/reporting.md", "docs/choosing-g.md"}
# What they print is arithmetic, and has to be what the page says.
EXACT = {"docs/llama-2-7b.md"}
TASK = 'data: dev.jsonl\nprompt: "{source}"\nmax-new-tokens: 4\n'


def test_every_page_with_examples_is_run() -> None:
    own = {"docs/attention.md", "docs/decoding.md"}
    # For people who work on regroup, made by programs that have tests of their own, or for GPUs alone.
    others = {
        "CONTRIBUTING.md",
        "docs/adding-a-family.md",
        "docs/benchmarks.md",
        "docs/cli.md",
        "docs/real-models.md",
        "docs/results.md",
        "docs/scale.md",
    }
    found = {
        page.relative_to(ROOT).as_posix()
        for page in PAGES
        if {block.language for block in blocks(page.read_text(encoding="utf-8"))} & {*SHELL, "python"}
    }
    assert found == {*RUN, *own, *others}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_is_marked_as_shell(page: Path) -> None:
    """A command in a block of no language would be neither run nor parsed."""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in SHELL:
            assert not re.search(r"^(\$ |regroup |python |pip |make |torchrun |accelerate )", block.text, re.M), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken_by_the_command_line(page: Path) -> None:
    if page.name == "cli.md":
        return
    wrong = [
        f"{page.name}:{block.line}: {reason}"
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language in SHELL
        for command in commands(block)
        if command.arguments is not None and (reason := misused(command.arguments))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_launchers_take_their_options(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        for command in commands(block) if block.language in SHELL else ():
            launched(command.words)


@pytest.mark.parametrize("launcher", ["torchrun --nproc_per_cpu 2", "accelerate launch --processes 2"])
def test_options_that_launchers_do_not_take_are_found(launcher: str) -> None:
    with pytest.raises(SystemExit):
        launched((*launcher.split(), "-m", "regroup.cli", "uptrain"))


@pytest.mark.parametrize(
    "line",
    [
        "regroup shrink original",
        "regroup convert original converted --heads 2",
        "regroup convert original converted --kv-heads many",
        "regroup convert original",
        "regroup inspect original --context 0",
        "regroup bench decode model --context 8",
        ".venv/bin/regroup plan original --to 2",
        "torchrun --nproc-per-node 8 -m regroup.cli uptrain --recipe r.yaml --no-such-option",
        f"{NOT_RUN}needs a GPU\nregroup uptrain --recipes r.yaml",
    ],
)
def test_commands_that_it_does_not_take_are_found(line: str) -> None:
    (command,) = commands(Block("sh", line, 1))
    assert command.arguments is not None
    assert misused(command.arguments)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RUN])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, layers=LAYERS.get(name, 1))
    (tmp_path / "qa.yaml").write_text(TASK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regroup.console.out.width", 120)
    # The stand-ins need less text than the models that the pages are about.
    monkeypatch.setattr("regroup.plans.calibration.OWN_TOKENS", 4096)
    for line in RUN[name]:
        _succeeds(line.split())
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile(block.text, f"{name}:{block.line}", "exec"), names)
            ran += 1
        elif block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language in SHELL:
            for command in commands(block):
                if not command.runs:
                    continue
                if command.words[0] == "make":
                    assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
                    continue
                if command.words[0] == "cmp":
                    assert filecmp.cmp(*command.words[1:], shallow=False), f"{name}:{block.line}"
                    continue
                assert command.arguments is not None, f"{name}:{block.line}: {command.words} is neither run nor marked"
                printed = _succeeds(command.arguments)
                if name in EXACT and command.printed is not None:
                    assert printed.split() == command.printed.split(), f"{name}:{block.line}"
                ran += 1
    assert ran


def _succeeds(arguments: Any) -> str:
    status, out, message = run(*arguments)
    assert status == 0, f"regroup {' '.join(arguments)}: {message}"
    return out


def test_the_recipe_is_one() -> None:
    (text,) = [b.text for b in blocks((ROOT / "docs/uptraining.md").read_text("utf-8")) if "# recipe.yaml" in b.text]
    given = yaml.safe_load(text)
    assert Recipe(**{name.replace("-", "_"): value for name, value in given.items()})


def llama_2_figures(conversion: dict[str, Any], calibration: dict[str, Any], weights: int) -> list[str]:
    """What docs/llama-2-7b.md has to say, from two records and the bytes of the original model's weights."""
    seconds, size = conversion["results"]["median_seconds"], conversion["results"]["source_bytes"]
    longer = calibration["results"]["extrapolated"]
    tokens = longer["windows"] * calibration["configuration"]["window"]
    return [
        f"{seconds['convert']:.1f} s for a Llama of {size / 1e9:.1f} GB",
        f"`cp -r` took {seconds['cp_r']:.1f} s",
        f"At that rate {weights / 1e9:.1f} GB would take {weights * seconds['convert'] / size:.0f} s",
        f"extrapolated to all {longer['layers']}: about {longer['extrapolated_seconds'] / 3600:.0f} hours",
        f"for {tokens:,} tokens",
    ]


def test_the_llama_page_says_what_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/llama-2-7b.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (config,) = [block.text for block in blocks(page) if block.file == "config.json"]
    Path("config.json").write_text(config, encoding="utf-8")
    command = "advise config.json --hardware l4 --context 4096 --batch 8 --record advice.json"
    _succeeds(command.split())
    original = json.loads(Path("advice.json").read_text(encoding="utf-8"))["results"]["candidates"][0]
    conversion, calibration = (
        json.loads((ROOT / f"benchmarks/records/{name}.json").read_text("utf-8"))
        for name in ("conversion", "calibration")
    )
    text = " ".join(page.split())
    nbytes = original["weights_bytes"]
    assert [figure for figure in llama_2_figures(conversion, calibration, nbytes) if figure not in text] == []
    conversion["results"]["median_seconds"]["convert"] *= 1.1
    assert [figure for figure in llama_2_figures(conversion, calibration, nbytes) if figure not in text]
