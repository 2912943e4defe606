"""Exports in other programs: transformers' tensor parallelism; CTranslate2, ONNX Runtime and OpenVINO where they are.

optimum, by which the last two are reached, needs another transformers than regroup: ``REGROUP_OPTIMUM_PYTHON`` names
the Python of an environment of its own, with ``optimum-onnx[onnxruntime]`` and ``optimum-intel[openvino]``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from helpers import run
from regroup.modeling import load, load_tokenizer

Saved = Callable[[str], Path]

STORIES = Path(__file__).parents[3] / "shared/models/stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the model is not in shared/models")
needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed"
)
OPTIMUM = os.environ.get("REGROUP_OPTIMUM_PYTHON")
needs_optimum = pytest.mark.skipif(OPTIMUM is None, reason="REGROUP_OPTIMUM_PYTHON names no environment with optimum")
WEIGHTS = ["--calibration", "none"]
UNIFORM, MIXED = ["--kv-heads", "2", *WEIGHTS], ["--layers", "0:4,1:2,2:1,3:4,4:2", *WEIGHTS]


def export(source: Path, destination: Path, *options: object) -> Path:
    status, _, message = run("export", source, destination, "--to", "hf", *options)
    assert status == 0, message
    return destination


def share(folder: Path, answer: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """Run a checkpoint on several processes of this machine."""
    script = Path(__file__).with_name("parallel_process.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launch, str(script), str(folder), str(answer)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.slow
def test_transformers_shares_what_was_exported_for_it(saved: Saved, tmp_path: Path) -> None:
    """One KV head for two devices: transformers cuts it in half, and the export repeats it."""
    converted = tmp_path / "converted"
    assert run("convert", saved("llama"), converted, "--kv-heads", 1, "--calibration", "none")[0] == 0
    done = share(export(converted, tmp_path / "two", "--tensor-parallel", 2), tmp_path / "answer.pt", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = torch.load(tmp_path / "answer.pt")
    assert answer["rows"] == 10  # one head a device
    with torch.no_grad():
        whole: torch.Tensor = cast(Any, load(converted)).eval()(torch.arange(3, 19)[None]).logits
    assert float((answer["logits"] - whole).abs().max()) <= 1e-5 * float(whole.abs().max())

    assert share(converted, tmp_path / "never.pt", 2).returncode != 0
    assert not (tmp_path / "never.pt").exists()


@needs_ctranslate2
@needs_stories
@pytest.mark.parametrize("options", [UNIFORM, MIXED])
def test_ctranslate2_converts_what_was_exported(options: list[str], tmp_path: Path) -> None:
    """Its own converter reads the stock form; layers with other KV heads after ``--expand``."""
    ctranslate2: Any = importlib.import_module("ctranslate2")
    converted, out = tmp_path / "converted", tmp_path / "out"
    assert run("convert", STORIES, converted, *options)[0] == 0
    exported = export(converted, out, "--expand")
    ctranslate2.converters.TransformersConverter(str(exported)).convert(str(tmp_path / "ct2"))
    tokenizer = load_tokenizer(exported)
    ids = tokenizer("Once upon a time")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    found = torch.from_numpy(np.array(generator.forward_batch([tokens])))
    made = generator.generate_batch([tokens], max_length=24, include_prompt_in_result=False, sampling_topk=1)
    assert_answers_of(converted, ids, found, made[0].sequences_ids[0])


@needs_optimum
@needs_stories
@pytest.mark.parametrize("options", [UNIFORM, MIXED])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_optimum_exports_what_was_exported(kind: str, options: list[str], tmp_path: Path) -> None:
    """ONNX Runtime and OpenVINO run the graph that optimum makes of the stock form."""
    converted = tmp_path / "converted"
    assert run("convert", STORIES, converted, *options)[0] == 0
    exported = export(converted, tmp_path / "out", "--expand")
    ids = load_tokenizer(exported)("Once upon a time")["input_ids"]
    (tmp_path / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    assert OPTIMUM is not None
    script, answer = Path(__file__).with_name("optimum_process.py"), tmp_path / "answer.npz"
    # It shares no path with this process: the other environment has other versions.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [OPTIMUM, str(script), kind, str(exported), str(tmp_path / "ids.json"), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(answer) as found:
        print(found["versions"])
        assert_answers_of(converted, ids, torch.from_numpy(found["logits"]), found["greedy"].tolist())


def assert_answers_of(converted: Path, ids: list[int], found: torch.Tensor, made: list[int]) -> None:
    """Logits (1, positions, vocabulary) and 24 greedy tokens are those of this converted model, not of another."""
    model, prompt = cast(Any, load(converted)).eval(), torch.tensor([ids])
    with torch.no_grad():
        wanted = model(prompt).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    assert made == greedy[0, len(ids) :].tolist()
    # Changed weights are another model.
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
    with torch.no_grad():
        other = model(prompt).logits
    assert float((found - other).abs().max()) > 0.1 * float(wanted.abs().max())
