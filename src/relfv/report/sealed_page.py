"""The last line of a page: a hash of itself, and of what it was made from."""

from __future__ import annotations

import re
from pathlib import Path

from relfv.store.files import read_bytes, sha256_bytes

_SEAL = re.compile(rb"<!-- made from (\w{64}), sha256 of what is above: (\w{64}) -->\n")


def with_seal(page: str, made_from: str) -> bytes:
    """The bytes of ``page`` with its last line; ``made_from`` is a sha256."""
    above = page.encode() + b"\n"
    return above + f"<!-- made from {made_from}, sha256 of what is above: {sha256_bytes(above)} -->\n".encode()


def sealed_from(page: bytes) -> str | None:
    """Hash of the data that a page was made from; None if the page is not as it was written."""
    above, _, last = page.removesuffix(b"\n").rpartition(b"\n")
    found = _SEAL.fullmatch(last + b"\n")
    return found[1].decode() if found and found[2].decode() == sha256_bytes(above + b"\n") else None


def page_if_made_from(path: Path, origin: str) -> str | None:
    """The text of the page at ``path``, if it is as it was written and made from ``origin``."""
    try:
        page = read_bytes(path)
    except OSError:
        return None
    return page.decode() if sealed_from(page) == origin else None
