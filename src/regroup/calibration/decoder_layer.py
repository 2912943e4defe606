"""A decoder layer of the original or the converted model, and what its attention modules compute when it runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import RegroupError
from ..layout.types import AttentionLayer


class StopError(Exception):
    """Ends a forward pass once all that is needed has been traced."""


@dataclass
class AttentionTrace:
    """What one attention module was given and computed on one batch.

    Attributes:
        query_input, memory: (B, T, hidden) that queries are made of, and (B, S, hidden) that keys and values are.
        mixed: what the output projection was given, (B, T, H·D).
        output: what it gave, (B, T, hidden).
        weights: attention weights (B, H, T, S), or None where the pass ended before they were returned.
        derived: what has been computed from these, to be used again.
    """

    query_input: torch.Tensor
    memory: torch.Tensor
    mixed: torch.Tensor
    output: torch.Tensor
    weights: torch.Tensor | None = None
    derived: dict[str, Any] = field(default_factory=dict)


class Caller(Protocol):
    """How the model calls its decoder layers (``layer_runner.LayerRunner``).

    Attributes:
        device: where layers run.
        fused: whether PyTorch's fused attention gives what the model's own does.
        returned_items: length of the tuple that a layer returns; None where it returns hidden states alone.
    """

    device: torch.device
    fused: bool
    returned_items: int | None

    def path_of(self, layer: AttentionLayer) -> str:
        """Path of an attention module below its decoder layer."""
        ...

    def masks(self, batch: int, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which query positions and which memory positions hold text, (B, T) and (B, S); None for all."""
        ...

    def arguments(self, batch: int, index: int, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the model would call a layer with, for these hidden states."""
        ...


class DecoderLayer:
    """A decoder layer of the original model, or a copy of one with other attention, with weights in float32."""

    def __init__(self, caller: Caller, index: int, module: nn.Module) -> None:
        self.caller, self.index, self.module = caller, index, module

    def copy(self) -> DecoderLayer:
        """The layer with weights of its own."""
        return DecoderLayer(self.caller, self.index, copy.deepcopy(self.module))

    def attention(self, layer: AttentionLayer) -> nn.Module:
        """The attention module that a layout's layer describes."""
        return self.module.get_submodule(self.caller.path_of(layer))

    def forward(self, batch: int, hidden: torch.Tensor, *, weights: bool = False) -> torch.Tensor:
        """Hidden states after the layer, (B, T, hidden); ``weights`` has attention weights computed on the way."""
        self._attend_by("eager" if weights or not self.caller.fused else "sdpa")
        args, kwargs = self.caller.arguments(batch, self.index, hidden)
        result = self.module(*args, **kwargs)
        self.caller.returned_items = len(result) if isinstance(result, tuple) else None
        return result[0] if isinstance(result, tuple) else result

    def observe(
        self, batch: int, hidden: torch.Tensor, layers: Sequence[AttentionLayer], *, whole: bool
    ) -> tuple[dict[str, AttentionTrace], torch.Tensor | None]:
        """Run the layer and trace its attention modules.

        Args:
            batch: number of the batch, for its masks and positions.
            hidden: (B, T, hidden).
            layers: which attention to trace, in the order of the layer's forward pass.
            whole: run to the end and keep attention weights; else stop at the last one's output projection.

        Returns:
            The traces by the name of the attention layer, and the hidden states after the layer if ``whole``.
        """
        traces: dict[str, AttentionTrace] = {}
        handles = []
        try:
            for number, layer in enumerate(layers):
                last = number == len(layers) - 1 and not whole
                handles += self._trace(layer, traces, stop=last, weights=whole)
            try:
                return traces, self.forward(batch, hidden, weights=whole)
            except StopError:
                return traces, None
        finally:
            for handle in handles:
                handle.remove()

    def _attend_by(self, implementation: str) -> None:
        for module in self.module.modules():
            config = getattr(module, "config", None)
            if config is not None and config._attn_implementation != implementation:
                config._attn_implementation = implementation

    def _trace(
        self, layer: AttentionLayer, traces: dict[str, AttentionTrace], *, stop: bool, weights: bool
    ) -> list[Any]:
        attention = self.attention(layer)
        output_name = layer.output.weight.tensor.removeprefix(layer.name + ".").removesuffix(".weight")
        inputs: dict[str, torch.Tensor] = {}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            memory = next(
                (
                    kwargs[name]
                    for name in ("key_value_states", "encoder_hidden_states")
                    if kwargs.get(name) is not None
                ),
                query,
            )
            inputs.update(query=query, memory=memory)

        def projected(_: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
            traces[layer.name] = AttentionTrace(inputs["query"], inputs["memory"], args[0], result)
            if stop:
                raise StopError

        def after(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
            found = result[-1] if isinstance(result, tuple) else None
            if not isinstance(found, torch.Tensor) or found.ndim != 4:
                raise RegroupError(
                    "this attention class does not return its weights, which calibration needs", layer=layer.name
                )
            traces[layer.name].weights = found

        handles: list[Any] = [attention.register_forward_pre_hook(before, with_kwargs=True)]
        handles.append(attention.get_submodule(output_name).register_forward_hook(projected))
        if weights:
            handles.append(attention.register_forward_hook(after))
        return handles
