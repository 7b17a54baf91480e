"""Cache of findings about a model, made when it was opened and kept in the user's cache folder for the next time.

It only saves time: a file that is missing, damaged or cannot be written is as none. Each finding is a file of its own,
so that processes need not wait for one another.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relfv.errors import RelfvError
from relfv.store.files import sha256_bytes, write_atomic
from relfv.store.formats import read_json, sealed_bytes, unsealed

log = logging.getLogger(__name__)

VARIABLE = "RELFV_CACHE"
"""Environment variable that names another cache folder."""


class Findings:
    """Cached findings, each stored under its basis: everything that it rests on."""

    def __init__(self, *, afresh: bool = False) -> None:
        """Open the cache; ``afresh`` ignores findings from earlier."""
        self._afresh = afresh

    def get(self, basis: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finding on exactly this basis, or None."""
        if self._afresh:
            return None
        try:
            path = _path(basis)
            content = unsealed(read_json(path), path) if path.is_file() else {}
        except (RelfvError, OSError, RuntimeError, TypeError, AttributeError) as problem:
            log.debug("%s", problem)
            return None
        return content.get("finding") if content.get("basis") == json.loads(_text(basis)) else None

    def keep(self, basis: Mapping[str, Any], finding: Mapping[str, Any]) -> None:
        """Store a finding under its basis, if the cache folder can be written."""
        content = {"basis": dict(basis), "finding": dict(finding)}
        try:
            write_atomic(_path(basis), sealed_bytes(json.loads(_text(content))))
        except (RelfvError, OSError, RuntimeError) as problem:
            log.debug("%s", problem)


def cache_folder() -> Path:
    """The user's cache folder for relfv: $RELFV_CACHE, else $XDG_CACHE_HOME/relfv, else ~/.cache/relfv. Raises
    RuntimeError where the user has no home."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relfv"


def _path(basis: Mapping[str, Any]) -> Path:
    return cache_folder() / "self_checks" / f"{sha256_bytes(_text(basis).encode())[:32]}.json"


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)
