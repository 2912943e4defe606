"""Under ``torch.autocast`` attention is cast as PyTorch casts its own, in every family, with a cache and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_attention import plain
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

import regroup
import tiny
from regroup.attention import BACKENDS, explain, grouped_query_attention
from regroup.errors import RegroupError

scaled_dot_product_attention: Any = functional.scaled_dot_product_attention
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUTSIDE = {"bloom", "falcon", "falcon_sequential", "falcon_alibi"}
INSIDE = sorted(set(tiny.FAMILIES) - OUTSIDE)

regroup.register()


def tensors(queries: int, keys: int, *dtypes: torch.dtype) -> list[Tensor]:
    torch.manual_seed(keys)
    shapes = (2, 8, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64)
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def outcome(attend: Any, *arguments: Any, **more: Any) -> torch.dtype | None:
    """The result's dtype, or None where the call is refused."""
    try:
        return attend(*arguments, **more).dtype
    except (RegroupError, RuntimeError):
        return None


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
def test_dtypes_are_those_of_pytorch(autocast: torch.dtype | None) -> None:
    """All 64 triples of dtypes: the same are taken and refused, with the same result."""
    found = set()
    for first in FLOATS:
        for second in FLOATS:
            for third in FLOATS:
                given = tensors(3, 5, first, second, third)
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    wanted = outcome(scaled_dot_product_attention, *given, enable_gqa=True)
                    assert outcome(grouped_query_attention, *given) == wanted
                found.add(wanted)
    assert found == ({autocast, torch.float64, None} if autocast else {*FLOATS, None})


@pytest.mark.parametrize("mask", [torch.float32, torch.bfloat16, torch.bool])
def test_a_mask_is_cast_too(mask: torch.dtype) -> None:
    """The least float32 becomes minus infinity in bfloat16, so that a row of it sees nothing: with SDPA, as here."""
    given = tensors(3, 5, torch.float32, torch.float32, torch.bfloat16)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0], hidden[1, 2:] = True, True
    least = torch.finfo(torch.float32).min
    extra = ~hidden if mask == torch.bool else torch.zeros(3, 5).masked_fill(hidden, least).to(mask)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = scaled_dot_product_attention(*given, attn_mask=extra, enable_gqa=True)
        for backend in ("auto", "reference", "packed", "dense"):
            got = grouped_query_attention(*given, mask=extra, backend=backend)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)
    assert bool((wanted[:, :, 0] == 0).all())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("flex", "triton")])
@pytest.mark.parametrize("keys", [3, 40, 2000])
def test_the_result_is_that_of_the_cast_call_whatever_serves_it(backend: str, keys: int) -> None:
    """Bit for bit, in one dtype for every backend and context; sums stay wider than the dtype."""
    given = tensors(1, keys, torch.float32, torch.float32, torch.bfloat16)
    low = [tensor.bfloat16() for tensor in given]
    more: dict[str, Any] = {"softcap": 5.0} if backend in ("reference", "packed", "cpu") else {}
    if backend == "cpu" and "compiled kernel" in explain(*low).others.get("cpu", ""):
        pytest.skip("there is no compiler")
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_query_attention(*given, **more, backend=backend)
        lost = torch.softmax(low[0] @ low[1].repeat_interleave(4, 1).mT * 64**-0.5, -1) @ low[2].repeat_interleave(4, 1)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, grouped_query_attention(*low, **more, backend=backend))
    wanted = plain(*low, **more)
    assert (got.double() - wanted).abs().max() < 0.01
    # Negative control: scores that are rounded to 16 bits are further off.
    if keys == 2000 and not more:
        assert (lost.double() - wanted).square().mean() > 1.5 * (got.double() - wanted).square().mean()


def test_gradients_under_autocast_are_those_of_pytorch() -> None:
    found = []
    for ours in (True, False):
        leaves = [tensor.requires_grad_() for tensor in tensors(70, 70, torch.float32, torch.float32, torch.float32)]
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                out = grouped_query_attention(*leaves, is_causal=True)
            else:
                out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


def test_outside_of_autocast_mixed_dtypes_are_refused() -> None:
    given = tensors(3, 5, torch.float32, torch.float32, torch.bfloat16)
    with pytest.raises(RegroupError, match=r"query and value differ in dtype[\s\S]*autocast"):
        grouped_query_attention(*given)


def other(name: str) -> str:
    """What a family is compared with: eager where transformers' SDPA has no soft cap."""
    return "eager" if name.startswith("gemma2") else "sdpa"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", INSIDE)
def test_every_family_trains(name: str) -> None:
    """Loss and gradients with checkpointing, which computes each layer twice, as transformers' implementation."""
    given = tiny.inputs(name, 2, 9)
    labels = given.get("decoder_input_ids", given.get("input_ids"))
    norms, losses = [], []
    for implementation in (other(name), "regroup"):
        model: Any = tiny.build(name, attn_implementation=implementation).train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**given, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in INSIDE if tiny.FAMILIES[name].kind == "causal"])
def test_every_family_decodes(name: str) -> None:
    """Prompt, then tokens one by one, with transformers' growing cache and with ours, beside transformers' SDPA."""
    ids = tiny.inputs(name, 2, 9)["input_ids"]
    wanted: Any = None
    for implementation, ours in ((other(name), False), ("regroup", False), ("regroup", True)):
        model: Any = tiny.build(name, attn_implementation=implementation)
        cache: Any = regroup.KVCache.for_model(model, 9) if ours else DynamicCache(config=model.config)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [ids[:, :6], *ids[:, 6:].split(1, 1)]
            logits = torch.cat([model(part, past_key_values=cache).logits.float() for part in parts], 1)
        wanted = logits if wanted is None else wanted
        scale = wanted.abs().max().item()
        assert (logits - wanted).abs().max().item() < 0.05 * scale
        assert (logits - wanted.roll(1, 1)).abs().max().item() > 0.1 * scale
        if ours:
            assert {cache.layers[0].keys.dtype, cache.layers[0].values.dtype} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True), (True, True)])
def test_a_cache_takes_what_autocast_leaves_it(first: bool, then: bool) -> None:
    """A prompt under autocast and tokens without, and the other way round, as with transformers' cache."""
    model: Any = tiny.build("llama_grouped", attn_implementation="regroup")
    ids = tiny.inputs("llama_grouped", 2, 9)["input_ids"]
    found = []
    for cache in (DynamicCache(config=model.config), regroup.KVCache.for_model(model, 9), regroup.KVCache(spare=1)):
        logits = torch.empty(0)
        for part, on in ((ids[:, :6], first), (ids[:, 6:7], then), (ids[:, 7:], then)):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                logits = model(part, past_key_values=cache).logits.float()
        found.append(logits)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0.02 * found[0].abs().max().item())
