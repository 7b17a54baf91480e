from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from relfv.errors import RunError
from relfv.store.locks import held_by, lock


def test_a_lock_is_held_once_and_says_by_whom(tmp_path: Path) -> None:
    with lock(tmp_path / "locks/q") as first, lock(tmp_path / "locks/q") as second:
        assert first is None
        assert f"process {os.getpid()}" in str(second)
    with lock(tmp_path / "locks/q") as again:
        assert again is None


def test_a_file_system_without_locks_is_named_and_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(RunError, match=r"locks/q: cannot be locked .*choose another --out_root"),
        lock(tmp_path / "locks/q"),
    ):
        pass


def test_the_lock_says_who_is_at_work_and_not_the_number_of_a_process(tmp_path: Path) -> None:
    """A number may be another process's by now, or another container's."""
    path = tmp_path / "q"
    assert held_by(path) is None
    with lock(path):
        assert held_by(path) == f"process {os.getpid()} on {socket.gethostname()}"
    for text in (
        f"process {os.getpid()} on {socket.gethostname()}",
        f"process 1 on another-{socket.gethostname()}",
        "",
    ):
        path.write_text(text)
        assert held_by(path) is None
    assert path.read_text() == ""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert held_by(path) == "another process"


def test_a_look_at_a_lock_does_not_keep_a_run_from_it(tmp_path: Path) -> None:
    path = tmp_path / "q"
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with lock(path) as holder:
            assert holder is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_lock(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "q")
    assert held_by(tmp_path / "q") is None
    with pytest.raises(RunError, match="q: cannot be written"), lock(tmp_path / "q"):
        pass
