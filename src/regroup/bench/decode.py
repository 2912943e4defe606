"""Decoding speed of models, compared with the least time that their bytes and arithmetic take on this machine."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .build import Model, build, quiet
from .machine import OtherProcesses, quantiles
from .variants import decoder_layers
from .work import Ceiling, Roofs, Work, cache_bytes

PATHS = ("regroup", "transformers")


@dataclass
class Timing:
    """Seconds to the first token and per further token; final bytes of the cache, if it is regroup's."""

    first: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    others: float | None = None
    prepared: dict[str, str] = field(default_factory=dict)


def measure(model: Model, work: Work, paths: Sequence[str] = ("regroup",)) -> dict[str, Timing]:
    """Time ``generate`` on random prompts.

    Args:
        paths: ``"regroup"``: attention, cache and linear layers of regroup; ``"transformers"``: its
            defaults. Both use the same weights.

    Returns:
        A timing for each path.
    """
    device = torch.device(work.device)
    with quiet():
        made = build(model, work.dtype, device)
    timings = {}
    # transformers first: prepare_for_inference cannot be undone.
    for path in sorted(paths, key=PATHS.index, reverse=True):
        prepared = {"attention": str(made.config._attn_implementation), "linear_layers": "as they are"}
        if path == "regroup":
            prepared = prepare(made)
        _generate(made, model, Work(work.batch, min(8, work.prompt), 3, work.dtype, work.device), path)
        timing = Timing(prepared=prepared)
        with OtherProcesses() as others:
            for _ in range(work.repeats):
                stamps, nbytes = _generate(made, model, work, path)
                timing.first.append(stamps[1] - stamps[0])
                timing.tokens += [after - before for before, after in itertools.pairwise(stamps[1:])]
                timing.cache_bytes = nbytes
        timing.others = others.share
        timings[path] = timing
    del made
    gc.collect()
    return {path: timings[path] for path in paths}


def prepare(model: Any) -> dict[str, str]:
    """Prepare a model for inference with regroup: its attention, and fast linear layers on a CPU.

    Returns:
        The attention and linear layers that are used now: some families and dtypes keep theirs.
    """
    from ..attention.cpu.linear_layers import fast_layer
    from ..attention.interface import NAME, register
    from ..attention.prepare import prepare_for_inference

    register()
    with quiet():
        model.set_attn_implementation(NAME)
    linear = "as they are"
    layer, _ = fast_layer(model.dtype)
    if model.device.type == "cpu" and layer is not None:
        prepare_for_inference(model)
        linear = layer.__name__
    return {"attention": str(model.config._attn_implementation), "linear_layers": linear}


def _generate(made: Any, model: Model, work: Work, path: str) -> tuple[list[float], int | None]:
    """Times of the start and of each token, and the bytes of the cache if it is regroup's."""
    from transformers import GenerationConfig, GenerationMixin
    from transformers.generation.streamers import BaseStreamer
    from transformers.modeling_outputs import BaseModelOutput

    stamps: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    device = torch.device(work.device)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "attention_mask": torch.ones(work.batch, work.prompt, dtype=torch.long, device=device),
        "streamer": Clock(),
    }
    if model.is_encoder_decoder:
        hidden = torch.empty(work.batch, work.prompt, model.hidden).normal_(generator=generator)
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden.to(device, made.dtype))
        inputs["decoder_input_ids"] = torch.zeros(work.batch, 1, dtype=torch.long, device=device)
    else:
        ids = torch.randint(0, model.vocabulary, (work.batch, work.prompt), generator=generator)
        inputs["input_ids"] = ids.to(device)
    # Without end-of-sequence token, so that all tokens are generated.
    made.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0 if model.is_encoder_decoder else None,
    )
    cache = None
    if path == "regroup":
        from ..attention.cache import KVCache

        own = work.new if model.is_encoder_decoder else work.prompt + work.new - 1
        cache = KVCache.for_model(made, max_length=own)
        inputs["past_key_values"] = cache
    # Some speech families override generate.
    generate: Any = GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]
    generate(made, **inputs, max_new_tokens=work.new)
    assert len(stamps) == work.new + 1
    return stamps, None if cache is None else cache.nbytes


def result(model: Model, work: Work, ceiling: Ceiling, timings: dict[str, Timing]) -> dict[str, Any]:
    """The figures of one model, as plain data; units are in the names."""
    found: dict[str, Any] = {
        "kv_heads": model.kv_heads,
        "layers": model.layers,
        "layers_of_the_model": model.full_layers,
        "weights": "random" if model.folder is None else "the checkpoint's",
        "parameters": model.parameters,
        "weights_read_bytes": ceiling.weights.nbytes,
        "kv_read_bytes": ceiling.attention.nbytes,
        "flops": ceiling.weights.flops + ceiling.attention.flops,
        "bandwidth_bytes_per_second": ceiling.bandwidth,
        "floor_ms": 1e3 * ceiling.seconds,
        "predicted_cache_bytes": cache_bytes(model, work),
    }
    for path, timing in timings.items():
        token = {name: 1e3 * value for name, value in quantiles(timing.tokens).items()}
        found[path] = {
            "first_token_ms": 1e3 * quantiles(timing.first)["p50"],
            "token_ms": token,
            "tokens_per_second": 1e3 * work.batch / token["p50"],
            "cache_bytes": timing.cache_bytes,
            "fraction_of_the_ceiling": found["floor_ms"] / token["p50"],
            **timing.prepared,
            "other_processes_share_of_cpu": timing.others,
        }
    return found


def compare(results: list[dict[str, Any]], heads: int, paths: Sequence[str]) -> None:
    """Add to each result its speedup over multi-head attention, if that was measured, and the largest possible one."""
    multi_head = next((found for found in results if found["kv_heads"] == heads), None)
    for found in results:
        if "transformers" in found and "regroup" in found:
            ratio = found["transformers"]["token_ms"]["p50"] / found["regroup"]["token_ms"]["p50"]
            found["regroup"]["speedup_over_transformers"] = ratio
        if multi_head is None:
            continue
        found["floor_speedup_over_mha"] = multi_head["floor_ms"] / found["floor_ms"]
        for path in paths:
            speedup = multi_head[path]["token_ms"]["p50"] / found[path]["token_ms"]["p50"]
            found[path]["speedup_over_mha"] = speedup


def benchmark(
    source: str,
    models: Sequence[Model],
    work: Work,
    *,
    paths: Sequence[str] = ("regroup",),
    roofs: Roofs | None = None,
    each: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models one after the other, and return a record.

    Args:
        source: the model as the user named it; only a folder's name is recorded, not its path.
        models: see :func:`models_for`.
        each: called with each result.

    Returns:
        A record (see ``regroup.record``).
    """
    from ..record import record

    roofs = roofs or Roofs(work)
    results = []
    for model in models:
        before = roofs.ceiling(model, again=True)
        timings = measure(model, work, paths)
        results.append(result(model, work, before.between(roofs.ceiling(model, again=True)), timings))
        each(results[-1])
    compare(results, max(layer.num_attention_heads for layer in models[0].attention), paths)
    configuration = {
        "model": Path(source).name if Path(source).exists() else source,
        "config": models[0].config,
        "batch": work.batch,
        "prompt": work.prompt,
        "new": work.new,
        "dtype": work.dtype,
        "device": work.device,
        "repeats": work.repeats,
        "layers": decoder_layers(models[0].config),
        "encoder": "not run: its output is random" if models[0].is_encoder_decoder else None,
    }
    return record("benchmark/decode", configuration, {"machine": roofs.to_json(), "models": results})
