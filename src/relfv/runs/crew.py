"""Run many q_ids in several processes: one on each device, or more, and q_ids handed out one by one.

Stages of a q_id follow each other, each on disk before the next begins, and between them a GPU has nothing to do. So
several processes share a card: it computes for one while the others are at their files.

Each process (member.py) opens the model on its device and is a ``Worker`` there. This one hands out the q_ids, passes
log lines on, and alone writes what tells of all of them. A q_id is locked by whoever works on it, as between runs that
know nothing of each other; a process that dies drops its lock, and its q_id goes to another, after all that wait.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue
from typing import IO, Any

from relfv.errors import DeviceTaken, InputError, RelfvError, RunError
from relfv.models.memory import available_bytes
from relfv.models.shared import new_file
from relfv.progress import Task, at_work, duration, headed
from relfv.runs.plan import RunPlan, RunRequest
from relfv.runs.worker import say_outcome

log = logging.getLogger(__name__)

_DEATHS = 2
"""Number of processes that may die at a q_id before it is given up."""
_PATIENCE_S = 60.0
"""Seconds for a process to record where its q_id stands, once it is told to end."""


def on_devices(request: RunRequest) -> RunRequest:
    """``request`` with a device, by name, for each of its processes, and the first of them as its settings' own. Raises
    InputError for one that is not there, and for a model that is open already."""
    if not request.devices and request.per_card == 1:
        return request
    if request.given:
        flag = "devices" if request.devices else "per_card"
        raise InputError(f"{flag}=...: a model given as an object is on a device already; give its name or its path")
    from relfv.models.devices import choose_devices, cuda_devices

    flag = "--devices" if request.devices else "--device"
    named = request.devices or (request.settings.device,)
    found = cuda_devices() if named == ("all",) else named
    devices = ["+".join(map(str, choose_devices(name, flag))) for name in found] * request.per_card
    return replace(request, devices=tuple(devices), per_card=1, settings=replace(request.settings, device=devices[0]))


@dataclass
class Start:
    """The first message to a worker process."""

    plan: RunPlan
    """The plan; its settings name the process's own device."""
    n_processes: int
    host_bytes: int | None
    """Bytes of the host's memory that the process may take; None: all that is free."""
    shared: int | None
    """Descriptor of the memory for weights that stream, which all processes share."""


@dataclass(eq=False)
class _Member:
    """A worker process, as the parent process sees it."""

    device: str
    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    """File with what the process wrote to stderr."""
    model: dict[str, Any] | None = None
    """Description of its model, once that is open."""
    q_id: str | None = None
    """The q_id that the process is at; None if it is idle."""
    since: float = field(default_factory=time.monotonic)

    @staticmethod
    def started(device: str, shared: int | None) -> _Member:
        """Start a process, which loads PyTorch until it is told what to open."""
        ours, theirs = Pipe()
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "relfv.runs.member", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[theirs.fileno(), *([] if shared is None else [shared])],
            # A terminal's Ctrl-C must reach only this process, which passes it on, once.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
        )
        theirs.close()
        return _Member(device, process, ours, errors)

    def open(self, start: Start) -> None:
        """Have the process open the model, on its device."""
        request = start.plan.request
        request = replace(request, settings=replace(request.settings, device=self.device))
        with suppress(OSError):  # the process has died, which ``_listen`` notices
            self.connection.send(replace(start, plan=replace(start.plan, request=request)))

    def take(self, q_id: str) -> None:
        """Hand the process this q_id."""
        self.q_id, self.since = q_id, time.monotonic()
        with suppress(OSError):
            self.connection.send(q_id)

    def end(self) -> None:
        """Tell the process that there is no more, or to drop the q_id that it is at."""
        if self.q_id is None and self.model is not None:
            with suppress(OSError):
                self.connection.send(None)
        else:
            self.process.terminate()

    def how_it_ended(self) -> str:
        """Wait until the process has ended, and say how, in words."""
        self.connection.close()
        try:
            code = self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
        self.errors.close()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        memory = ", as the system does where host memory runs out" if code == -signal.SIGKILL else ""
        return f"{how}{memory}{f': {last}' if last else ''}"


class Crew:
    """The worker processes; made with the model open in all of them."""

    def __init__(self, plan: RunPlan, n_q_ids: int, check: Callable[[], None]) -> None:
        """Start as many processes as ``plan`` has devices, but no more than ``n_q_ids``. ``check`` is called while they
        start.

        Raises what that does, and InputError or RunError if the model cannot be opened in one of them; none is left
        then.
        """
        self._plan, self._members = plan, list[_Member]()
        self._said = SimpleQueue[tuple[_Member, str, Any]]()
        devices = plan.request.devices[:n_q_ids]
        free, shared = available_bytes(), new_file()
        start = Start(plan, len(devices), None if free is None else free // len(devices), shared)
        try:
            with at_work(f"opening {plan.request.settings.model}", f"on {', '.join(devices)}"):
                try:
                    for device in devices:
                        self._members.append(member := _Member.started(device, shared))
                        threading.Thread(target=self._listen, args=[member], daemon=True).start()
                finally:
                    if shared is not None:
                        os.close(shared)
                check()
                for member in self._members:
                    member.open(start)
                self.description = self._wait_until_open()
        except BaseException:
            self.close()
            raise

    def outcomes(self, q_ids: Sequence[str]) -> Generator[tuple[str, str]]:
        """Run all of ``q_ids``. Yields each with how it ended, as they end."""
        waiting, left, deaths = deque(q_ids), set(q_ids), Counter[str]()
        with at_work("run", "", unit="q_ids") as task, headed(lambda: _heading(task)):
            task.total = len(q_ids)
            self._hand_out(waiting, task)
            for member, kind, content in self._heard():
                q_id, member.q_id = member.q_id, None
                if kind == "ended":
                    outcome = self._mourned(member, content, q_id, deaths)
                    if q_id and not outcome:
                        waiting.append(q_id)
                else:
                    outcome = content
                if q_id and outcome:
                    say_outcome(self._plan, q_id, outcome, time.monotonic() - member.since)
                    left.discard(q_id)
                    task.done += 1
                self._hand_out(waiting, task)
                if q_id and outcome:
                    yield q_id, outcome
                if not left:
                    return
        log.error("no process is left: %d q_ids were not run", len(left))
        yield from ((q_id, "failed") for q_id in q_ids if q_id in left)

    def close(self) -> None:
        """End all processes: the q_ids that they are at are dropped and recorded as pending."""
        try:
            for member in self._members:
                member.end()
            for _ in self._heard(give_up=time.monotonic() + _PATIENCE_S):
                pass
        finally:
            for member in self._members:  # processes that did not end in time, or this wait was interrupted
                member.process.kill()
                member.how_it_ended()
            self._members = []

    def _wait_until_open(self) -> dict[str, Any]:
        """Wait until all processes have the model open. -> description of the first one's model."""
        waiting, problems = set(self._members), dict[_Member, RelfvError]()
        n = len(waiting)
        for member, kind, content in self._heard():
            if kind == "open":
                member.model = content
            elif kind == "problem":
                problems[member] = content
            elif member in waiting:
                problems[member] = RunError(f"a process ended while it opened the model ({content})")
            waiting.discard(member)
            if not waiting:
                break
        there = {member.device for member in self._members if member.model}
        for member in [one for one, problem in problems.items() if isinstance(problem, DeviceTaken)]:
            if member.device in there:  # fewer processes give the same numbers, later
                log.warning("%s. Its other processes go on; --per_card 1 asks for one", problems.pop(member))
        if problems:
            member, problem = next(iter(problems.items()))
            everywhere = len({*map(str, problems.values())}) == 1 and len(problems) == n
            said = str(problem) if everywhere or str(problem).startswith("--devices") else f"{member.device}: {problem}"
            raise type(problem)(said)
        return next(member.model for member in self._members if member.model)

    def _hand_out(self, waiting: deque[str], task: Task) -> None:
        """Give every idle process the next q_id."""
        for member in self._members:
            if member.model and member.q_id is None and waiting:
                member.take(waiting.popleft())
        task.about = ", ".join(f"{m.device}: {m.q_id}" for m in self._members if m.q_id)

    def _mourned(self, member: _Member, how: str, q_id: str | None, deaths: Counter[str]) -> str:
        """Log that a process died. -> the outcome of its q_id, empty if another process is to try it."""
        if q_id is None:
            if member.model:  # otherwise the reason has been logged already
                log.warning("the process on %s ended (%s)", member.device, how)
            return ""
        deaths[q_id] += 1
        if deaths[q_id] < _DEATHS and self._members:
            log.warning("the process on %s ended at %s (%s); another takes it", member.device, q_id, how)
            return ""
        log.error("%s failed: the process on %s ended at it (%s)", q_id, member.device, how)
        return "failed"

    def _listen(self, member: _Member) -> None:
        """Receive the messages of one process, in a thread of its own, which no interrupt can stop in the middle of a
        message."""
        with suppress(Exception):  # the process ended, perhaps in the middle of a message
            while True:
                self._said.put((member, *member.connection.recv()))
        self._said.put((member, "ended", ""))

    def _heard(self, give_up: float | None = None) -> Iterator[tuple[_Member, str, Any]]:
        """Yield the messages of the processes (log lines are passed on instead), and how processes ended, until none is
        left or it is time to ``give_up``."""
        while self._members:
            try:
                left_s = None if give_up is None else max(0.0, give_up - time.monotonic())
                member, kind, content = self._said.get(timeout=left_s)
            except Empty:
                return
            if kind == "ended":
                self._members.remove(member)
                yield member, kind, member.how_it_ended()
            elif kind != "line":
                yield member, kind, content
            elif (logger := logging.getLogger(content.name)).isEnabledFor(content.levelno):
                logger.handle(content)


def _heading(task: Task) -> str:
    """Heading of log lines: ``[2/28, 14 min left] ``, with the number of q_ids that have ended."""
    left = task.left_s()
    return f"[{task.done}/{task.total}{'' if left is None else f', {duration(left)} left'}] "
