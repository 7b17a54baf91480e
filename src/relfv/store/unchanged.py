"""Cache of the q_ids that nobody has touched since they were last read, hashed and found to have all that was asked
for.

To hash the files of 10,000 q_ids takes minutes; to look at their sizes, times and inodes takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relfv.errors import RelfvError
from relfv.store import index
from relfv.store.files import entries_below, remove_temporaries, sha256_bytes
from relfv.store.locks import sole_writer

log = logging.getLogger(__name__)


class Unchanged(index.Index):
    """The q_ids of a relation's ``folder`` that were found complete and have not changed since."""

    def __init__(self, folder: Path, *, keep: bool = True) -> None:
        """Read what is known; with ``keep`` False the file is never written."""
        super().__init__(folder, "unchanged")
        self._folder, self._may_write = folder, keep

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
        is_known = q_id in self._on_disk and not (self._folder / q_id).is_symlink()
        return is_known and self.known(q_id, self.state(q_id, asked)) is True

    def note(self, q_id: str, state: str) -> None:
        """Note that a q_id was found complete in this state."""
        self.keep(q_id, state, True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, collect notes; they are added to the file when this ends, however it ends."""
        try:
            yield
        finally:
            if self._now and self._may_write and len(self._on_disk | self._now) >= index.FEWEST:
                try:
                    with sole_writer(self._folder):
                        remove_temporaries(self._path.parent)
                        self.write(add=True)
                except RelfvError as problem:
                    log.debug("%s", problem)
