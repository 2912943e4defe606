"""The Triton kernels, in Triton's interpreter, against attention in float64.

The interpreter is chosen when Triton is imported, so one other process computes all cases; each is checked here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_attention import dense
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regroup.attention.backends import triton as triton_decode
from regroup.attention.call import Call, make_call

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# name: B, G, group, T, S, D, Dv, dtype, arguments
CASES: dict[str, tuple[int, int, int, int, int, int, int, torch.dtype, dict[str, Any]]] = {
    "one-key": (1, 1, 1, 1, 1, 8, 8, torch.float32, {}),
    "two-keys": (2, 2, 3, 1, 2, 20, 20, torch.float32, {}),
    "63-keys": (1, 2, 7, 1, 63, 80, 80, torch.float32, {}),
    "64-keys": (1, 1, 8, 1, 64, 128, 128, torch.float32, {}),
    "65-keys": (1, 1, 32, 1, 65, 64, 64, torch.float32, {}),
    "parts": (1, 1, 3, 1, 1000, 16, 16, torch.float32, {}),
    "widest": (1, 1, 2, 1, 70, 256, 256, torch.float32, {}),
    "other-value": (2, 1, 2, 1, 70, 24, 40, torch.float32, {}),
    "causal": (1, 2, 3, 5, 150, 16, 16, torch.float32, {"is_causal": True}),
    "many-rows": (1, 1, 8, 33, 90, 16, 16, torch.float32, {"is_causal": True}),
    "window": (1, 2, 2, 3, 400, 16, 16, torch.float32, {"is_causal": True, "window": 70}),
    "window-alone": (1, 2, 2, 3, 100, 16, 16, torch.float32, {"window": 5}),
    "softcap": (1, 2, 2, 1, 100, 16, 16, torch.float32, {"softcap": 0.7, "scale": 1.0}),
    "bias": (2, 2, 3, 2, 100, 16, 16, torch.float32, {"bias": (1, 6, 2, 100)}),
    "added-mask": (2, 2, 3, 2, 100, 16, 16, torch.float32, {"mask": (2, 1, 1, 100), "bias": (1, 6, 1, 100)}),
    "padding": (3, 2, 3, 1, 300, 16, 16, torch.float32, {"mask": "padding"}),
    "dead-row": (1, 2, 3, 2, 300, 16, 16, torch.float32, {"mask": "dead"}),
    "bf16": (2, 1, 8, 1, 300, 64, 64, torch.bfloat16, {}),
    "fp16": (2, 1, 8, 1, 300, 64, 64, torch.float16, {}),
    "bf16-bias": (1, 1, 8, 1, 300, 64, 64, torch.bfloat16, {"bias": (1, 8, 1, 300)}),
}
PROGRAM = """
import sys, torch
from regroup.attention.backends import triton as triton_decode
from regroup.attention.call import make_call
cases = torch.load(sys.argv[1])
results = {}
for name, (layout, arguments) in cases.items():
    # Saved tensors are contiguous or not as they were: views into larger blocks stay views.
    call = make_call(*layout, **arguments)
    assert triton_decode.unsupported_reason(call) is None, triton_decode.unsupported_reason(call)
    results[name] = triton_decode.run(call)
torch.save(results, sys.argv[2])
"""


def inputs(name: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    B, G, group, T, S, D, Dv, dtype, arguments = CASES[name]
    torch.manual_seed(len(name))
    query = torch.randn(B, G * group, T, D).to(dtype)
    key = torch.full((B, S + 9, G, D), float("nan"), dtype=dtype)[:, 4 : S + 4].transpose(1, 2)
    value = torch.full((B, G, S + 9, Dv), float("nan"), dtype=dtype)[:, :, :S]
    key.copy_(torch.randn(B, G, S, D))
    value.copy_(torch.randn(B, G, S, Dv))
    made = dict(arguments)
    for name_, wanted in arguments.items():
        if isinstance(wanted, tuple):
            made[name_] = torch.randn(wanted).to(dtype)
        elif wanted == "padding":
            made[name_] = (torch.arange(S)[None] < torch.tensor([[S], [1], [0]]))[:, None, None]
        elif wanted == "dead":
            made[name_] = torch.zeros(1, 1, T, S, dtype=torch.bool)
            made[name_][:, :, 1, 7] = True
    return (query, key, value), made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save({name: inputs(name) for name in CASES}, folder / "cases.pt")
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py", "cases.pt", "results.pt"],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(Path(folder / "results.pt"))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_results(name: str, results: dict[str, Tensor]) -> None:
    tensors, arguments = inputs(name)
    got, expected = results[name], dense(*tensors, **arguments)
    assert got.shape == expected.shape
    assert got.dtype == tensors[0].dtype
    error = got.double() - expected
    if got.dtype == torch.float32:
        assert error.abs().max() <= 3e-6 * max(1.0, expected.abs().max().item())
    else:
        theirs = (
            scaled_dot_product_attention(*tensors, attn_mask=arguments.get("bias"), enable_gqa=True).double() - expected
        )
        assert error.square().mean() <= 4 * theirs.square().mean()
        assert error.abs().max() <= 2 * theirs.abs().max()


@needs_triton
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("causal", {"is_causal": False}),
        ("window", {"window": 71}),
        ("window-alone", {"window": 6}),
        ("softcap", {"softcap": None}),
        ("bias", {"bias": None}),
        ("added-mask", {"mask": None}),
        ("padding", {"mask": None}),
    ],
)
def test_each_argument_matters(name: str, changed: dict[str, Any], results: dict[str, Tensor]) -> None:
    tensors, arguments = inputs(name)
    assert (results[name].double() - dense(*tensors, **{**arguments, **changed})).abs().max() > 1e-3


@needs_triton
def test_heads_are_not_interchangeable(results: dict[str, Tensor]) -> None:
    (query, key, value), arguments = inputs("63-keys")
    assert (results["63-keys"].double() - dense(query, key.roll(1, 1), value, **arguments)).abs().max() > 1e-3


@needs_triton
def test_rows_that_see_nothing_are_zero(results: dict[str, Tensor]) -> None:
    assert (results["padding"][2] == 0).all()
    assert (results["dead-row"][:, :, 0] == 0).all()
    assert (results["dead-row"][:, :, 1] != 0).any()


TINY = make_call(torch.ones(1, 2, 1, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"query": torch.ones(1, 2, 1, 8, dtype=torch.float64)}, "float64"),
        ({"query": torch.ones(1, 2, 1, 8, requires_grad=True)}, "gradients"),
        ({"query": torch.ones(1, 2, 65, 8)}, "65 queries"),
        ({"value": torch.ones(1, 1, 3, 264), "value_dim": 264}, "264"),
        ({"query": torch.ones(1, 2, 1, 8, device="meta")}, "meta"),
    ],
)
def test_what_it_does_not_serve(changes: dict[str, Any], word: str) -> None:
    assert word in (triton_decode.unsupported_reason(Call(**{**TINY.__dict__, **changes})) or "")


@needs_triton
def test_tensors_on_the_cpu_are_for_the_interpreter_alone() -> None:
    assert "CPU" in (triton_decode.unsupported_reason(TINY) or "")


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in (triton_decode.unsupported_reason(TINY) or "")
