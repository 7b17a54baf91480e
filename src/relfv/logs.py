"""Log lines: short on the terminal, complete in files, always with how much of the run is done and how long the rest
will take."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from relfv.errors import RunError
from relfv.progress import bar_hidden, heading, is_of_files, on_a_terminal
from relfv.store.files import explained, make_folder, remedy

_ROOT = logging.getLogger("relfv")
_LINE = "%(asctime)s %(heading)s%(level_word)s%(message)s"
_DAY_AND_TIME = "%Y-%m-%d %H:%M:%S"


def set_up_logging(*, debug: bool) -> None:
    """Send relfv's log lines to stderr, one each, clean in a terminal and in a file alike; in a file with their day."""
    _ROOT.handlers[:] = [_on_stderr(logging.DEBUG if debug else logging.INFO)]
    _ROOT.setLevel(logging.DEBUG)
    _ROOT.propagate = False


def _on_stderr(level: int) -> logging.Handler:
    terminal = on_a_terminal()
    handler = _AboveBar(sys.stderr) if terminal else logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(_Formatter(_LINE, "%H:%M:%S" if terminal else _DAY_AND_TIME))
    return handler


@contextmanager
def told() -> Iterator[None]:
    """While open in another program, log files have lines of level INFO even where it has asked for warnings alone; it
    has what it asked for, or on stderr the lines of ``relfv run`` where it has set up no logging at all."""
    level, asked, propagate = _ROOT.level, _ROOT.getEffectiveLevel(), _ROOT.propagate
    handler = None
    if not _ROOT.hasHandlers():
        handler = _on_stderr(logging.INFO)
    elif propagate and asked > logging.INFO:
        handler, _ROOT.propagate = _Onward(asked), False
    if asked > logging.INFO:
        _ROOT.setLevel(logging.INFO)
    if handler:
        _ROOT.addHandler(handler)
    try:
        yield
    finally:
        _ROOT.setLevel(level)
        _ROOT.propagate = propagate
        if handler:
            _ROOT.removeHandler(handler)


class _Onward(logging.Handler):
    """To the program's handlers, for which a logger's own level is too late once files need more."""

    def emit(self, record: logging.LogRecord) -> None:
        if _ROOT.parent:
            _ROOT.parent.callHandlers(record)


@contextmanager
def remembering() -> Iterator[list[logging.LogRecord]]:
    """While open, keep every log line in the list as well: for ``logging_to`` a file that may not be written yet."""
    handler = _Memory()
    _ROOT.addHandler(handler)
    try:
        yield handler.records
    finally:
        _ROOT.removeHandler(handler)


class _Memory(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logging_to(path: Path, earlier: Sequence[logging.LogRecord] = ()) -> Iterator[None]:
    """While open, append every log line, details included, to ``path`` as well, after the ``earlier`` ones. Raises
    RunError if it cannot be opened; a disk that is full later costs lines of the log, and is said once."""
    with explained(path):
        make_folder(path.parent)
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_Formatter(_LINE, _DAY_AND_TIME))
    for record in earlier:
        handler.handle(record)
    _ROOT.addHandler(handler)
    try:
        yield
    finally:
        _ROOT.removeHandler(handler)
        with suppress(OSError):  # closing tries once more to write what could not be written
            handler.close()


class _AboveBar(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler for a terminal that has a bar at its foot."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; called by logging."""
        if not is_of_files(record):
            with bar_hidden():
                super().emit(record)


class _LogFile(logging.FileHandler):
    """Log file that, where it cannot be written, does not stop the program or print a traceback for every line."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Handle an error in writing a line; called by logging."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            super().handleError(record)
        elif not self.said:
            self.said = True
            _ROOT.warning("%s: cannot be written (%s); %s", self.baseFilename, problem.strerror, remedy(problem))


class _Formatter(logging.Formatter):
    """Formatter that puts each record on one line: words from a CSV cannot start a line of their own or steer a
    terminal."""

    def format(self, record: logging.LogRecord) -> str:
        record.heading = heading()
        record.level_word = "" if record.levelno in (logging.INFO, logging.DEBUG) else f"{record.levelname}: "
        text = super().format(record)
        # A traceback has many lines; their text is escaped all the same.
        if record.exc_info:
            return "\n".join(map(printable, text.split("\n")))
        return printable(shortened(text) if record.levelno >= logging.WARNING else text)


def show(text: object) -> None:
    """Write a command's result to stdout, with characters that the encoding lacks as escapes. Where stdout is closed
    nothing is written. Raises RunError if it cannot be written, BrokenPipeError if its reader has gone."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(str(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as problem:
        drop_output()
        said = "the output (stdout) cannot be written (%s), and everything else was done; %s"
        raise RunError(said % (problem.strerror, remedy(problem))) from None


def drop_output() -> None:
    """Drop output that was shown and could not be written: Python would try again at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def shortened(text: str) -> str:
    """``text`` with words, such as paths, of more than 300 characters cut in their middle."""
    return re.sub(r"\S{301,}", lambda long: f"{long[0][:120]}…{long[0][-120:]}", text)


def printable(text: str) -> str:
    """``text`` on one line that cannot steer a terminal: controls, line breaks, marks that turn the direction of
    writing and invisible characters as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
