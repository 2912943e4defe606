"""Layout and plan in, checkpoint out: ``stream`` is the one place where reader, plan and writer meet."""

from .stream import Conversion, Preview, Ready, convert, prepare, preview, write

__all__ = ["Conversion", "Preview", "Ready", "convert", "prepare", "preview", "write"]
