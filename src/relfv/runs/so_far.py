"""What tells of all q_ids of a relation, while a run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relfv.errors import RelfvError, in_words
from relfv.report.known import Known
from relfv.report.page import write_report
from relfv.report.written_tables import write_tables

log = logging.getLogger(__name__)

_ABOUT_ALL = {"tables are": (write_tables, 0.0), "page is": (write_report, 0.2)}
"""What tells of all q_ids: how it is made, and in how many seconds it may be made after every one of them."""


class SoFar:
    """Page and tables of what is finished, for who looks while a run goes on. That one cannot be written does not stop
    the run, whose end tries again."""

    def __init__(self, folder: Path, *, of_all: bool = True) -> None:
        """``of_all`` is False for a shard, which writes none of it."""
        self._folder, self._made = folder, _ABOUT_ALL if of_all else {}
        self._known = Known(folder)
        self._took = dict.fromkeys(_ABOUT_ALL, 0.0)
        self._written_at = dict.fromkeys(_ABOUT_ALL, 0.0)

    def write(self) -> None:
        """All of it, now."""
        for name in self._made:
            self._write(name)

    def write_at_last(self) -> None:
        """The same, once everything has ended: raises what it cannot write."""
        for make, _ in self._made.values():
            make(self._folder, self._known)

    def write_what_is_due(self) -> None:
        """After every q_id; of thousands, whose page and tables take long, each in no more than a twentieth of the
        time."""
        for name, (_, free_s) in self._made.items():
            if self._took[name] < free_s or time.monotonic() - self._written_at[name] > 20 * self._took[name]:
                self._write(name)

    def _write(self, name: str) -> None:
        began = time.monotonic()
        try:
            self._made[name][0](self._folder, self._known)
        except (RelfvError, OSError) as problem:
            log.warning("the %s not up to date: %s", name, in_words(problem))
        self._written_at[name] = time.monotonic()
        self._took[name] = self._written_at[name] - began

    @contextmanager
    def also_if_interrupted(self) -> Iterator[None]:
        """The page says what ``relfv status`` says, also after SIGINT and SIGTERM."""
        try:
            yield
        except BaseException:
            self.write()
            raise
