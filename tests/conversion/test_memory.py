"""Conversion on text holds one layer, not the model: measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path
from typing import Any
import torch
from regroup.checkpoint import open_checkpoint
from regroup.calibration.settings import Settings
from regroup.calibration.calibrate import calibrate
from regroup.layout import detect
from regroup.plans import CalibrationText, make_plan
from regroup.solver.store import SolutionStore

torch.set_num_threads(1)
folder, scratch = Path(sys.argv[1]), Path(sys.argv[2])
peak, running = 0, True

def anonymous():
    # Pages of the mapped checkpoint are not counted: the system takes them back when it needs room.
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
checkpoint = open_checkpoint(folder)
layout = detect(checkpoint.config, checkpoint.tensors)
plan = make_plan(layout, 2, method="auto", calibration=CalibrationText("random"))
batches = [{"input_ids": torch.randint(64, (1, 64)), "attention_mask": torch.ones(1, 64, dtype=torch.long)}] * 3
calibrate(checkpoint, layout, plan, batches, SolutionStore(scratch), Settings())
running = False
thread.join()
print(json.dumps(peak))
"""


def peak(folder: Path, layers: int) -> tuple[int, int]:
    """Most anonymous memory of a conversion, and bytes of the parent's weights."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=64,
        dtype="bfloat16",
    )
    parent = folder / str(layers)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(parent)
    scratch = folder / f"scratch-{layers}"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(parent), str(scratch)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]), (parent / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_layers(tmp_path: Path) -> None:
    few, small = peak(tmp_path, 2)
    many, large = peak(tmp_path, 22)
    assert large - small > 350e6
    # Masks, moments and the allocator's slack; a copy of the weights would be all of the difference, in float32 twice.
    assert many - few < 0.2 * (large - small)
