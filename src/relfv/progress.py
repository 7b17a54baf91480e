"""Progress: what relfv is working on and how long it will still take, as a bar on a terminal, elsewhere as a dated line
after every 30 s of silence.

Whoever does what may take long opens ``at_work`` around it, and a loop over its parts goes by way of ``counted``. One
thread watches; it begins and ends with the outermost ``at_work``.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger(__name__)

SILENCE_S = 30.0
"""Seconds without a line after which the work at hand is logged."""
REFRESH_S = 0.5
"""Seconds between two drawings of the bar, and how long work lasts before it is shown."""

_BAR = 20
"""Least number of columns of the bar where the terminal is wide enough to say more beside it."""

T = TypeVar("T")


@dataclass
class Task:
    """One piece of work, with how much of it is done."""

    name: str
    about: str
    """Description of the work, in a few words."""
    expected_s: float | None = None
    """Seconds that it took before, where that is known."""
    unit: str = ""
    """The things that ``counted`` counts; nothing is counted where this is empty."""
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.monotonic)
    layer: str = ""
    """Where a pass over the model is: ``layer 7 of 18``; empty where that is not told."""

    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self.started

    def share(self) -> float | None:
        """Share of the work that is done, 0 to 1; None where nothing says so."""
        if self.expected_s:
            return min(0.99, self.seconds() / self.expected_s)
        return min(0.99, self.done / self.total) if self.done else None

    def left_s(self) -> float | None:
        """Seconds left, where they are known."""
        share = self.share()
        return self.seconds() * (1 / share - 1) if share and share < 0.99 else None

    def said(self) -> str:
        """Progress in words: ``12 of 25 prompts, layer 7 of 18, 40 s so far, 43 s left``."""
        counted = f"{self.done} of {self.total} {self.unit}, " if self.total else ""
        left, layer = self.left_s(), f"{self.layer}, " if self.layer else ""
        return f"{counted}{layer}{duration(self.seconds())} so far" + (
            "" if left is None else f", {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


_tasks: list[Task] = []
_headings: list[Callable[[], str]] = []


@contextmanager
def at_work(name: str, about: str, expected_s: float | None = None, *, unit: str = "") -> Iterator[Task]:
    """While open, make this the work at hand; work that is opened within takes its place meanwhile."""
    task = Task(name, about, expected_s, unit)
    outermost = not _tasks
    _tasks.append(task)
    watch = _Watch() if outermost else None
    try:
        yield task
    finally:
        _tasks.remove(task)
        if watch:
            watch.end()


def counted(parts: Sequence[T], size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yield ``parts``, one after another; the work at hand says how many of their ``size`` in all are done."""
    task = _tasks[-1] if _tasks and _tasks[-1].unit else Task("", "")
    task.done, task.total = 0, sum(map(size, parts))
    for part in parts:
        yield part
        task.done += size(part)


@contextmanager
def doing(words: str) -> Iterator[None]:
    """While open, the work at hand is described by ``words``: the part of it that is being done."""
    task = at_hand() or Task("", "")
    before, task.about = task.about, words
    try:
        yield
    finally:
        task.about = before


def at_layer(words: str) -> None:
    """Note where a pass over the model is, such as ``layer 7 of 18``; empty once none is under way."""
    if task := at_hand():
        task.layer = words


def at_hand() -> Task | None:
    """The innermost work that is open; None if there is none."""
    with suppress(IndexError):  # the work may end just now, in another thread
        return _tasks[-1]
    return None


def heading() -> str:
    """Text in front of every log line: how far the whole run is."""
    return _headings[-1]() if _headings else ""


@contextmanager
def headed(words: Callable[[], str]) -> Iterator[None]:
    """While open, make ``words()`` the heading."""
    _headings.append(words)
    try:
        yield
    finally:
        _headings.remove(words)


class _Watch(logging.Handler):
    """The thread that shows the work at hand. It is also a log handler, so that it knows when relfv last said
    something."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._heard, self._ended, self._bar = time.monotonic(), threading.Event(), None
        logging.getLogger("relfv").addHandler(self)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the time of a line; called by logging."""
        self._heard = time.monotonic()

    def end(self) -> None:
        """Stop showing progress."""
        self._ended.set()
        self._thread.join()
        logging.getLogger("relfv").removeHandler(self)

    def _watch(self) -> None:
        with _Bar() if on_a_terminal() else nullcontext() as bar:
            while not self._ended.wait(min(REFRESH_S, SILENCE_S)):
                task = at_hand()
                if task is None:
                    continue
                if bar:
                    bar.show(task)
                if time.monotonic() - self._heard >= SILENCE_S:
                    log.info("%s: %s: %s", task.name, task.said(), task.about, extra=_OF_FILES)


_OF_FILES = {"of_files": True}
"""Marks a log line that is not needed on a terminal with a bar."""


def is_of_files(record: logging.LogRecord) -> bool:
    """Whether a log line says no more than the bar does."""
    return getattr(record, "of_files", False)


def on_a_terminal() -> bool:
    """Whether stderr is a terminal that can show a bar."""
    try:
        return sys.stderr.isatty() and shutil.get_terminal_size().columns >= 20
    except (AttributeError, ValueError):  # stderr is missing or closed
        return False


class _Bar:
    """The progress bar: one line at the foot of the terminal."""

    shown: Any = None
    """tqdm's bar, while one is on the terminal."""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if _Bar.shown is not None:
            _Bar.shown.close()
            _Bar.shown = None

    def show(self, task: Task) -> None:
        """Draw the bar anew."""
        from tqdm import tqdm

        if task.seconds() < REFRESH_S and _Bar.shown is None:
            return
        left, right = f"{heading()}{task.name} ", f" {task.said()}"
        if len(left + right + task.about) + 2 + _BAR < shutil.get_terminal_size().columns:
            right += f": {task.about}"
        form = f"{_literal(left)}|{{bar}}|{_literal(right)}"
        if _Bar.shown is None:
            tqdm.set_lock(threading.RLock())  # tqdm's own lock is for several processes; relfv has one here
            tqdm.monitor_interval = 0
            _Bar.shown = tqdm(total=1.0, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format=form)
        _Bar.shown.bar_format, _Bar.shown.n = form, task.share() or 0.0
        _Bar.shown.refresh()


def _literal(words: str) -> str:
    """Escape ``words`` so that tqdm's format and the terminal show them as they are."""
    return "".join(char if char.isprintable() else "?" for char in words).replace("{", "{{").replace("}", "}}")


@contextmanager
def bar_hidden() -> Iterator[None]:
    """While open, hide the bar, so that it is not in the way of a line."""
    if _Bar.shown is None:
        yield
        return
    with type(_Bar.shown).external_write_mode(file=sys.stderr):
        yield
