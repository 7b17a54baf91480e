"""Raise SIGINT, SIGTERM and SIGUSR1 as exceptions, also where a library turns them into another error.

Python raises them wherever it happens to be: within a callback of Matplotlib's C++, say, which turns any error there
into a ValueError of its own. So what came is remembered, and ``raise_received`` says it again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived."""


class TimeIsUp(Terminated):
    """SIGUSR1 arrived: the usual signal of a cluster's scheduler that the job's time is about to end."""


_EXCEPTIONS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGUSR1: TimeIsUp,
}
_received: list[int] = []


@contextmanager
def as_exceptions() -> Iterator[None]:
    """While open, in the main thread: SIGINT raises KeyboardInterrupt, SIGTERM Terminated, SIGUSR1
    TimeIsUp."""
    _received.clear()
    before = {number: signal.getsignal(number) for number in _EXCEPTIONS}
    # Signals that the caller ignores, as a shell does with SIGINT in the background, stay ignored.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, _raise)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()  # what comes after in this process has not been interrupted


def raise_received() -> None:
    """Raise the signal that has come since ``as_exceptions`` was opened, if any has."""
    if _received:
        raise _EXCEPTIONS[_received[-1]]


def _raise(number: int, _: Any) -> None:
    _received.append(number)
    raise _EXCEPTIONS[number]
