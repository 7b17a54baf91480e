"""The part of ``relfv run --ray`` (on_ray.py) that runs on a node: an actor with a model of its own."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.errors import RunError
from relfv.runs.plan import RunPlan
from relfv.runs.worker import Worker


class _Said(logging.Handler):
    """Collects the warnings and errors of a worker, which the process that started the run logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record; called by logging."""
        self.lines.append((record.levelno, record.getMessage()))


class RayWorker:
    """The Ray actor: one worker with an opened model on a node."""

    def __init__(self, plan: RunPlan, version: str, cwd: str, mark: str) -> None:
        self._plan, self._version, self._cwd, self._mark = plan, version, cwd, mark
        self._worker: Worker | None = None

    def node(self) -> tuple[str, str]:
        """-> Ray's name of the node it is on, and one for people."""
        import ray  # type: ignore[import-not-found]

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def open(self) -> dict[str, Any]:
        """Open the model: -> its description. Raises RelfvError if it cannot be, or the results folder is not here."""
        with suppress(OSError):  # paths may be relative to the folder that the run was started in
            os.chdir(self._cwd)
        if __version__ != self._version:
            raise RunError(f"relfv {__version__} is installed there; expected {self._version}, as here")
        if not Path(self._mark).exists():
            folder = Path(self._mark).parent.parent
            raise RunError(f"{folder} is another folder there; expected one that all nodes share, as --out_root")
        self._worker = Worker.opened(self._plan)
        return self._worker.description

    def run(self, q_id: str) -> tuple[str, list[tuple[int, str]]]:
        """Run a q_id. -> how it ended, and the lines to log about it."""
        said = _Said()
        root = logging.getLogger("relfv")
        root.setLevel(logging.DEBUG)
        root.addHandler(said)
        try:
            assert self._worker
            return self._worker.run(q_id), said.lines
        finally:
            root.removeHandler(said)
