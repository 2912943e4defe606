"""The header of a GGUF file, through the format's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import regular


def read_gguf(path: Path) -> dict[str, Any]:
    """Key-value metadata of a GGUF file, without its token lists, and ``"parameters"``: the number of weights.

    Raises:
        RegroupError: missing, or not a GGUF file that the library can read.
    """
    from gguf import GGUFReader

    try:
        regular(path)
        reader = GGUFReader(str(path))
    # The library reports damage by whatever its parsing runs into.
    except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise RegroupError(
            "this GGUF file cannot be read", file=path, got=f"{type(error).__name__}: {str(error)[:160]}"
        ) from error
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    values["parameters"] = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return values
