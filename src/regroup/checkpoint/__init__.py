"""Safetensors in, safetensors out. Nothing here knows what a head is."""

from .gguf import GGUFFile, GGUFTensor, is_gguf, read_gguf, refuse_gguf
from .header import TensorEntry, read_header
from .reader import Checkpoint, open_checkpoint
from .source import fetch, fingerprint, headers_of, is_hub_id, remote_headers
from .stage import scratch_folder, staged_file, staged_folder
from .writer import ShardFile

__all__ = [
    "Checkpoint",
    "GGUFFile",
    "GGUFTensor",
    "ShardFile",
    "TensorEntry",
    "fetch",
    "fingerprint",
    "headers_of",
    "is_gguf",
    "is_hub_id",
    "open_checkpoint",
    "read_gguf",
    "read_header",
    "refuse_gguf",
    "remote_headers",
    "scratch_folder",
    "staged_file",
    "staged_folder",
]
