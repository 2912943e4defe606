"""Compare a checkpoint's tensors with its config: every slot fits its tensor, and every parameter is accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import RegroupError
from ..families import Family
from .types import AttentionLayer, TensorInfo

_FLOATS = ("BF16", "F16", "F32", "F64")
_OTHER_MODEL = "config.json and weights may belong to different models"


class Weights:
    """The tensors of one checkpoint.

    Args:
        tensors: name to dtype and shape.
        family: its facts.
        hidden: hidden size, as the config says.
        layers: how many there are, as the config says.

    Raises:
        RegroupError: there is no attention layer where the family has it.

    Attributes:
        prefix: what stands before the path of a module in the names of its tensors.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], family: Family, hidden: int, layers: int) -> None:
        self.tensors, self.family, self.hidden, self.layers = tensors, family, hidden, layers
        self.prefix = self._prefix()

    def _prefix(self) -> str:
        first = self.family.module.format(i=0) + "."
        for prefix in self.family.prefixes:
            if any(name.startswith(prefix + first) for name in self.tensors):
                return prefix
        raise RegroupError(
            "the weights hold no attention layer where this family has it",
            layer=self.family.prefixes[0] + first[:-1],
            got=f"tensors such as {next(iter(self.tensors), 'none at all')}",
            remedy=_OTHER_MODEL,
        )

    def kv_heads(self, layer: str, heads: int, head_dim: int, declared: int | None) -> int:
        """KV heads of a layer, from the shape of its key projection.

        Args:
            layer: its name.
            heads, head_dim: of its queries.
            declared: KV heads as the config says, or None where it does not.

        Raises:
            RegroupError: the shape fits no number of KV heads, or another than the config says.
        """
        family = self.family
        part = f"{layer}.{family.fused or family.key}.weight"
        shape = self._shape(part, layer)
        rows: float = shape[1 if family.conv1d else 0] if len(shape) == 2 else 0
        if family.fused is not None:
            rows = (rows - heads * head_dim) / 2
        found = rows / head_dim
        if found < 1 or found != int(found) or heads % int(found) or (declared or found) != found:
            expected = f"{declared if declared else f'a divisor of {heads}'} KV heads of {head_dim}"
            what = "the key projection does not have the shape that the config asks for"
            raise _misshapen(what, part, layer, expected, shape)
        return int(found)

    def check_shapes(self, layer: AttentionLayer) -> None:
        """Compare every slot with its tensor: along the head axis exactly, across it with the hidden size.

        Raises:
            RegroupError: a tensor is missing, quantised or of another shape.
        """
        for part, projection in layer.projections().items():
            for slot in projection.slots():
                is_weight, is_extra = slot is projection.weight, slot in projection.extras
                ranks = (1, 2) if is_extra else (1 if slot is projection.bias else 2,)
                length = slot.size if "{head}" in slot.tensor else slot.heads * slot.size
                if self.family.fused and part != "output" and not is_extra:
                    length = (layer.num_attention_heads + 2 * layer.num_key_value_heads) * layer.head_dim
                for tensor in slot.tensors():
                    shape = self._shape(tensor, layer.name)
                    fits = len(shape) in ranks and slot.axis < len(shape) and shape[slot.axis] == length
                    if is_weight:
                        fits = fits and shape[: slot.axis] + shape[slot.axis + 1 :] == (self.hidden,)
                    if not fits:
                        wanted = [self.hidden] if is_weight else []
                        wanted.insert(slot.axis, length)
                        what = f"a {part} tensor does not have the shape that the config asks for"
                        raise _misshapen(what, tensor, layer.name, f"shape {wanted}", shape)

    def check_nothing_else(self, layers: Iterable[AttentionLayer]) -> None:
        """Refuse parameters below an attention module that the family's facts do not account for.

        Raises:
            RegroupError: there is one, or there are more layers than the config says.
        """
        layers = tuple(layers)
        known = {t for layer in layers for p in layer.projections().values() for s in p.slots() for t in s.tensors()}
        names = {layer.name for layer in layers}
        patterns = [
            re.compile("(" + re.escape(self.prefix + path).replace(r"\{i\}", r"(\d+)") + r")\.(.+)")
            for path in (self.family.module, self.family.cross)
            if path is not None
        ]
        for tensor, info in self.tensors.items():
            for pattern in patterns:
                if (match := pattern.fullmatch(tensor)) is None or tensor in known:
                    continue
                name, number, rest = match.groups()
                if name not in names:
                    raise RegroupError(
                        "the weights hold more layers than the config says",
                        tensor=tensor,
                        expected=f"{self.layers} layers",
                        got=f"layer {number}",
                    )
                if rest not in (*self.family.ignored, *self.family.shared_norms, f"{self.family.output}.bias"):
                    raise RegroupError(
                        "an attention layer holds a parameter that this family does not have",
                        tensor=tensor,
                        layer=name,
                        got=f"shape {list(info.shape)}, {info.dtype}",
                        remedy="if it is an adapter, merge it first; if the weights are quantised, start from the "
                        "original ones",
                    )

    def _shape(self, tensor: str, layer: str) -> tuple[int, ...]:
        if tensor not in self.tensors:
            raise RegroupError(
                "a tensor of an attention layer is missing",
                tensor=tensor,
                layer=layer,
                expected=f"{self.layers} layers, as config.json says",
                remedy=f"{_OTHER_MODEL}, or a shard is missing from the index",
            )
        info = self.tensors[tensor]
        if info.dtype not in _FLOATS:
            raise RegroupError(
                "an attention weight is quantised",
                tensor=tensor,
                layer=layer,
                expected=", ".join(_FLOATS),
                got=info.dtype,
                remedy="start from the unquantised checkpoint",
            )
        return info.shape


def _misshapen(what: str, tensor: str, layer: str, expected: str, shape: tuple[int, ...]) -> RegroupError:
    return RegroupError(
        what,
        tensor=tensor,
        layer=layer,
        expected=expected,
        got=f"shape {list(shape)}",
        remedy=_OTHER_MODEL,
    )
