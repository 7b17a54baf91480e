"""Locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from relfv.errors import RunError
from relfv.store.files import explained, make_folder, remove_temporaries

_SHARED_WAIT_S = 60.0
_BLINK_S = 0.3
"""Seconds to keep trying: a process that only looks (``held_by``) has a lock for an instant, which is no reason to
leave a q_id out."""


@contextmanager
def lock(path: Path, *, wait_s: float = _BLINK_S, needed: bool = True) -> Iterator[str | None]:
    """Hold an exclusive lock while open. Yields None if held, or who else holds it after ``wait_s`` seconds of trying.

    The kernel drops the lock when the process ends, however it ends, so a killed run blocks nobody. Raises RunError
    where something else than a file has its name, or the file system has no locks; it goes on there if none is
    ``needed``.
    """
    with explained(path):
        make_folder(path.parent)
        _require_file(path)
        opened = path.open("a+")
    with opened as file:
        give_up = time.monotonic() + wait_s
        while not _locked(file, needed=needed):
            if time.monotonic() >= give_up:
                yield _holder(file) or "another process"
                return
            time.sleep(0.05)
        with suppress(OSError):  # on a full disk the lock holds, without its holder's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield None


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """While open, be the only writer of the files directly in ``folder`` that all runs share (manifest, page): others
    wait, and files that a killed process left half-written are removed first. Raises RunError after a minute."""
    # No q_id begins with a dot, so no q_id's lock has this name.
    # Where there are no locks, q_ids are shared out by --shard, whose runs write none of these files.
    with lock(folder / ".locks" / ".shared.lock", wait_s=_SHARED_WAIT_S, needed=False) as holder:
        if holder:
            raise RunError(f"{folder}: is being written by {holder} for over a minute; run again when that has ended")
        remove_temporaries(folder, below=False)
        yield


def require_locks(folder: Path) -> None:
    """Raise RunError where the file system has no locks: once, and not for every q_id."""
    with lock(folder / ".locks" / ".shared.lock", wait_s=0.0):
        pass


def held_by(path: Path) -> str | None:
    """The holder of this lock, or None. The lock itself is asked: a process number may be another one's by now, and
    says nothing about another container or host."""
    try:
        _require_file(path)
        with path.open() as file:
            return None if _locked(file, shared=True) else _holder(file) or "another process"
    except (OSError, RunError):  # it was never locked, or cannot be
        return None


def _require_file(path: Path) -> None:
    """Raise OSError for a pipe or a device, which might never open, or a folder."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "not a regular file", str(path))


def _locked(file: IO[str], *, shared: bool = False, needed: bool = True) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):  # EACCES is what fcntl says, through NFS and SMB
            return False
        if not needed:
            return True
        raise RunError(
            f"{file.name}: cannot be locked ({problem.strerror}); relfv needs a file system with locks, so that two "
            "runs cannot write one q_id: mount it with them, choose another --out_root, or share the q_ids out by "
            "--shard"
        ) from problem
    return True


def _holder(file: IO[str]) -> str:
    """The name that the holder wrote into a lock's file; empty if it cannot be read (on SMB a locked file cannot)."""
    try:
        file.seek(0)
        return file.read().strip()
    except OSError:
        return ""
