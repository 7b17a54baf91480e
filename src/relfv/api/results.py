"""Results that a run has left in a folder, read without opening a model: tables as DataFrames, and the vector of every
q_id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv.api.vector import FunctionVector
from relfv.errors import InputError, RunError
from relfv.relations import named
from relfv.report.written_tables import frame_of, statuses_of
from relfv.stages.vector_file import VECTOR_FILE
from relfv.store.folder import QidFolder
from relfv.store.status import QidStatus, read_status
from relfv.store.statuses import find_statuses

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-not-found]


class _Tables:
    """Tables of one q_id or of several; their columns: docs/artifacts.md. Each needs pandas (``relfv[pandas]``)."""

    def _statuses(self) -> list[QidStatus]:
        raise NotImplementedError

    def _frame(self, table: str) -> DataFrame:
        return frame_of(table, self._statuses())

    def summary(self) -> DataFrame:
        """One row for each q_id, completed or not: where it stands, its best layer, accuracy and P without and with the
        vector, whole answers, the share of the gap to prompts with demos, the verdict."""
        return self._frame("summary")

    def heads(self) -> DataFrame:
        """One row for each head: its rank, its causal indirect effect (CIE) with interval and false-discovery rate, and
        whether it is in the function vector."""
        return self._frame("heads")

    def layers(self) -> DataFrame:
        """One row for each layer: accuracy and P of zero-shot prompts without the vector and with it added after that
        layer."""
        return self._frame("layers")

    def controls(self) -> DataFrame:
        """One row for each control and layer: what other vectors do there. Rows without a layer say what edits of
        several layers at once do. Empty without extras."""
        return self._frame("controls")

    def answers(self) -> DataFrame:
        """One row for each query: what the model writes without and with the vector at the best layer. Empty without
        extras."""
        return self._frame("answers")

    def ablation(self) -> DataFrame:
        """One row for each set of heads or direction, and each way of removing it from clean prompts: what is lost.
        Empty without ``extras="ablation"``."""
        return self._frame("ablation")

    def mlps(self) -> DataFrame:
        """One row for each layer: the causal indirect effect of its MLP. Empty without ``extras="mlp"``."""
        return self._frame("mlps")

    def positions(self) -> DataFrame:
        """One row for each class of tokens, and set of heads or single head: what it changes there. Empty without
        ``extras="positions"``."""
        return self._frame("positions")

    def trials(self) -> DataFrame:
        """One row for each frozen trial: query, answer, scored token, clean and corrupted prompt."""
        return self._frame("trials")

    def effects(self) -> DataFrame:
        """One row for each trial and head: the scored token without and with the head's patch. Large."""
        return self._frame("effects")


@dataclass(frozen=True)
class Qid(_Tables):
    """The results of one q_id of a run."""

    q_id: str
    artifacts: Path
    """The folder of its files (docs/artifacts.md)."""
    _held_by: Any = field(default=None, repr=False, compare=False)
    """The run that keeps a temporary folder."""

    @property
    def status(self) -> str:
        """State of the q_id: ``pending``, ``running``, ``completed``, ``failed`` or ``skipped``."""
        return self._statuses()[0].status

    @property
    def function_vector(self) -> FunctionVector:
        """The function vector of this q_id, ready for use. Raises RunError, with the reason, for a q_id that is not
        completed."""
        path = QidFolder(self.artifacts, self.q_id).path(VECTOR_FILE)
        if path.is_file():
            return FunctionVector.read(path)
        (status,) = self._statuses()
        reason = f" ({status.reason})" if status.reason else ""
        # A skipped q_id has too few rows in the CSV, or prompts that are too long: running it again does not help.
        remedy = "" if status.status == "skipped" else ", so run 'relfv run' again"
        raise RunError(
            f"{self.q_id} has no {VECTOR_FILE.name}: it is {status.status}{reason}; expected a completed q_id{remedy}"
        )

    def _statuses(self) -> list[QidStatus]:
        status = read_status(self.artifacts)
        if status is None:
            raise RunError(f"{self.artifacts}: its qid_status.json is gone; was the folder moved meanwhile?")
        return [status]


@dataclass(frozen=True)
class Run(_Tables):
    """All q_ids of a relation CSV: ``run["Q15"]``, ``"Q15" in run``, ``len(run)`` and a loop over their names."""

    folder: Path
    _keeps: Any = field(default=None, repr=False, compare=False)
    """A temporary folder, which lasts as long as this object."""

    def __getitem__(self, q_id: str) -> Qid:
        if q_id not in self.q_ids:
            raise InputError(f"{q_id!r}: no such q_id in {self.folder}, which has {named(self.q_ids)}")
        return Qid(q_id, self.folder / q_id / "artifacts", self)

    @property
    def q_ids(self) -> list[str]:
        """The names of the q_ids, Q2 before Q10."""
        return [path.parent.name for path in find_statuses(self.folder) if path.parent.parent == self.folder]

    def __iter__(self) -> Iterator[str]:
        return iter(self.q_ids)

    def __len__(self) -> int:
        return len(self.q_ids)

    def __contains__(self, q_id: object) -> bool:
        return q_id in self.q_ids

    def _statuses(self) -> list[QidStatus]:
        return statuses_of(self.folder)


def load(folder: str | Path) -> Run:
    """Open the results in a relation's folder, such as ``results_fv/relation_qwise/relationA_ex``; no model is opened.

    Raises InputError if there are none, or those of several relations.
    """
    place = Path(folder)
    found = {path.parent.parent for path in find_statuses(place)}
    if found == {place}:
        return Run(place)
    if not found:
        raise InputError(f"{folder}: no results here; expected a relation's folder that relfv run wrote to")
    raise InputError(f"{folder}: is not the folder of one relation; expected {named(sorted(map(str, found)))}")
