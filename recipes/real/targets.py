"""What is measured: original models, the sizes that their KV caches come down to, and every number of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils when",
)


@dataclass(frozen=True)
class Shape:
    """How small the KV cache becomes: a number of KV heads for all layers, or a budget that is divided among them."""

    name: str
    kv_heads: int | None = None
    kv_budget: str | None = None

    @property
    def title(self) -> str:
        if self.kv_heads is None:
            return f"{self.kv_budget} of the KV cache, KV heads by layer"
        return f"{self.kv_heads} KV head{'s' if self.kv_heads > 1 else ''}"


@dataclass(frozen=True)
class Target:
    """One original model and its measurements.

    Attributes:
        name: on the command line.
        title: in tables.
        shapes: what it is converted to.
        window, windows: tokens and number of the windows that are evaluated, of each held-out text.
        document_starts: those windows begin where documents do.
        training_window, training_batch: of every uptraining, ours and the paper's.
        calibration_tokens, calibration_window: of every calibration; of two kinds of text, half of each.
        tokens: budgets of uptraining.
        rates: among which the learning rate of the paper's recipe is chosen, and beyond (``uptraining_curve``).
        prompts, new_tokens: of the greedy samples.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    window: int = 256
    windows: int = 32
    document_starts: bool = False
    training_window: int = 512
    training_batch: int = 4
    calibration_tokens: int = 16_384
    calibration_window: int = 512
    tokens: tuple[int, ...] = (65_536, 262_144)
    rates: tuple[float, ...] = (1e-4, 3e-4)
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 40

    def quick(self) -> Target:
        """The same in next to no time, to see that everything runs; its figures mean nothing."""
        window = min(64, self.window)
        return replace(
            self,
            shapes=self.shapes[:1],
            window=window,
            windows=4,
            training_window=window,
            calibration_tokens=512,
            calibration_window=window,
            tokens=(512, 1024),
            rates=self.rates[:1],
            prompts=self.prompts[:1],
            new_tokens=8,
        )


def _heads(*counts: int) -> tuple[Shape, ...]:
    return tuple(Shape(f"kv-{count}", count) for count in counts)


_STORY = ("Once upon a time, there was a little girl who", "One day, Tom found a", "The cat and the dog")
TARGETS = {
    target.name: target
    for target in (
        Target(
            "smollm2", "SmolLM2-135M-Instruct, 3 KV heads", (*_heads(1), Shape("half", kv_budget="50%")), windows=32
        ),
        Target("mha", "SmolLM2-135M-Instruct with 9 KV heads, shuffled by layer", _heads(3, 1)),
        Target(
            "stories",
            "stories260k, 4 KV heads",
            _heads(2, 1),
            windows=64,
            document_starts=True,
            training_window=256,
            calibration_tokens=32_768,
            calibration_window=256,
            rates=(1e-3, 3e-3),
            prompts=_STORY,
        ),
        Target(
            "demo",
            "the model of `regroup demo`, 8 KV heads",
            _heads(4, 2, 1),
            windows=64,
            training_window=256,
            calibration_tokens=32_768,
            calibration_window=256,
            rates=(1e-3, 3e-3),
            prompts=("def main(", "import os\n\n", "class Error("),
        ),
    )
}
