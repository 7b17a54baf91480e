"""What a power cut may leave of a run, replayed from the log of what the run did to files.

The model is what POSIX allows and no more than relfv may rely on: a file's content survives if it was synced after its
last write, else any beginning of it may be there; what was done to a folder's names (new, renamed, removed) survives if
the folder was synced afterwards, else any beginning of it may have happened, each rename whole or not at all. Logs and
locks are not synced and are lost.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Operation = tuple[str, str, str]


@dataclass
class _File:
    content: bytes = b""
    synced: bytes | None = None


@dataclass
class _Folder:
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    """Names that survive whatever happens."""
    pending: list[dict[str, _File | _Folder | None]] = field(default_factory=list)
    """What was done to names since the last sync; None for a name that went."""

    def now(self) -> dict[str, _File | _Folder]:
        """The names that a process sees."""
        return _applied(self.durable, self.pending)


def _applied(
    names: Mapping[str, _File | _Folder], changes: Sequence[Mapping[str, _File | _Folder | None]]
) -> dict[str, _File | _Folder]:
    found: dict[str, _File | _Folder | None] = dict(names)
    for change in changes:
        found.update(change)
    return {name: node for name, node in found.items() if node is not None}


class Disk:
    """The files below one folder, with what of them is safe."""

    def __init__(self, root: str) -> None:
        self._root, self._folders = root, defaultdict(_Folder)

    def do(self, operation: Operation, data: bytes | None) -> None:
        """One operation of the log; ``data`` is what a write wrote."""
        kind, path, source = operation
        folder, _, name = path.rpartition("/")
        here = self._folders[folder]
        if kind == "mkdir":
            here.pending.append({name: self._folders[path]})
        elif kind == "open" and name.endswith(".tmp"):
            here.pending.append({name: _File()})
        elif kind == "write":
            self._file(path).content = data or b""
        elif kind == "fsync" and path in self._folders:
            here = self._folders[path]
            here.durable, here.pending = here.now(), []
        elif kind == "fsync":
            self._file(path).synced = self._file(path).content
        elif kind in ("replace", "rename"):
            assert source.rpartition("/")[0] == folder, "a rename between folders is in no log so far"
            here.pending.append({source.rpartition("/")[2]: None, name: here.now()[source.rpartition("/")[2]]})
        elif kind == "unlink":
            here.pending.append({name: None})

    def cut(self, rng: random.Random, to: Path) -> None:
        """Write what one power cut leaves below ``to``."""
        self._leave(self._folders[self._root], rng, to)

    def _leave(self, folder: _Folder, rng: random.Random, to: Path) -> None:
        names = _applied(folder.durable, folder.pending[: rng.randint(0, len(folder.pending))])
        for name, node in names.items():
            if isinstance(node, _Folder):
                (to / name).mkdir()
                self._leave(node, rng, to / name)
            elif node.synced == node.content:
                (to / name).write_bytes(node.content)
            else:
                (to / name).write_bytes(node.content[: rng.randint(0, len(node.content))])

    def _file(self, path: str) -> _File:
        folder, _, name = path.rpartition("/")
        node = self._folders[folder].now()[name]
        assert isinstance(node, _File)
        return node
