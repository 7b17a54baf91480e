"""Cache of the q_ids that nobody has touched since they were last read, hashed and found to have all that was asked
for.

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
"""Path below a relation's folder. The file only saves time: without it everything is hashed again."""
_FEWEST = 100
"""Least number of q_ids for which anything is kept: fewer are hashed in no time."""


class Unchanged:
    """The q_ids of a relation's ``folder`` that were found complete and have not changed since."""

    def __init__(self, folder: Path, *, keep: bool = True) -> None:
        """Read what is known; with ``keep`` False the file is never written."""
        self._folder, self._keep = folder, keep
        self._noted: dict[str, str] = {}
        self._known = self._on_disk()

    def state(self, q_id: str, asked: str) -> str:
        """Hash of what the file system says about all files of a q_id but logs, and of what was ``asked`` for. Take it
        before the files are read."""
        top = str(self._folder / q_id)
        logs = f"{top}/logs/"
        stats = []
        for entry in entries_below(top):
            path = entry.path
            if entry.is_dir(follow_symlinks=False):
                stats.append((path[len(top) :],))  # a folder's contents are listed themselves
            elif not path.startswith(logs):
                with suppress(FileNotFoundError):  # another run's temporary, gone since it was listed
                    stat = entry.stat(follow_symlinks=False)
                    stats.append((path[len(top) :], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
        return sha256_bytes(repr((asked, sorted(stats))).encode())

    def holds(self, q_id: str, asked: str) -> bool:
        """Whether a q_id was found to have all that is ``asked`` for, and has not changed since."""
        is_known = q_id in self._known and not (self._folder / q_id).is_symlink()
        return is_known and self._known[q_id] == self.state(q_id, asked)

    def note(self, q_id: str, state: str) -> None:
        """Note that a q_id was found complete in this state."""
        self._noted[q_id] = state

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, collect notes; they are written when this ends, however it ends."""
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
