"""Which weights were these? An identity for fingerprints, without reading 16 GB.

Small files (config, tokenizer, a demo model) are hashed whole. Of a large weight file its size, its first and last
block and blocks spread evenly over it are hashed: another checkpoint, a fine-tune or a truncated copy differs in
them, and it takes milliseconds; an edit of a few megabytes within a large shard may be missed. The path does not count, so a model may be moved.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_BELOW = 16 << 20
_BLOCK = 64 << 10
_N_BLOCKS = 64
_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".tiktoken", ".jinja")


def folder_identity(folder: Path) -> str:
    """sha256 over the names and sampled contents of the files that make up a model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _SUFFIXES:
            digest.update(path.name.encode() + b"\0" + _sampled(path) + b"\0")
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= _WHOLE_BELOW:
        return hashlib.sha256(path.read_bytes()).digest()
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_N_BLOCKS):
            file.seek((size - _BLOCK) * i // (_N_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()
