"""Files that appear whole or not at all, and locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from relfv.errors import InputError, RunError

_TEMP_PREFIX, _TEMP_SUFFIX = ".relfv-", ".tmp"
REPLACED = ".replaced-"
"""In the names of what was moved aside."""

_SHARED_WAIT_S = 60.0


def write_atomic(path: Path, data: bytes, *, read_only: bool = False) -> Path:
    """Write ``data`` so that ``path`` is, at every instant, the old file, or nothing, or the whole new file.

    Temporary file in the same folder, flush, fsync, rename, fsync of the folder: it survives a power cut once this
    returns. The user's umask decides who may read it.
    """
    return write_together({path: data}, read_only=read_only)[0]


def write_together(contents: Mapping[Path, bytes], *, read_only: bool = False) -> list[Path]:
    """``write_atomic`` of several files of one folder, in order, with one fsync of the folder for all their names.

    Each file still appears whole or not at all, and all of them survive a power cut once this returns; one that comes
    earlier may outlast some of the later ones.
    """
    (folder,) = {path.parent for path in contents}
    with telling(folder):
        make_folder(folder)
    for path, data in contents.items():
        with telling(path):
            _replace(path, data, read_only=read_only)
    with telling(folder):
        _sync_folder(folder)
    return list(contents)


_REMEDIES = {
    errno.ENOSPC: "free space on that disk, then run again",
    errno.EDQUOT: "free space within your quota, or have it raised, then run again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run again",
    errno.EROFS: "mount it writable, or use another output folder",
    errno.EACCES: "mend its permissions, or use another output folder",
    errno.EPERM: "mend its permissions, or use another output folder",
    errno.ENAMETOOLONG: "use a shorter path for the output folder",
    errno.EISDIR: "a folder is in the way; move it, then run again",
    errno.ENOTDIR: "a file is in the way of a folder; move it, then run again",
    errno.EEXIST: "a file is in the way of a folder; move it, then run again",
}


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """A failed write of ``path`` as a RunError that says what to do."""
    try:
        yield
    except OSError as problem:
        raise RunError(f"{path}: cannot be written ({problem.strerror}); {remedy(problem)}") from problem


def remedy(problem: OSError) -> str:
    """What a user can do about a failed write."""
    return _REMEDIES.get(problem.errno or 0, "check the path, the disk and its permissions, then run again")


def move_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename a file or folder to ``<name>.replaced-<UTC time>`` in ``folder`` (its own by default) and return where it
    is now. Nothing that is there already is replaced: two moves within one second get two names. Hold the lock."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name = f"{path.name}{REPLACED}{stamp}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    aside = next(free for free in ((folder or path.parent) / name for name in names) if not os.path.lexists(free))
    with telling(aside):
        path.rename(aside)
        _sync_folder(aside.parent)
        _sync_folder(path.parent)
    return aside


def make_folder(folder: Path) -> None:
    """Create ``folder``; a new folder's own name must survive a power cut too, so its parent is synced."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _replace(path: Path, data: bytes, *, read_only: bool) -> None:
    """Put the whole new file in the place of the old one, its content on disk before its name.

    The temporary's name is random: processes of two containers or hosts can have the same number.
    """
    temporary = path.with_name(f"{_TEMP_PREFIX}{secrets.token_hex(8)}{_TEMP_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444 if read_only else 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # an interrupt, too, must not leave half a file about
        with suppress(OSError):
            temporary.unlink()
        raise


def require_folder(folder: Path, flag: str) -> None:
    """Raise InputError that names ``flag`` if ``folder`` is no folder and cannot become one, RunError if the place it would
    be in is not writable."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{flag}: {there} is a file; expected a folder for the results, there or yet to be made")
    if not os.access(there, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        with telling(there):
            raise OSError(code, os.strerror(code))


def require_no_links(path: Path, below: Path) -> None:
    """Raise InputError for a symbolic link at ``path``, in it, or between ``below`` and it: a write through it would end
    up elsewhere. ``below`` itself may be reached through links; it is what the user named."""
    between = path.relative_to(below).parts
    found = [below.joinpath(*between[: i + 1]) for i in range(len(between))]
    if not any(one.is_symlink() for one in found):
        found += [Path(here, name) for here, folders, files in os.walk(path) for name in (*folders, *files)]
    for one in found:
        if one.is_symlink():
            raise InputError(
                f"{one}: is a symbolic link (to {os.readlink(one)}), and results are only written to where they seem to be; "  # noqa: PTH115
                "expected folders and files, so name the place that it leads to, or put what it leads to in its place"
            )


def write_json(path: Path, value: Any, *, read_only: bool = False) -> Path:
    """``json_bytes`` of ``value``, atomically."""
    return write_atomic(path, json_bytes(value), read_only=read_only)


def json_bytes(value: Any) -> bytes:
    """Indented UTF-8 JSON in reading order; NaN and infinities are refused, since JSON has none."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


SEAL = "sha256_of_the_rest"
"""The key of a file's hash of itself."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with a hash of itself, for a JSON file that no status vouches for."""
    return {**content, SEAL: sha256_bytes(json_bytes(content))}


def unsealed(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The inverse of ``sealed`` for what was read from ``path``; content without a seal is returned as it is. Raises
    RunError if it is not as it was written."""
    content = {key: value for key, value in found.items() if key != SEAL}
    try:
        holds = SEAL not in found or found[SEAL] == sha256_bytes(json_bytes(content))
    except ValueError:  # NaN, which parses and is never written
        holds = False
    if not holds:
        raise RunError(f"{path}: has been changed since it was written: it does not match its {SEAL}")
    return content


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises RunError that names the file if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; an earlier stage has not run, or was removed") from None
    except (OSError, ValueError) as problem:
        raise RunError(f"{path}: cannot be read as JSON ({problem})") from None


def remove_temporaries(folder: Path, *, below: bool = True) -> None:
    """Delete what a killed process was writing in ``folder`` and, unless ``below`` is False, in the folders in it.

    Call with the folder's lock held: then nobody is writing there.
    """
    for temporary in temporaries(folder, below=below):
        temporary.unlink(missing_ok=True)


def temporaries(folder: Path, *, below: bool = True) -> list[Path]:
    """What a process is writing in ``folder``, or was when it was killed."""
    pattern = f"{_TEMP_PREFIX}*{_TEMP_SUFFIX}"
    return list(folder.rglob(pattern) if below else folder.glob(pattern))


def sha256_file(path: Path) -> str | None:
    """sha256 of a file's bytes, or None where there is no readable file."""
    try:
        return sha256_bytes(path.read_bytes())
    except OSError:
        return None


@contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[str | None]:
    """Hold an exclusive lock while open. Yields None if held, or who else holds it after ``wait_s`` seconds of trying.

    The kernel drops the lock when the process ends, however it ends, so a killed run blocks nobody. Raises RunError
    where the file system has no locks.
    """
    with telling(path):
        make_folder(path.parent)
        opened = path.open("a+")
    with opened as file:
        give_up = time.monotonic() + wait_s
        while not _locked(file):
            if time.monotonic() >= give_up:
                yield _holder(file) or "another process"
                return
            time.sleep(0.1)
        with suppress(OSError):  # a full disk: the lock holds all the same, and is nameless
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield None


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """For the files right in ``folder`` that all runs share (manifest, page): one process writes at a time, what a
    killed one left half-written is removed first, and others wait. Raises RunError after a minute."""
    # No q_id begins with a dot, so no q_id's lock has this name.
    with lock(folder / ".locks" / ".shared.lock", wait_s=_SHARED_WAIT_S) as holder:
        if holder:
            raise RunError(f"{folder}: is being written by {holder} for over a minute; run again when that has ended")
        remove_temporaries(folder, below=False)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):  # fcntl's word for it, which NFS and SMB pass on
            return False
        raise RunError(
            f"{file.name}: cannot be locked ({problem.strerror}); relfv needs a file system with locks, so that two "
            "runs cannot write one q_id: mount it with them, or choose another --out_root"
        ) from problem
    return True


def _holder(file: IO[str]) -> str:
    """Who wrote their name into a lock's file; empty if it cannot be read (on SMB a locked file cannot)."""
    try:
        file.seek(0)
        return file.read().strip()
    except OSError:
        return ""


def holder_is_alive(path: Path) -> bool:
    """Whether the process that last held this lock still runs; True where that cannot be known (another host)."""
    try:
        _, pid, _, host = path.read_text().split()
    except (OSError, ValueError):
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256_bytes(data: bytes) -> str:
    """sha256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
