"""Layout and plan in, checkpoint out: ``stream`` is the one place where reader, plan and writer meet."""

from .estimate import Forecast, foretell
from .write import Conversion, Preview, Ready, convert, prepare, preview, write

__all__ = ["Conversion", "Forecast", "Preview", "Ready", "convert", "foretell", "prepare", "preview", "write"]
