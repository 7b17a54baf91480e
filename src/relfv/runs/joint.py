"""Results of several q_ids in one document beside their folders: what ``relfv cross`` and ``relfv aggregate`` share.

A q_id's folder depends on that q_id alone. The joint document is written again after each target, so that at every
instant it holds all that is done. A target is kept while what its numbers rest on is what it was.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv.errors import InputError, RelfvError
from relfv.pace import Pace
from relfv.progress import at_work, headed
from relfv.store.files import move_aside, sha256_bytes, sha256_file, write_together
from relfv.store.formats import sealed_bytes
from relfv.store.locks import lock, sole_writer

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)


@contextmanager
def only_command(command: str, document: Path) -> Iterator[None]:
    """While open, be the only ``command`` that makes ``document``. Raises InputError where another is at it."""
    with lock(document.parent / ".locks" / f".{command}.lock") as holder:
        if holder:
            raise InputError(f"{document}: is being written by {holder}; wait for it to end, then run again")
        yield


def found_earlier(document: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    """What ``read`` makes of the folder of ``document``, if it is there as it was written."""
    if not document.exists():
        return None
    try:
        return read(document.parent)
    except RelfvError as problem:
        log.warning("%s; it is kept under another name and made again", problem)
        return None


class Joint(ABC):
    """Joint results of several q_ids, and the files that hold them."""

    path: Path
    """The document."""
    hashes: str
    """Key of the document under which the hashes of the files beside it are."""
    doing: str
    """What is done with a target, in words."""

    def __init__(
        self, earlier: dict[str, Any] | None, before: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """``earlier``: the document of an earlier call, and ``before`` its targets; ``origins``: target -> record of
        what its numbers rest on now."""
        self._earlier, self._origins = earlier, origins
        self._targets = {name: before[name] for name in origins if _fits(before.get(name), origins[name])}
        # Results that took the model to make and no longer fit are kept under a dated name.
        lost = earlier is None or before.keys() - self._targets.keys()
        self._in_the_way = self.path.exists() and bool(lost)

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The document's content but for hashes."""

    @abstractmethod
    def _beside(self, document: Mapping[str, Any]) -> dict[str, bytes]:
        """Name -> content of the files beside the document."""

    @abstractmethod
    def _judged(self, model: LanguageModel, name: str) -> dict[str, Any]:
        """The numbers of a target."""

    @abstractmethod
    def _tell(self, name: str, seconds: float) -> None:
        """Log that a target is done."""

    @property
    def waiting(self) -> list[str]:
        """The targets still to be judged."""
        return [name for name in self._origins if name not in self._targets]

    @property
    def done(self) -> dict[str, Any]:
        """The targets that are judged, in the order of all."""
        return {name: self._targets[name] for name in self._origins if name in self._targets}

    def judge_waiting(self, model: LanguageModel) -> None:
        """Judge each target that is ``waiting``, one at a time, and write the files after each."""
        pace = Pace(len(self.waiting))
        with headed(pace.heading):
            for name in self.waiting:
                pace.begin()
                with at_work(name, self.doing, pace.begin_stage(""), unit="prompts"):
                    self._targets[name] = self._judged(model, name)
                self._write(self.document())
                self._tell(name, pace.seconds())
                pace.end()

    def write_if_changed(self) -> None:
        """Write the files if they differ, for one, after a call that was killed between them, or lost one of them."""
        document = self.document()
        made = {name: sha256_bytes(data) for name, data in self._beside(document).items()}
        there = {name: sha256_file(self.path.parent / name) for name in made}
        if self._earlier != {**document, self.hashes: made} or there != made:
            self._write(document)

    def _write(self, document: dict[str, Any]) -> None:
        beside = self._beside(document)
        hashes = {name: sha256_bytes(data) for name, data in beside.items()}
        files = {self.path.parent / name: data for name, data in beside.items()}
        # The manifest and the page of a run lie in the same folder: one writer at a time.
        with sole_writer(self.path.parent):
            if self._in_the_way:
                log.info("earlier results are now %s", move_aside(self.path))
                self._in_the_way = False
            write_together({**files, self.path: sealed_bytes({**document, self.hashes: hashes})})


def _fits(before: Mapping[str, Any] | None, origin: Mapping[str, Any]) -> bool:
    return before is not None and before["made_from"] == origin
