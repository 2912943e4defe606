"""Layout and plan in, checkpoint out: ``stream`` is the one place where reader, plan and writer meet."""

from .stream import Conversion, Preview, convert, preview

__all__ = ["Conversion", "Preview", "convert", "preview"]
