"""A worker process of ``relfv run --devices``: takes q_ids from the process that started it (crew.py), until there are
no more, it is told to end, or that process is gone."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from relfv.errors import RelfvError, RunError, in_words
from relfv.models.memory import take_at_most
from relfv.models.shared import share
from relfv.progress import at_work
from relfv.runs.crew import Start
from relfv.runs.worker import Worker
from relfv.signals import Terminated, as_exceptions

log = logging.getLogger(__name__)


class _Parent(QueueHandler):
    """The parent process, which hands out q_ids. As a log handler it gets every log line."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(queue.SimpleQueue())
        self._connection = connection
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> Any:
        """Wait for the next message of the parent."""
        return self.queue.get()  # type: ignore[attr-defined]

    def say(self, kind: str, content: Any) -> None:
        """Send the parent a message."""
        self.acquire()  # make log lines of other threads wait
        try:
            self._connection.send((kind, content))
        finally:
            self.release()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a log record to the parent; called by logging with a record that can travel. A parent that is gone hears
        nothing more."""
        self._connection.send(("line", record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that could not be sent; called by logging. ``_listen`` ends this process then."""

    def _listen(self) -> None:
        try:
            while True:
                self.queue.put(self._connection.recv())  # type: ignore[union-attr]
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the worker process. Returns the exit code."""
    parent = _Parent(Connection(int(sys.argv[1])))
    root = logging.getLogger("relfv")
    root.handlers[:], root.propagate = [parent], False
    root.setLevel(logging.DEBUG)
    try:
        with as_exceptions():
            import relfv.language_model  # noqa: F401  # PyTorch, while the other one looks at what is to be opened

            worker = _opened(parent.next(), parent)
            if worker is None:
                return 2
            with at_work("run", "between stages"):
                while (q_id := parent.next()) is not None:
                    outcome = worker.run(q_id)
                    if outcome == "failed" and not worker.still_computes():  # all later q_ids would fail, too
                        print("it can use its device no more", file=sys.stderr)
                        return 1
                    parent.say("outcome", outcome)
    except (KeyboardInterrupt, Terminated):
        return 143
    return 0


def _opened(start: Start, parent: _Parent) -> Worker | None:
    """Open the worker that ``parent`` asks for; None if it cannot be had, which the parent is told."""
    take_at_most(start.host_bytes)
    share(start.shared)
    try:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // start.n_processes))
        worker = Worker.opened(start.plan)
        parent.say("open", worker.description)
    except Exception as problem:  # the user gets one line, whatever the error is
        log.debug("traceback", exc_info=not isinstance(problem, RelfvError))
        parent.say("problem", problem if isinstance(problem, RelfvError) else RunError(in_words(problem)))
        return None
    return worker


if __name__ == "__main__":
    sys.exit(main())
