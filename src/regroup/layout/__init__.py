"""Where the heads are: facts read from config.json and tensor shapes, nothing decided and nothing changed."""

from .detect import detect
from .types import AttentionLayer, HeadSlot, Layout, Projection, Rotary

__all__ = ["AttentionLayer", "HeadSlot", "Layout", "Projection", "Rotary", "detect"]
