"""Write files of any size, piece after piece, that appear whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from relfv.store.files import explained, replacing


class InPieces:
    """A file that is being written, piece after piece."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._digest, self._waiting = file, path, hashlib.sha256(), bytearray()

    def write(self, data: bytes) -> None:
        """Append the next piece."""
        self._digest.update(data)
        self._waiting += data
        if len(self._waiting) >= 1 << 20:
            self.flush()

    def flush(self) -> None:
        """Write the pieces that are waiting: small ones are collected first."""
        with explained(self._path):
            self._file.write(bytes(self._waiting))
        self._waiting.clear()

    @property
    def sha256(self) -> str:
        """sha256 of all that was written, as hexadecimal digits."""
        return self._digest.hexdigest()


@contextmanager
def write_in_pieces(paths: Sequence[Path]) -> Iterator[list[InPieces]]:
    """``write_together`` for one file or more that need not fit into memory: they take the names ``paths``, in order,
    when this ends without an exception."""
    with replacing(paths) as files:
        pieces = [InPieces(file, path) for file, path in zip(files, paths, strict=True)]
        yield pieces
        for one in pieces:
            one.flush()
