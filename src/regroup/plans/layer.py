"""What is asked of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPlan:
    """What is asked of one attention layer.

    Attributes:
        name: the attention module, as the layout names it.
        num_attention_heads: H, unchanged; here so that a person can read the plan alone.
        original_num_key_value_heads, num_key_value_heads: KV heads before and after.
        key_method, value_method: the methods that merge the keys and the values of a group (``merge.registry``), or
            ``"auto"`` where calibration is to choose them.
        query_order: the original query heads in their new order; None leaves them as they are.
        predicted_kl: KL divergence from the original model that converting this layer alone is expected to cost, in
            nats per token of held-out text; None where it was not measured.
    """

    name: str
    num_attention_heads: int
    original_num_key_value_heads: int
    num_key_value_heads: int
    key_method: str = "mean"
    value_method: str = "mean"
    query_order: tuple[int, ...] | None = None
    predicted_kl: float | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """The order of query heads, spelled out."""
        return tuple(range(self.num_attention_heads)) if self.query_order is None else self.query_order

    @property
    def methods(self) -> tuple[str, str]:
        """Rules for keys and values, for people to read: none where the layer is copied."""
        return (self.key_method, self.value_method) if self.changes else ("–", "–")

    @property
    def changes(self) -> bool:
        """False if the layer is copied bit for bit."""
        return self.num_key_value_heads != self.original_num_key_value_heads or self.order != tuple(
            range(self.num_attention_heads)
        )
