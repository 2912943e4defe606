"""The backends, one file each. Importing this package registers them, in this order; the priorities are theirs."""

from . import reference, sdpa, packed, dense, flex, triton, cpu  # noqa: F401, I001
