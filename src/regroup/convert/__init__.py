"""Layout and plan in, checkpoint out: ``stream`` is the one place where reader, plan and writer meet."""

from .forecast import Forecast, foretell
from .stream import Conversion, Preview, Ready, convert, prepare, preview, write

__all__ = ["Conversion", "Forecast", "Preview", "Ready", "convert", "foretell", "prepare", "preview", "write"]
