"""Every number of the experiments: shapes, budgets and seeds, at two sizes."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = 0.05  # the paper's
TASKS = ("pronunciation", "restoration")


@dataclass(frozen=True)
class Shape:
    """Of a model; an encoder-decoder has ``layers`` on each side."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Scale:
    """One size of the whole.

    Attributes:
        small, large: the parents: the paper's T5-Large and T5-XXL.
        groups: KV heads of "GQA".
        window: tokens of a sequence in pre-training, of an encoder-decoder's input.
        batch: sequences per step in pre-training.
        encoder_decoder_tokens, decoder_tokens: of a parent's pre-training, as `regroup uptrain` counts them.
        alphas: shares of those tokens in uptraining, for Figure 5.
        rates: of AdamW: pre-training of decoders, and distillation.
        tuning_batch, tuning_steps: of fine-tuning, of either task.
        tuning_rate: of AdamW with a cosine and no dropout. What the paper does (Adafactor, a constant rate, dropout
            0.1, batches of 128) leaves models this small far from what they can learn in a minute.
        calibration_tokens: of converting our way.
        held_out: windows, and words or lines a task, that are evaluated.
        seeds: of uptraining and fine-tuning together.
        tuning_seeds: the same for the comparison of fine-tuned models, which differ more from seed to seed.
        decode_batch, decode_prompt, decode_new: what is timed.
        micro_batch: sequences at once, where memory needs it.
        dtype: of the computation.
    """

    small: Shape
    large: Shape
    groups: int
    window: int
    batch: int
    encoder_decoder_tokens: int
    decoder_tokens: int
    alphas: tuple[float, ...]
    pretraining_rate: float
    distillation_rate: float
    tuning_batch: int
    tuning_steps: int
    tuning_rate: float
    calibration_tokens: int
    held_out: int
    seeds: int
    tuning_seeds: int
    decode_batch: int
    decode_prompt: int
    decode_new: int
    dtype: str = "float32"


SCALES = {
    "cpu": Scale(
        small=Shape(hidden=32, feed_forward=80, layers=2, heads=4, head_dim=8),
        large=Shape(hidden=64, feed_forward=160, layers=3, heads=8, head_dim=8),
        groups=2,
        window=128,
        batch=32,
        encoder_decoder_tokens=3_000_000,
        decoder_tokens=3_000_000,
        alphas=(0.0, 0.01, 0.02, 0.05, 0.1),
        pretraining_rate=3e-3,
        distillation_rate=2e-3,
        tuning_batch=32,
        tuning_steps=900,
        tuning_rate=3e-3,
        calibration_tokens=16_384,
        held_out=500,
        seeds=3,
        tuning_seeds=8,
        decode_batch=32,
        decode_prompt=1024,
        decode_new=32,
    ),
    "gpu": Scale(
        small=Shape(hidden=256, feed_forward=640, layers=4, heads=8, head_dim=32),
        large=Shape(hidden=512, feed_forward=1280, layers=8, heads=16, head_dim=32),
        groups=2,
        window=512,
        batch=128,
        encoder_decoder_tokens=35_000_000,
        decoder_tokens=35_000_000,
        alphas=(0.0, 0.01, 0.02, 0.05, 0.1),
        pretraining_rate=1e-3,
        distillation_rate=1e-3,
        tuning_batch=64,
        tuning_steps=2000,
        tuning_rate=1e-3,
        calibration_tokens=65_536,
        held_out=1000,
        seeds=3,
        tuning_seeds=8,
        decode_batch=64,
        decode_prompt=2048,
        decode_new=64,
        dtype="bfloat16",
    ),
    # Minutes: to see that everything runs. Its figures mean nothing.
    "smoke": Scale(
        small=Shape(hidden=16, feed_forward=32, layers=1, heads=4, head_dim=4),
        large=Shape(hidden=32, feed_forward=32, layers=2, heads=8, head_dim=4),
        groups=2,
        window=64,
        batch=8,
        encoder_decoder_tokens=102_400,
        decoder_tokens=102_400,
        alphas=(0.0, 0.05),
        pretraining_rate=3e-3,
        distillation_rate=2e-3,
        tuning_batch=8,
        tuning_steps=4,
        tuning_rate=3e-3,
        calibration_tokens=1_024,
        held_out=16,
        seeds=2,
        tuning_seeds=3,
        decode_batch=2,
        decode_prompt=32,
        decode_new=4,
    ),
}
