"""The decoder layers of a checkpoint, one at a time, run on calibration text as the model itself would run them.

The model is loaded by transformers, which maps safetensors files rather than reading them: a page is in memory while
it is used, and only one layer at a time is copied out, in float32, next to the hidden states of all batches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ..layout.types import AttentionLayer, Layout
from ..modeling import load
from ..modeling.lm_head import require_head
from .decoder_layer import DecoderLayer, StopError

Inputs = dict[str, torch.Tensor]


class LayerRunner:
    """Decoder layers of a checkpoint in order, and how the model calls each of them.

    Args:
        folder: of the checkpoint.
        layout: of the checkpoint.
        batches: model inputs; every batch of a decoder-only model holds full windows of one length.
        device: where layers run; hidden states stay on the CPU.

    Raises:
        RegroupError: transformers cannot load the model, or it has no output head.
    """

    def __init__(self, folder: Path, layout: Layout, batches: Sequence[Inputs], *, device: str = "cpu") -> None:
        self.layout, self.batches, self.device = layout, batches, torch.device(device)
        require_head(folder, words=False)
        self.model: Any = load(folder, dtype="auto", attn_implementation="eager", progress=False)
        self.model.eval().requires_grad_(False)
        path, _, _ = layout.layers[0].module.partition(".0.")
        self._path = path
        self.blocks: nn.ModuleList = self.model.base_model.get_submodule(path)
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.hidden: list[torch.Tensor] = []
        self.returned_items: int | None = None
        self._shell: Any = None
        self._capture()
        # Attention without its weights runs several times as fast in one operation, where that means the same.
        self.fused = False
        self.fused = self._fused_is_right()

    def __len__(self) -> int:
        return len(self.blocks)

    def path_of(self, layer: AttentionLayer) -> str:
        """Path of an attention module below its decoder layer."""
        return layer.module.removeprefix(f"{self._path}.{layer.index}.")

    def layer(self, index: int) -> DecoderLayer:
        """A float32 copy of one decoder layer on the device."""
        module = copy.deepcopy(self.blocks[index]).to(device=self.device, dtype=torch.float32)
        return DecoderLayer(self, index, module)

    def attention_layers(self, index: int) -> list[AttentionLayer]:
        """The layout's attention layers of one decoder layer: self-attention, then cross-attention."""
        return [layer for layer in self.layout.layers if layer.index == index]

    def masks(self, batch: int, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which query positions and which memory positions hold text, (B, T) and (B, S); None for all."""
        inputs = self.batches[batch]
        decoder = inputs.get("decoder_attention_mask")
        return decoder, inputs.get("attention_mask") if layer.kind == "cross" else decoder

    def arguments(self, batch: int, index: int, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the model would call a layer with, for these hidden states."""
        args, kwargs = self._calls[self._call_of(batch)][index]
        place = _to(hidden, self.device)
        rest = {name: _to(value, self.device) for name, value in kwargs.items()}
        if "hidden_states" in rest:
            return tuple(_to(value, self.device) for value in args), {**rest, "hidden_states": place}
        return (place, *(_to(value, self.device) for value in args[1:])), rest

    def logits(self, batch: int, hidden: torch.Tensor, row: int, positions: slice = slice(None)) -> torch.Tensor:
        """What the model makes of hidden states after its last layer.

        A part at a time: over a large vocabulary the logits of a batch are larger than all its hidden states.

        Args:
            batch: number of the batch.
            hidden: of the whole batch, (B, T, hidden).
            row: of the batch.
            positions: of the row; by default all of it.

        Returns:
            (positions, vocabulary) in float32.
        """
        if self._shell is None:
            # Everything but the layers, in float32; the layers' own weights are not copied.
            stand_in = _StandIn(self.blocks[0], self)
            encoder = getattr(self.model.base_model, "encoder", None)
            left_out: dict[int, Any] = {id(self.blocks): nn.ModuleList([stand_in])}
            if encoder is not None:
                left_out[id(encoder)] = nn.Identity()
            self._shell = copy.deepcopy(self.model, left_out).to(device=self.device, dtype=torch.float32)
        rows = slice(row, row + 1)
        self._shell.base_model.get_submodule(self._path)[0].hidden = _to(hidden[rows, positions], self.device)
        given = self.batches[batch]
        # What is after the last layer looks at each position alone.
        of_decoder = [name for name in given if name.startswith("decoder_") or "decoder_input_ids" not in given]
        inputs = {
            name: (value[rows, positions] if name in of_decoder else value[rows]).to(self.device)
            for name, value in given.items()
        }
        if self.model.config.is_encoder_decoder:
            # The decoder's layers are not run, so nothing looks at what the encoder gave.
            source = inputs.pop(self.model.main_input_name)
            empty = torch.zeros(*source.shape[:2], self.layout.hidden_size, device=self.device)
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=empty)  # pyright: ignore[reportArgumentType]
        return self._shell(**inputs, use_cache=False).logits[0]

    @torch.no_grad()
    def _fused_is_right(self) -> bool:
        """Whether PyTorch's fused attention gives what the model's own does: it knows no sinks and no capped scores."""
        config = self.model.config
        if getattr(config, "attn_logit_softcapping", None) is not None or not self.model._supports_sdpa:
            return False
        first, hidden = self.layer(0), self.hidden[0]
        own = first.forward(0, hidden, weights=True)
        self.fused = True
        return torch.allclose(first.forward(0, hidden), own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))

    def _call_of(self, batch: int) -> int:
        """Masks and positions of a decoder-only model depend on the shape of a batch alone."""
        if self.model.config.is_encoder_decoder:
            return batch
        shapes = [tuple(inputs["input_ids"].shape) for inputs in self.batches]
        return shapes.index(shapes[batch])

    @torch.no_grad()
    def _capture(self) -> None:
        """Record how each layer is called, and the first layer's hidden states for every batch."""
        for number, inputs in enumerate(self.batches):
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            needed = self._call_of(number) == number

            def record(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: list[Any] = calls,
                needed: bool = needed,
            ) -> None:
                if not calls:
                    first = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                    self.hidden.append(first.detach().float().cpu())
                calls.append((args, kwargs))
                # The rest of the model, its output embedding above all, has nothing to tell.
                if not needed or len(calls) == len(self.blocks):
                    raise StopError

            handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
            try:
                self.model(**inputs, use_cache=False)
            except StopError:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            if needed:
                self._calls[number] = [(_without_hidden(a), _without_hidden(k)) for a, k in calls]


class _StandIn(nn.Module):
    """Takes the place of a model's layers, and returns the hidden states that it was given."""

    def __init__(self, block: nn.Module, runner: LayerRunner) -> None:
        super().__init__()
        # Not submodules: neither is to be copied or moved with this one.
        self.__dict__["of"] = (block, runner)
        self.hidden = torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        return self

    def __getattr__(self, name: str) -> Any:
        # Models ask a layer for its kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["of"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        items = self.__dict__["of"][1].returned_items
        return self.hidden if items is None else (self.hidden, *(None,) * (items - 1))


def _without_hidden(value: Any) -> Any:
    """Drop the hidden states of a recorded call: they are the largest part of it, and are replaced anyway."""
    if isinstance(value, dict):
        return {name: None if name == "hidden_states" else item for name, item in value.items()}
    return (None, *value[1:]) if value else value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
