"""The config class that a checkpoint in the Nemotron-NAS layout carries, so that ``AutoConfig`` reads its blocks.

Serving engines reach into them by attribute (``config.block_configs[i].attention.n_heads_in_group``). This file is
copied next to the weights and imports nothing of regroup.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A JSON object whose keys are attributes too; what is absent is absent (``hasattr``), not None."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNASConfig(LlamaConfig):
    """Llama's config with ``block_configs``: for each layer ``attention`` and ``ffn``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in block_configs or ()
        ]
