"""Keep up to date, while a run goes on, the page and tables that cover all q_ids of a relation."""

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
"""Outputs that cover all q_ids: the function that makes each, and the seconds that making it may take if it is to be
made after every q_id."""


class SoFar:
    """Page and tables of the q_ids finished so far, for people who look while a run goes on. A failure to write one
    does not stop the run, whose end tries again."""

    def __init__(self, folder: Path, *, of_all: bool = True) -> None:
        """Set up the outputs; ``of_all`` is False for a shard, which writes none of them."""
        self._folder, self._made = folder, _ABOUT_ALL if of_all else {}
        self._known = Known(folder)
        self._took = dict.fromkeys(_ABOUT_ALL, 0.0)
        self._written_at = dict.fromkeys(_ABOUT_ALL, 0.0)

    def write(self) -> None:
        """Write page and tables now."""
        for name in self._made:
            self._write(name)

    def write_at_last(self) -> None:
        """Write page and tables once everything has ended; raises an error if one cannot be written."""
        for make, _ in self._made.values():
            make(self._folder, self._known)

    def write_what_is_due(self) -> None:
        """Write, after a q_id, the outputs that are due. With thousands of q_ids, whose page and tables take long, each
        gets no more than a twentieth of the time."""
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
        """While open, make the page say what ``relfv status`` says even after SIGINT and SIGTERM."""
        try:
            yield
        except BaseException:
            self.write()
            raise
