"""What was made of each q_id's files, kept for as long as they are as they were: by their sizes, times and inodes.

To read and check the statuses of 10,000 q_ids takes many seconds, to ask the file system about them less than one.
What a disk changes by itself moves none of these: ``relfv verify`` reads every byte, always.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from relfv import ALGORITHM_VERSION, __version__
from relfv.errors import RelfvError
from relfv.store.files import write_atomic
from relfv.store.formats import read_json

log = logging.getLogger(__name__)

FEWEST = 100
"""q_ids. Fewer are read in no time, so there nothing is kept."""
_VERSION = f"{__version__}, {ALGORITHM_VERSION}"
"""Of what is kept: others say other things of a q_id."""


class Index:
    """Of a relation's ``folder``. It only saves time: without its file, or where that cannot be written, everything is
    read again."""

    def __init__(self, folder: Path, name: str) -> None:
        """``name`` is for what is kept, which JSON must hold."""
        self._path = folder / ".locks" / f".{name}.json"
        self._known: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        try:
            content = read_json(self._path)
            if content["version"] == _VERSION:
                self._known = dict(content["q_ids"])
        except (RelfvError, KeyError, TypeError, ValueError):
            pass

    def of(self, q_id: str, files: Iterable[str], make: Callable[[], Any], lasts: Callable[[Any], bool]) -> Any:
        """What is kept of a q_id, if ``files``, which it is made from, are as they were; else what ``make`` gives, kept
        where it ``lasts`` while they are."""
        state = [_state(file) for file in files]  # before they are read
        known = self._known.get(q_id)
        value = known[1] if known and known[0] == state else make()
        if lasts(value):
            self._now[q_id] = [state, value]
        return value

    def write(self) -> None:
        """Keep what ``of`` was asked for."""
        if len(self._now) >= FEWEST and self._now != self._known:
            try:
                write_atomic(self._path, orjson.dumps({"version": _VERSION, "q_ids": self._now}))
            except RelfvError as problem:
                log.debug("%s", problem)


def _state(file: str) -> list[int] | None:
    try:
        stat = os.stat(file)  # noqa: PTH116
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
