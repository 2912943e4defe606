"""What a worker says and hears: one JSON line for each thing that is asked of it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Protocol


class Engine(Protocol):
    """A model in memory that decodes."""

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """Fill the cache with ``prompt`` tokens for each of ``batch`` sequences; ``steps`` more will be asked for."""
        ...

    def steps(self, count: int) -> list[float]:
        """Seconds of each of ``count`` steps after the prompt, greedy choice of the token included."""
        ...

    def facts(self) -> dict[str, Any]:
        """Versions and settings that matter."""
        ...


def serve(engine: Engine) -> None:
    """Do what standard input asks for, until it ends. Whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(engine.facts())
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            engine.prepare(request["batch"], request["prompt"], request["steps"])
            answer("prepared")
        else:
            answer(engine.steps(request["count"]))
