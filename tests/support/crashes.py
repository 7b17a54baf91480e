"""``relfv run`` in forks of a warmed process, so that a fraction of a second is enough to end one at any instant; and
what must hold of its output tree afterwards."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.backends.backend_agg import RendererAgg

from relfv.cli import main
from relfv.runs import member
from relfv.stages import sweeps
from relfv.store.formats import SEAL
from relfv.store.status import read_status

DIED = 77
"""Exit code of a process that ended itself between two operations."""
_TIMES = {"created_at", "updated_at", "started_at", "finished_at", SEAL}
"""And the hash over them."""


def lighten(patch: pytest.MonkeyPatch) -> None:
    """Take out of runs what is a fifth of their time or more and means nothing to a process that ends: the words in
    figures, and waiting for the disk, since what was written outlives the writer without it. Every fsync is still
    called."""
    patch.setattr(RendererAgg, "draw_text", lambda *_, **__: None)
    patch.setattr(os, "fsync", lambda _: None)


@dataclass(frozen=True)
class Job:
    """One ``relfv run``, to be started again and again."""

    flags: tuple[str, ...]
    undisturbed: Path
    """Where it ran once without a disturbance: an out_root."""
    seconds: float
    """What that takes in a fork, of processor time."""

    def start(self, out: Path, before: Callable[[], None] = lambda: None) -> Fork:
        """Begin it on ``out`` in a fork, which calls ``before`` first."""
        return Fork(lambda: (before(), main([*self.flags, "--out_root", str(out)]))[1], out.parent / f"{out.name}.said")

    def run(self, out: Path) -> Fork:
        """Run it on ``out`` to its end, whatever state that is in."""
        fork = self.start(out)
        assert fork.wait() == 0, fork.said()
        return fork


class Fork:
    """A child that calls ``body`` and exits with what it returns; its stderr is appended to a file."""

    def __init__(self, body: Callable[[], int], said: Path) -> None:
        self._said = said
        self._from = said.stat().st_size if said.exists() else 0
        ready, begun = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                file = said.open("a", buffering=1)
                for descriptor in (1, 2):
                    os.dup2(file.fileno(), descriptor)
                sys.stdout = sys.stderr = file
                # A runner may have started this process with interrupts off.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.write(begun, b".")
                code = body()
            finally:
                os._exit(code)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)

    def wait(self, limit_s: float = 60.0) -> int:
        """Its exit code, negative for a signal; it may take ``limit_s`` seconds."""
        give_up = time.monotonic() + limit_s
        while time.monotonic() < give_up:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(code)
            time.sleep(0.002)
        self.signal(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {limit_s} s: {self.said()}")

    def compute(self, seconds: float) -> None:
        """Until it has had this much processor time or has ended: the same share of its work on a busy machine as on an
        idle one."""
        self.until(lambda: self.computed() >= seconds)

    def computed(self) -> float:
        """Processor time that it has had, in seconds."""
        return time.clock_gettime(~self.pid << 3 | 2)  # as clock_getcpuclockid(3) makes it, which Python does not offer

    def until(self, condition: Callable[[], object]) -> None:
        """Until this holds or it has ended."""
        while not condition() and not self.has_ended():
            time.sleep(0.002)

    def has_ended(self) -> bool:
        """Whether there is an exit code to ``wait`` for."""
        return bool(os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

    def signal(self, number: int) -> None:
        """Send it a signal; it may have ended meanwhile."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_until_stopped(self) -> None:
        """Until a SIGSTOP has reached it."""
        _, code = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(code), self.said()

    def said(self) -> str:
        """Its stderr."""
        with self._said.open() as file:
            file.seek(self._from)
            return file.read()


def with_forked_members(body: Callable[[], int], first: Callable[[], None] = lambda: None) -> int:
    """``body()``, where the worker processes that a crew starts are forks of this one, which are warm at once, not
    ``python -m relfv.runs.member``. ``first`` is called in the first of them."""
    real, calls = subprocess.Popen, itertools.chain([first], itertools.repeat(lambda: None))

    def start(words: list[str], **how: Any) -> Any:
        is_member = words[1:3] == ["-m", "relfv.runs.member"]
        return _Member(words[2:], next(calls), how["stdout"], how["pass_fds"]) if is_member else real(words, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        return body()


class _Member:
    """Such a fork, with what a crew asks of a ``Popen``."""

    def __init__(self, words: list[str], before: Callable[[], None], output: IO[bytes], kept: list[int]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
                sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                # A pipe ends when nobody has its other end.
                for descriptor in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - {0, 1, 2, *kept}:
                    with suppress(OSError):
                        os.close(descriptor)
                sys.argv = words
                before()
                code = member.main()
            finally:
                os._exit(code)

    def wait(self, timeout: float = 60.0) -> int:
        give_up = time.monotonic() + timeout
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > give_up:
                raise subprocess.TimeoutExpired("member", timeout)
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(ended[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What happens at one operation on a file."""

    at: int
    """Which one, counted from 0."""
    how: str
    """``before`` or ``after``: the process dies then; ``stop``: it is stopped before it; else an errno's name."""


class Operations:
    """Sees every operation that changes files under ``root`` and lets ``fault`` happen at one of them.

    Files are written in two halves, the second of which is the operation: what dies before it leaves half a file.
    """

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root, self._fault = str(root), fault
        self.seen: list[tuple[str, str, str]] = []
        """(kind, path, the path it had before) of each; the last only for ``replace`` and ``rename``."""
        self.written: dict[int, bytes] = {}
        """What each write wrote, by its operation."""
        self.statuses: dict[int, dict[str, Any]] = {}
        """Content of each qid_status.json, by the operation that put it there."""

    def install(self) -> None:
        """Stand between this process and its files, for good: for forks."""
        real_open, real_fsync, real_fdopen = os.open, os.fsync, os.fdopen
        paths: dict[int, str] = {}

        def fdopen(descriptor: int, mode: str) -> _File:
            def write(data: bytes, act: Callable[[], Any]) -> None:
                self.written[len(self.seen)] = data
                self._do("write", paths[descriptor], act)

            return _File(real_fdopen(descriptor, mode), write)

        def open_descriptor(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            def act() -> int:
                descriptor = real_open(path, flags, *rest, **named)
                paths[descriptor] = str(path)
                return descriptor

            return self._do("open", path, act)

        os.open, os.fdopen = open_descriptor, fdopen  # type: ignore[assignment]
        os.fsync = lambda file: self._do("fsync", paths[file], lambda: real_fsync(file))  # type: ignore[assignment]
        for kind in ("mkdir", "replace", "rename", "unlink", "open"):
            self._watch(kind, getattr(pathlib.Path, kind))

    def _watch(self, kind: str, real: Callable[..., Any]) -> None:
        def method(path: Path, *rest: Any, **named: Any) -> Any:
            if kind == "open" and not set("wax+") & set(str(rest[:1])):
                return real(path, *rest, **named)
            # a new name counts as where it goes to
            target, source = (rest[0], path) if kind in ("replace", "rename") else (path, None)
            return self._do(kind, target, lambda: real(path, *rest, **named), source)

        setattr(pathlib.Path, kind, method)

    def _do(self, kind: str, path: Any, act: Callable[[], Any], source: Path | None = None) -> Any:
        if not str(path).startswith(self.root):
            return act()
        index, fault = len(self.seen), self._fault
        self.seen.append((kind, str(path), str(source or "")))
        if kind == "replace" and str(path).endswith("qid_status.json") and source:
            self.statuses[index] = json.loads(source.read_text())
        if fault is None or fault.at != index:
            return act()
        if fault.how == "before":
            os._exit(DIED)
        if fault.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.how != "after":
            number = getattr(errno, fault.how)
            raise OSError(number, os.strerror(number), str(path))
        result = act()
        if fault.how == "after":
            os._exit(DIED)
        return result


class _File:
    """A file whose second half of every write is an operation."""

    def __init__(self, file: io.IOBase, operation: Callable[[bytes, Callable[[], Any]], None]) -> None:
        self._file, self._operation = file, operation
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._operation(data, lambda: self._file.write(data[len(data) // 2 :]))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def files(out: Path) -> dict[str, Path]:
    """Every file under ``out``, by its relative path."""
    return {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}


def require_undisturbed(out: Path, job: Job, *, may_lack: tuple[str, ...] = ()) -> None:
    """The same files as an undisturbed run left, with the same bytes but for times, and nothing else. Files with the
    endings ``may_lack`` need not be there."""
    found, expected = files(out), files(job.undisturbed)
    assert set(found) <= set(expected)
    assert {name for name in set(expected) - set(found) if not name.endswith(may_lack)} == set()
    for name, path in found.items():
        if path.name == "qid_status.json":
            assert _timeless(path) == _timeless(expected[name]), name
        elif path.name != "run_manifest.json" and path.suffix not in (".log", ".lock"):
            assert path.read_bytes() == expected[name].read_bytes(), name


def _timeless(status: Path) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in _TIMES}
        return value

    return strip(json.loads(status.read_bytes()))


def finished_work(out: Path) -> dict[str, Any]:
    """What no later run may touch: each finished stage's record and its files' inodes and times, and the status of each
    completed q_id."""
    work: dict[str, Any] = {}
    for path in out.glob("*/*/artifacts/qid_status.json"):
        status = read_status(path.parent)
        assert status
        if status.status == "completed" and status.intact(sweeps.STAGE.name):  # which are added to a completed q_id
            work[status.q_id] = path.read_bytes(), path.stat().st_ino
        for name, record in status.stages.items():
            if status.intact(name):
                stats = [(path.parent / file).stat() for file in record.files]
                work[f"{status.q_id} {name}"] = vars(record), [(stat.st_ino, stat.st_mtime_ns) for stat in stats]
    return work


def require_kept(before: dict[str, Any], out: Path) -> None:
    """What was finished then has not been done again."""
    after = finished_work(out)
    repeated = [name for name, work in before.items() if after.get(name) != work]
    assert not repeated
