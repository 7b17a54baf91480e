"""Cache of values made from each q_id's files, valid while the files' sizes, times and inodes do not change.

To read and check the statuses of 10,000 q_ids takes many seconds, to ask the file system about them less than one.
What a disk changes by itself moves none of these: ``relfv verify`` reads every byte, always.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from relfv import ALGORITHM_VERSION, __version__
from relfv.errors import RelfvError
from relfv.store.files import read_bytes, sha256_bytes, write_atomic
from relfv.store.formats import is_as_sealed, with_seal

log = logging.getLogger(__name__)

FEWEST = 100
"""Least number of q_ids for which anything is kept on disk: fewer are read in no time."""
_VERSION = f"{__version__}, {ALGORITHM_VERSION}"
"""Version of the cached values: another version of relfv makes other ones."""


class Index:
    """Cached values of the q_ids of a relation's ``folder``. It only saves time: without its file, or where that is
    damaged or cannot be written, everything is read again."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open the cache ``name``, for values that JSON can hold."""
        self._path = folder / ".locks" / f".{name}.json"
        self._now: dict[str, Any] = {}

    @cached_property
    def _on_disk(self) -> dict[str, Any]:
        return self._read()

    def _read(self) -> dict[str, Any]:
        try:
            data = read_bytes(self._path)
            content = orjson.loads(data) if is_as_sealed(data) else {}
            return content["q_ids"] if content.get("version") == _VERSION else {}
        except (OSError, ValueError, KeyError, AttributeError):
            return {}

    def of(self, q_id: str, state: str, make: Callable[[], Any], lasts: Callable[[Any], bool] = lambda _: True) -> Any:
        """The cached value of a q_id for this ``state_of`` the files that it is made from; else what ``make`` gives,
        which is kept if ``lasts`` says that it stays right while the files do not change."""
        known = self.known(q_id, state)
        value = make() if known is None else known
        if lasts(value):
            self.keep(q_id, state, value)
        return value

    def known(self, q_id: str, state: str) -> Any:
        """The cached value of a q_id for this state; None if there is none."""
        found = self._now.get(q_id) or self._on_disk.get(q_id)
        return found[1] if found and found[0] == state else None

    def keep(self, q_id: str, state: str, value: Any) -> None:
        """Store a value. Take ``state`` before the files are read."""
        self._now[q_id] = [state, value]

    def write(self, *, add: bool = False) -> None:
        """Keep the values that this command asked for, for the next one; ``add`` keeps those of others beside them."""
        values = {**self._read(), **self._now} if add else dict(self._now)
        if len(values) < FEWEST or values == self._on_disk:
            return
        try:
            content = orjson.dumps({"version": _VERSION, "q_ids": values})
            write_atomic(self._path, with_seal(content.removesuffix(b"}") + b"\n}\n"))
            self._on_disk = values
        except RelfvError as problem:
            log.debug("%s", problem)


def state_of(files: Iterable[str], basis: str = "") -> str:
    """Hash of what the file system says about ``files``, and of ``basis``, anything else that a value rests on."""
    return sha256_bytes(repr((basis, *map(_state, files))).encode())


def _state(file: str) -> tuple[int, ...] | None:
    try:
        stat = os.stat(file)  # noqa: PTH116
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
