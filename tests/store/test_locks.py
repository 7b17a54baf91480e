from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from relfv.errors import RunError
from relfv.store.locks import holder_is_alive, lock


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


def test_whoever_locked_last_is_known_to_be_alive_or_dead(tmp_path: Path) -> None:
    path, here = tmp_path / "q", socket.gethostname()
    assert not holder_is_alive(path)
    with lock(path):
        assert holder_is_alive(path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for text, alive in (
        (f"process {ended.pid} on {here}", False),
        (f"process {ended.pid} on another-{here}", True),
        ("", False),
        ("some other words in it", False),
    ):
        path.write_text(text)
        assert holder_is_alive(path) is alive
