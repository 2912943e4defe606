"""One page made from records: what was converted, what it cost, what it gained."""

from ..extras import require

require("report", "altair", "jinja2", "vl_convert")
