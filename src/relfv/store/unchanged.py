"""Which q_ids nobody has touched since they were last read, hashed and found to have all that was asked for.

To hash the files of 10,000 q_ids takes minutes; to look at their sizes, times and inodes takes seconds. What a disk
changes by itself moves none of these: ``relfv verify`` reads every byte, always.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relfv.errors import RelfvError
from relfv.store.files import entries_below, remove_temporaries, sha256_bytes, write_atomic
from relfv.store.formats import read_json
from relfv.store.locks import sole_writer

log = logging.getLogger(__name__)

_FILE = ".locks/.unchanged.json"
"""Below a relation's folder. It only saves time: without it everything is hashed again."""
_FEWEST = 100
"""q_ids. Fewer are hashed in no time, so there nothing is kept."""


class Unchanged:
    """Of a relation's ``folder``."""

    def __init__(self, folder: Path, *, keep: bool = True) -> None:
        """With ``keep`` False it is only looked at."""
        self._folder, self._keep = folder, keep
        self._noted: dict[str, str] = {}
        self._known = self._on_disk()

    def state(self, q_id: str, asked: str) -> str:
        """A hash of what the file system says of all files of a q_id but logs, and of what was ``asked`` for. To be
        taken before they are read."""
        top = str(self._folder / q_id)
        logs = f"{top}/logs/"
        stats = []
        for entry in entries_below(top):
            path = entry.path
            if entry.is_dir(follow_symlinks=False):
                stats.append((path[len(top) :],))  # what is in it is listed itself
            elif not path.startswith(logs):
                with suppress(FileNotFoundError):  # another run's temporary, gone since it was listed
                    stat = entry.stat(follow_symlinks=False)
                    stats.append((path[len(top) :], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
        return sha256_bytes(repr((asked, sorted(stats))).encode())

    def holds(self, q_id: str, asked: str) -> bool:
        """Whether a q_id was found to have all that is ``asked`` for, and is as it was then."""
        is_known = q_id in self._known and not (self._folder / q_id).is_symlink()
        return is_known and self._known[q_id] == self.state(q_id, asked)

    def note(self, q_id: str, state: str) -> None:
        """It was found so, in this state."""
        self._noted[q_id] = state

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What was noted is written when this ends, however it ends."""
        try:
            yield
        finally:
            if self._noted and self._keep and len(self._known | self._noted) >= _FEWEST:
                self._write()

    def _write(self) -> None:
        try:
            with sole_writer(self._folder):
                remove_temporaries((self._folder / _FILE).parent)
                content = {**self._on_disk(), **self._noted}
                write_atomic(self._folder / _FILE, json.dumps(content).encode())
        except RelfvError as problem:
            log.debug("%s", problem)

    def _on_disk(self) -> dict[str, str]:
        try:
            content = read_json(self._folder / _FILE)
        except RelfvError:
            return {}
        return content if isinstance(content, dict) else {}
