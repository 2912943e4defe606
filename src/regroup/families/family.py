"""The facts that every family states. None has a default: a family that leaves one out fails when it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Packing = Literal["separate", "stacked", "interleaved"]
Positions = Literal["rotary", "absolute", "relative", "alibi"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family names things in config.json and in its tensors, and what its transformers class computes.

    Attributes:
        model_type: as in config.json.
        stock_type: the ``model_type`` of the transformers class that runs these weights; usually the same.
        module: path of the self-attention module below the base model; ``{i}`` is the decoder layer.
        cross: path of the cross-attention module; None makes this a decoder-only family.
        prefixes: what may stand before ``module`` in tensor names, the usual one first.
        query, key, value, output: submodule names; ``fused``, where it is not None, replaces the first three.
        packing: ``"separate"`` without ``fused``; otherwise how the fused projection is laid out.
        conv1d: GPT-2's Conv1D, which stores (in, out) instead of (out, in).
        heads, layers, hidden, kv_heads, head_dim: config keys, tried in order.
        kv_heads_unread: keys for KV heads that the class stores but does not read; the writer keeps them correct.
        kv_heads_by_layer: key with a list of KV heads per layer, or None.
        kv_default: what transformers assumes where the config names no KV heads: ``"heads"`` (as many as query heads),
            or None for a number of its own, which is not guessed here.
        head_dim_default: what it assumes where the config names no head_dim; None for hidden_size / heads.
        encoder_layers: config key with the number of encoder layers, or None.
        native: KV heads that the stock class can hold: ``"any"``, ``"mqa"`` (1 or H), ``"none"`` (H only).
        per_layer_obstacle: why the layers cannot differ in KV heads even with regroup's class, or None.
        positions: how the decoder knows positions; ``"absolute"`` is a table or sinusoids.
        pairs: which dimensions RoPE rotates together; None without RoPE.
        rotary_share: rotated share of a head where the config does not say.
        query_norm, key_norm: norm parameters per head after the projection: (name, indices per head), where ``{head}``
            in the name stands for the head's number and -1 for head_dim.
        shared_norms: parameters of norms after the projections that all heads share.
        keys_normed: whether the keys pass a norm, with parameters or without: always, never, or a config key that says
            so. Linear methods cannot pass through one.
        clip: config key whose value clips queries, keys and values after their projections, or None.
        position_bias: name of a table with a column per head below the attention module, or None.
        shared_order: whether all decoder self-attention layers must keep one order of heads.
        ignored: other parameters and buffers of the attention module that have no place per KV head.
        residual_normed: whether a norm stands between the output projection and the residual stream.
        residual_multiplier: config key with the factor of that addition, or None.
        slow_output: whether ``slow_but_exact`` sums output projections part by part, which leaves out their biases.
        window: which layers ``sliding_window`` applies to where the config has no ``layer_types``: ``"all"``,
            ``"even"``, with ``use_sliding_window`` those from ``max_window_layers`` on (``"upper"``) or the even ones
            below it (``"lower even"``), or ``"none"``.
        ties: whether the output head is the input embedding where the config does not say (``tie_word_embeddings``).
        always_ties: whether it is whatever the config says; a head that is stored and differs still counts.
        tied: parameters that are another one where the config ties, by full name: the output head first.
        initializer_std: standard deviation of fresh projections where the config names none; None for T5's rule,
            ``initializer_factor / sqrt(hidden)``.
        t5_pretraining: pre-trained by span corruption, with Adafactor and the inverse square root of the step.
        speech: whether its encoder takes audio.
        gguf: architecture of llama.cpp under which regroup writes it, or None. ``"llama"`` says that its layers are
            Llama's, tensor for tensor, so that Llama's code in other programs runs them.
        vllm: the output head in vLLM: ``"stored"``, ``"embedding"`` (a stored head is skipped), ``"none"`` (no vLLM).
        aliases: pairs of config keys that mean the same, in this class or an older one, and so may not differ.
        old_keys: keys of older code that the class does not read, and what they are called now.
        unsupported: config keys that, where true, describe a model that these facts do not, and how.
        switches: config keys that, where true, change facts, and which.
    """

    model_type: str
    stock_type: str
    module: str
    cross: str | None
    prefixes: tuple[str, ...]
    query: str
    key: str
    value: str
    output: str
    fused: str | None
    packing: Packing
    conv1d: bool
    heads: tuple[str, ...]
    layers: tuple[str, ...]
    hidden: tuple[str, ...]
    kv_heads: tuple[str, ...]
    kv_heads_unread: tuple[str, ...]
    kv_heads_by_layer: str | None
    kv_default: Literal["heads"] | None
    head_dim: tuple[str, ...]
    head_dim_default: int | None
    encoder_layers: str | None
    native: Literal["any", "mqa", "none"]
    per_layer_obstacle: str | None
    positions: Positions
    pairs: Literal["half", "interleaved"] | None
    rotary_share: float
    query_norm: tuple[tuple[str, int], ...]
    key_norm: tuple[tuple[str, int], ...]
    shared_norms: tuple[str, ...]
    keys_normed: Literal["always", "never"] | str
    clip: str | None
    position_bias: str | None
    shared_order: bool
    ignored: tuple[str, ...]
    residual_normed: bool
    residual_multiplier: str | None
    slow_output: bool
    window: Literal["none", "all", "even", "upper", "lower even"]
    ties: bool
    always_ties: bool
    tied: tuple[tuple[str, str], ...]
    initializer_std: float | None
    t5_pretraining: bool
    speech: bool
    gguf: str | None
    vllm: Literal["stored", "embedding", "none"]
    aliases: tuple[tuple[str, str], ...]
    old_keys: Mapping[str, str]
    unsupported: Mapping[str, str]
    switches: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        """Refuse facts that contradict each other, as the family is imported.

        Raises:
            ValueError: naming the family and the facts.
        """
        norms = [name for name in self.ignored if "norm" in name]
        wrong = {
            f"ignored names norms ({', '.join(norms)}): they belong in shared_norms": bool(norms),
            "shared_norms or key_norm are named, and keys_normed is never": bool(self.shared_norms or self.key_norm)
            and self.keys_normed == "never",
            "positions are rotary without pairs, or pairs are named without": (self.positions == "rotary")
            != (self.pairs is not None),
            "fused and packing disagree": (self.fused is None) != (self.packing == "separate"),
            "encoder_layers without cross, or cross without": (self.encoder_layers is None) != (self.cross is None),
            "residual_multiplier has no meaning after a norm": self.residual_normed
            and self.residual_multiplier is not None,
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"the facts of {self.model_type} contradict each other: {what}")

    @property
    def is_encoder_decoder(self) -> bool:
        return self.cross is not None

    def switched(self, config: Mapping[str, Any]) -> Family:
        """The facts for one config: with what its switches change."""
        family = self
        for key, changes in self.switches.items():
            if config.get(key):
                family = replace(family, **changes)
        return family
