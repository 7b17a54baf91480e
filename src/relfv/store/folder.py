"""One q_id's folder: where each file of the artifact contract is, and reading and writing it under the folder's
lock."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from relfv.errors import InputError
from relfv.store.files import (
    REPLACED,
    read_bytes,
    remove_temporaries,
    require_hash,
    require_no_links,
    sha256_bytes,
    write_together,
)
from relfv.store.locks import lock

T = TypeVar("T")
_WAIT_S = 60.0
_SETTLED_NS = 50_000_000
"""Nanoseconds: a file that was changed this recently may change again within the same tick of the file system's clock,
that of today's disks and of NFS on top of them."""


@dataclass(frozen=True)
class File(Generic[T]):
    """One file of the artifact contract."""

    name: str
    """Path in ``artifacts/``, with ``{q_id}`` and ``{layer}`` where it has them and ``*`` for what differs from run to
    run."""
    read: Callable[[Path], T]
    """Reader of the file. Raises RelfvError for a file that is not what it should be."""

    @property
    def per_layer(self) -> bool:
        """Whether each layer has a file of its own."""
        return "{layer}" in self.name

    def named(self, q_id: str, layer: int | None = None) -> str:
        """The path for one q_id and, if each layer has a file, one layer."""
        return self.name.format(q_id=q_id, layer=layer)

    def is_named(self, name: str, q_id: str) -> bool:
        """Whether ``name``, relative to ``artifacts/``, is this file for some layer."""
        return _pattern(self.name, q_id).fullmatch(name) is not None


@lru_cache(maxsize=256)
def _pattern(name: str, q_id: str) -> re.Pattern[str]:
    pattern = re.escape(name).replace(r"\{q_id\}", re.escape(q_id)).replace(r"\{layer\}", r"\d+")
    return re.compile(pattern.replace(r"\*", "[^/]*"))


def is_of_a_qid(folder: Path) -> bool:
    """Whether ``folder`` is a q_id's. A relation's folder may hold a folder ``artifacts``, too: that of a q_id with
    this name; and a relation may have this name."""
    inside = folder / "artifacts"
    if not inside.is_dir():
        return False
    return not any(below.name == "artifacts" or (below / "artifacts").is_dir() for below in inside.iterdir())


def was_moved_aside(name: str) -> bool:
    """Whether relfv gave a q_id's folder this dated name when it moved it aside: no q_id has such a name."""
    return REPLACED in name


@dataclass(frozen=True)
class QidFolder:
    """``<out_root>/<REL>/<Q>`` by its ``artifacts`` folder, or any folder that gets the files of one q_id."""

    artifacts: Path
    q_id: str
    elsewhere: Mapping[File[Any], Path] = field(default_factory=dict)
    """Paths of the files that a single command reads from, or writes to, another place."""
    _parsed: dict[Path, tuple[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    """Hash and content of files that were read or written, by path, since several stages read the same files."""
    _digests: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)
    """Hash of the bytes that were written or read last, by path."""
    _states: dict[Path, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """State of each file in the file system when its hash was taken, by path; missing if it had just been written."""
    _located: dict[tuple[File[Any], int | None], Path] = field(default_factory=dict, repr=False, compare=False)

    @property
    def log(self) -> Path:
        """The run's log for this q_id."""
        return self.artifacts.parent / "logs" / "stepD_aie.log"

    @property
    def lock(self) -> Path:
        """Path of the lock that whoever writes into this q_id's folder holds."""
        folder = self.artifacts.resolve().parent
        return folder.parent / ".locks" / f"{folder.name}.lock"

    def path(self, file: File[Any], layer: int | None = None) -> Path:
        """The path of ``file``; for a name with ``*`` that is not ``located`` yet, the path of the file that is there,
        if one is."""
        if (file, layer) in self._located:
            return self._located[file, layer]
        if file in self.elsewhere:
            return self.elsewhere[file]
        path = self.artifacts / file.named(self.q_id, layer)
        if "*" in file.name:
            return next(iter(sorted(path.parent.glob(path.name))), path)
        self._located[file, layer] = path
        return path

    def locate(self, file: File[Any], layer: int | None, name: str) -> Path:
        """Set which name the ``*`` of a file stands for. -> its path."""
        path = self._located[file, layer] = self.path(file, layer).with_name(name)
        return path

    def has(self, file: File[Any], layer: int | None = None) -> bool:
        """Whether ``file`` is there."""
        return self.path(file, layer).is_file()

    def read(self, file: File[T], layer: int | None = None) -> T:
        """The content of ``file``, parsed once for as long as its bytes are the same; not to be changed by the
        caller."""
        return self.read_at(self.path(file, layer), file)

    def read_at(self, path: Path, file: File[T]) -> T:
        """The content of the file at ``path``, read and cached as ``read`` does with ``file``."""
        try:
            digest = self._digest(path)
        except OSError:
            return file.read(path)  # the reader says what is wrong
        known = self._parsed.get(path)
        if known is None or known[0] != digest:
            known = self._parsed[path] = digest, file.read(path)
        return known[1]

    def _digest(self, path: Path) -> str:
        """The hash of a file, which is not read again while its size, times and inode are those of the last time."""
        status = path.stat()
        state = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        if self._states.get(path) != state:
            is_settled = time.time_ns() - max(state[1:3]) > _SETTLED_NS
            self._digests[path] = sha256_bytes(read_bytes(path))
            self._states[path] = state if is_settled else ()
        return self._digests[path]

    def write(self, file: File[T], data: bytes, *, read_only: bool = False, content: T | None = None) -> None:
        """Write ``file`` whole or not at all; ``content`` is what its reader would make of ``data``, where that is at
        hand."""
        path = self.path(file)
        self.write_together({path: data}, read_only=read_only)
        if content is not None:
            self._parsed[path] = self._digests[path], content

    def remove(self, file: File[Any]) -> None:
        """Delete ``file``, if it is there."""
        self.path(file).unlink(missing_ok=True)

    def write_together(self, contents: Mapping[Path, bytes], *, read_only: bool = False) -> None:
        """Write several files of one folder, in order, each whole or not at all."""
        write_together(contents, read_only=read_only)
        for path, data in contents.items():
            self._digests[path], self._states[path] = sha256_bytes(data), ()

    def hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hashes of files, path relative to ``artifacts/`` -> sha256: of the bytes that this process has written or
        read there, which saves reading the file once more, or else of the file's."""
        inside = f"{self.artifacts}/"
        return {str(path).removeprefix(inside): self._digests.get(path) or require_hash(path) for path in paths}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, the same one as ``relfv run``, with leftovers of a killed process removed.

        Another command that holds it, such as Step6 at another layer, is waited for. Raises InputError after a minute,
        and for links that lead out of the folder.
        """
        for inside in (self.artifacts, self.log.parent):
            require_no_links(inside, below=self.artifacts.parent)
        require_no_links(self.lock, below=self.lock.parent.parent)
        with lock(self.lock, wait_s=_WAIT_S) as holder:
            if holder:
                raise InputError(f"{self.artifacts} is being written by {holder}; wait for it, or use another folder")
            remove_temporaries(self.artifacts)
            yield
