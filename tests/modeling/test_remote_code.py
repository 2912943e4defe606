"""Nothing that lies in a checkpoint is run, whoever answers transformers' question with yes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import runs
from helpers import copy, edit_json
from regroup.cli import app

ROOT = Path(__file__).parents[2]
# Calls into transformers that may run code of a checkpoint; all take ``trust_remote_code``.
LOADERS = {"from_pretrained", "pipeline"}
# Classes that read a checkpoint's files and have no code to run.
PLAIN = {"GenerationConfig", "PreTrainedConfig"}


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint each of whose parts asks for code that leaves a mark, and text."""
    folder = tmp_path_factory.mktemp("trap")
    original, converted = runs.pair(folder)
    runs.text(folder)
    code = f"open({str(folder / 'MARK')!r}, 'a').close()\n"
    for name in (original, converted):
        edit_json(name / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
        edit_json(name / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
        (name / "custom_generate").mkdir()
        (name / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs): return None\n")
        (name / "evil.py").write_text(code)
    return folder


def commands(folder: Path, out: Path) -> dict[str, list[object]]:
    original, converted, text = folder / "parent", folder / "child", folder / "held-out.txt"
    calibration = ("--calibration", text, "--calibration-window", 16, "--calibration-tokens", 256)
    return {
        "inspect": ["inspect", original],
        "convert": ["convert", original, out, "--kv-heads", 2, "--method", "mean"],
        "calibrate": ["convert", original, out, "--kv-heads", 2, *calibration],
        "plan": ["plan", original, "-o", out, "--kv-budget", "50%", *calibration],
        "evaluate": ["evaluate", original, "--data", text, "--window", 16],
        "teacher": ["evaluate", converted, "--teacher", original, "--data", text, "--window", 16],
        "verify": ["verify", original, converted],
        "export": ["export", converted, out, "--to", "hf", "--expand"],
        "gguf": ["export", converted, out.with_suffix(".gguf"), "--to", "gguf"],
        "uptrain": [
            "uptrain",
            converted,
            "--teacher",
            original,
            "--data",
            text,
            "--steps",
            1,
            "--window",
            16,
            "-o",
            out,
        ],
    }


@pytest.mark.parametrize("command", commands(Path(), Path("x")))
def test_no_command_runs_code_of_a_checkpoint(command: str, trap: Path, tmp_path: Path) -> None:
    arguments = [str(argument) for argument in commands(trap, tmp_path / "out")[command]]
    result = CliRunner().invoke(app, arguments, input="y\n" * 50)
    assert not (trap / "MARK").exists()
    assert result.exit_code in (0, 1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "[y/N]" not in result.output


def test_the_trap_works(trap: Path, tmp_path: Path) -> None:
    folder = copy(trap / "parent", tmp_path / "parent")
    with pytest.raises((AttributeError, ValueError)):  # the code was run, and holds no tokenizer
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (trap / "MARK").exists()
    (trap / "MARK").unlink()


def test_a_tokenizer_with_code_is_refused_in_words(trap: Path) -> None:
    result = CliRunner().invoke(
        app, ["evaluate", str(trap / "parent"), "--data", str(trap / "held-out.txt")], input="y\n"
    )
    assert result.exit_code == 2
    assert "code that comes with the checkpoint" in " ".join(result.output.split())


def trusting(source: str) -> Iterator[int]:
    """Lines with a call that does not say ``trust_remote_code=False``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name not in LOADERS or owner.rpartition(".")[2] in PLAIN:
            continue
        said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
        if not (said and isinstance(said[0], ast.Constant) and said[0].value is False):
            yield node.lineno


def test_every_call_into_transformers_refuses_code() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for part in ("src", "recipes", "benchmarks")
        for path in sorted((ROOT / part).rglob("*.py"))
        for line in trusting(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("call", "lines"),
    [
        ("AutoTokenizer.from_pretrained(folder)", [1]),
        ("cls.from_pretrained(folder, trust_remote_code=True)", [1]),
        ("cls.from_pretrained(folder, **kwargs, trust_remote_code=asked)", [1]),
        ("cls.from_pretrained(folder, **kwargs, trust_remote_code=False)", []),
        ("transformers.GenerationConfig.from_pretrained(folder)", []),
    ],
)
def test_the_count_sees_calls(call: str, lines: list[int]) -> None:
    assert list(trusting(call)) == lines
