"""Write files so that they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, TypeVar

from relfv.errors import InputError, RunError

log = logging.getLogger(__name__)
T = TypeVar("T")

_TEMP_PREFIX, _TEMP_SUFFIX = ".relfv-", ".tmp"
REPLACED = ".replaced-"
"""Part of the names of files and folders that were moved aside."""

_TRIES = 5
_cannot_sync: set[int] = set()
"""Devices for which a warning that their folders cannot be synced has been logged."""
_MOST_BYTES = 4 << 30
"""Largest file that is read, in bytes. No artifact is larger; a larger file comes from somebody else and would fill the
memory."""


def write_atomic(path: Path, data: bytes, *, read_only: bool = False) -> Path:
    """Write ``data`` so that ``path`` is, at every instant, the old file, or nothing, or the whole new file.

    Temporary file in the same folder, flush, fsync, rename, fsync of the folder: it survives a power cut once this
    returns. The user's umask decides who may read it.
    """
    return write_together({path: data}, read_only=read_only)[0]


def write_together(contents: Mapping[Path, bytes], *, read_only: bool = False) -> list[Path]:
    """``write_atomic`` of several files of one folder: all contents are on disk before the first of the names, which
    follow in order, with one fsync of the folder.

    Each file still appears whole or not at all, and all of them survive a power cut once this returns; one that comes
    earlier may outlast some of the later ones.
    """
    with replacing([*contents], read_only=read_only) as files:
        for file, (path, data) in zip(files, contents.items(), strict=True):
            with explained(path):
                file.write(data)
    return [*contents]


_REMEDIES = {
    errno.ENOSPC: "free space on that disk, then run again",
    errno.EDQUOT: "free space within your quota, or have it raised, then run again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then run again",
    errno.EROFS: "mount it writable, or use another output folder",
    errno.EACCES: "change its permissions, or use another output folder",
    errno.EPERM: "change its permissions, or use another output folder",
    errno.ENAMETOOLONG: "use a shorter path for the output folder",
    errno.EISDIR: "a folder is in the way; move it, then run again",
    errno.ENOTDIR: "a file is in the way of a folder; move it, then run again",
    errno.EEXIST: "a file is in the way of a folder; move it, then run again",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """While open, turn a failed write of ``path`` into a RunError that says what to do."""
    try:
        yield
    except OSError as problem:
        raise RunError(f"{path}: cannot be written ({problem.strerror}); {remedy(problem)}") from problem


def remedy(problem: OSError) -> str:
    """Advice to a user about a failed write."""
    return _REMEDIES.get(problem.errno or 0, "check the path, the disk and its permissions, then run again")


def move_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename a file or folder to ``<name>.replaced-<UTC time>`` in ``folder`` (its own by default) and return where it
    is now. Nothing that is there already is replaced: two moves within one second get two names. Hold the lock."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name = f"{path.name}{REPLACED}{stamp}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    aside = next(free for free in ((folder or path.parent) / name for name in names) if not os.path.lexists(free))
    with explained(aside):
        path.rename(aside)
        _sync_folder(aside.parent)
        _sync_folder(path.parent)
    return aside


def make_folder(folder: Path) -> None:
    """Create ``folder``; a new folder's own name must survive a power cut too, so its parent is synced."""
    make_folders([folder])


def make_folders(folders: Iterable[Path]) -> None:
    """Create several folders as ``make_folder`` does, with one fsync for those of one parent."""
    new = [folder for folder in folders if not folder.is_dir()]
    parents = {folder.parent: None for folder in new}
    for parent in parents:
        make_folder(parent)
    for folder in new:
        with explained(folder):
            folder.mkdir(exist_ok=True)
    for parent in parents:
        with explained(parent):
            _sync_folder(parent)


@contextmanager
def replacing(paths: Sequence[Path], *, read_only: bool = False) -> Iterator[list[BinaryIO]]:
    """Put whole new files in the place of old ones, of one folder. A journal takes what was written before the first
    fsync in one go.

    A temporary's name is random: processes of two containers or hosts can have the same number.
    """
    (folder,) = {path.parent for path in paths}
    make_folder(folder)
    temporaries: list[Path] = []
    try:
        with ExitStack() as opened:
            files: list[BinaryIO] = []
            for path in paths:
                opened.enter_context(explained(path))  # closing writes buffered data, for which the disk may be full
                files.append(opened.enter_context(_again(lambda: _new(folder, temporaries, read_only=read_only))))
            yield files
            for path, file in zip(paths, files, strict=True):
                with explained(path):
                    file.flush()
            for path, file in zip(paths, files, strict=True):
                with explained(path):
                    _again(lambda file=file: os.fsync(file.fileno()))
        for path, temporary in zip(paths, temporaries, strict=True):
            with explained(path):
                _again(lambda path=path, temporary=temporary: temporary.replace(path))
    except BaseException:  # an interrupt must not leave half a file either
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink()
        raise
    with explained(folder):
        _sync_folder(folder)


def _new(folder: Path, temporaries: list[Path], *, read_only: bool) -> BinaryIO:
    """Create a file with a new random name, the last of ``temporaries``."""
    path = folder / f"{_TEMP_PREFIX}{secrets.token_hex(8)}{_TEMP_SUFFIX}"
    temporaries.append(path)
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444 if read_only else 0o666), "wb")
    except BaseException:  # some drives make the file and report an interrupt
        temporaries.remove(path)
        with suppress(OSError):
            path.unlink()
        raise


def require_folder(folder: Path, flag: str) -> None:
    """Raise InputError that names ``flag`` if ``folder`` is no folder and cannot become one, RunError if the place it
    would be in is not writable."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{flag}: {there} is a file; expected a folder for the results, there or yet to be made")
    if not os.access(there, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        with explained(there):
            raise OSError(code, os.strerror(code))


def require_no_links(path: Path, below: Path) -> None:
    """Raise InputError for a symbolic link at ``path``, in it, or between ``below`` and it: a write through it would
    end up elsewhere. ``below`` itself may be reached through links; it is what the user named."""
    between = path.relative_to(below).parts
    paths = [below.joinpath(*between[: i + 1]) for i in range(len(between))]
    if not any(one.is_symlink() for one in paths):
        paths += [Path(entry.path) for entry in entries_below(path) if entry.is_symlink()]
    for one in paths:
        if one.is_symlink():
            raise InputError(
                f"{one}: is a symbolic link (to {one.readlink()}), and results are only written to where they seem "
                "to be; expected folders and files, so name the place that it leads to, or put what it leads to in "
                "its place"
            )


def entries_below(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder and in the folders in it, links not followed; nothing where there is no folder."""
    folders = [str(folder)]
    while folders:
        here: list[os.DirEntry[str]] = []
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            here = list(entries)
        for entry in here:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)


def remove_temporaries(folder: Path, *, below: bool = True) -> None:
    """Delete what a killed process was writing in ``folder`` and, unless ``below`` is False, in the folders in it.

    Call with the folder's lock held: then nobody is writing there.
    """
    for temporary in temporaries(folder, below=below):
        temporary.unlink(missing_ok=True)


def temporaries(folder: Path, *, below: bool = True) -> list[Path]:
    """Temporary files that a process is writing in ``folder``, or was when it was killed."""
    pattern = f"{_TEMP_PREFIX}*{_TEMP_SUFFIX}"
    found = folder.rglob(pattern) if below else folder.glob(pattern)
    return [path for path in found if path.is_symlink() or not path.is_dir()]  # relfv makes no temporary folders


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError for one that cannot be read, is a pipe or a device, which might never
    end, or is larger than any artifact."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return _again(path.read_bytes)


def sha256_file(path: Path) -> str | None:
    """sha256 of a file's bytes, or None where there is no readable file."""
    try:
        return sha256_bytes(read_bytes(path))
    except OSError:
        return None


def require_hash(path: Path) -> str:
    """``sha256_file`` of a file that must be there."""
    digest = sha256_file(path)
    if digest is None:
        raise RunError(f"{path}: was written and is not there any more")
    return digest


def sha256_bytes(data: bytes) -> str:
    """sha256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def require_temporary_folder() -> None:
    """Raise RunError where there is no temporary folder: PyTorch asks for it as soon as it is imported."""
    import tempfile

    try:
        tempfile.gettempdir()
    except OSError as problem:
        raise RunError(f"{problem.strerror}; set TMPDIR to a folder that can be written") from None


def _sync_folder(folder: Path) -> None:
    descriptor = _again(lambda: os.open(folder, os.O_RDONLY))
    try:
        _again(lambda: os.fsync(descriptor))
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        # CIFS and some FUSE drives cannot sync folders: contents are synced all the same, names when the drive decides.
        if (device := os.fstat(descriptor).st_dev) not in _cannot_sync:
            _cannot_sync.add(device)
            said = "%s: this drive cannot sync folders (%s); a power cut, and nothing else, may lose the newest files"
            log.warning(said, folder, problem.strerror)
    finally:
        os.close(descriptor)


def _again(act: Callable[[], T]) -> T:
    """Call ``act``; an interrupted system call (EINTR), which some drives pass on, is tried again a few times."""
    for _ in range(_TRIES - 1):
        with suppress(InterruptedError):
            return act()
    return act()
