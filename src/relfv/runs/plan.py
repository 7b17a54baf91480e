"""What a ``relfv run`` is to do, known from the CSV and the folder alone, before a model is opened."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from relfv.errors import InputError, RelfvError
from relfv.models.sources import model_identity
from relfv.models.stored import resolved
from relfv.relations import file_sha256, load_relations, relation_name, require_q_ids, rows_sha256
from relfv.runs.manifest import MANIFEST
from relfv.runs.qid import has_extras, has_sweeps
from relfv.settings import Settings, differences, fingerprint_fields
from relfv.stages.table import is_complete
from relfv.stages.trials import ineligible_reason
from relfv.store.files import remove_temporaries, require_folder, require_no_links
from relfv.store.folder import QidFolder
from relfv.store.locks import lock
from relfv.store.status import STATUS_FILE, DamagedStatus, QidStatus, read_status_of_results
from relfv.types import Relation


@dataclass(frozen=True)
class RunRequest:
    """One call of ``relfv run``."""

    settings: Settings
    q_list: tuple[str, ...] | None
    """None for all of the CSV, in its order."""
    out_root: Path
    force: bool = False
    """Move existing folders of the chosen q_ids aside, under a dated name, and start afresh."""
    dry_run: bool = False
    """Say what would be done and touch nothing."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    request: RunRequest
    """Its settings resolved: no ``auto`` for what the checkpoint says."""
    folder: Path
    """``<out_root>/<REL>``."""
    relations: dict[str, Relation]
    csv_sha256: str
    model_identity: str

    def artifacts_dir(self, q_id: str) -> Path:
        """``<out_root>/<REL>/<Q>/artifacts``."""
        return self.folder / q_id / "artifacts"

    @contextmanager
    def locked(self, q_id: str) -> Iterator[str | None]:
        """Hold the q_id's lock while open, with what a killed process left half-written removed; yields who else holds
        it, or None."""
        with lock(QidFolder(self.artifacts_dir(q_id), q_id).lock) as holder:
            if holder is None:
                remove_temporaries(self.artifacts_dir(q_id))
            yield holder

    def skip_reason(self, q_id: str) -> str | None:
        """Why a q_id cannot run under these settings, or None."""
        settings = self.request.settings
        reason = ineligible_reason(self.relations[q_id], settings.n_demos, settings.corruption)
        return reason or self._was_skipped(q_id)

    def _was_skipped(self, q_id: str) -> str | None:
        """Why an earlier run of the same experiment skipped it: its prompts are too long, which only the model's
        tokenizer could tell."""
        status = None
        if not self.request.force:
            with suppress(RelfvError):  # said elsewhere
                status = self.status_on_disk(q_id)
        return status.reason if status and status.status == "skipped" and not self.differences(status) else None

    def new_status(self, q_id: str) -> QidStatus:
        """A pending status for a q_id that has none."""
        relation, settings = self.relations[q_id], self.request.settings
        settings = settings.without_sweeps()  # what has been swept
        rows = rows_sha256(relation, settings.corruption)
        fields = fingerprint_fields(settings, rows_sha256=rows, model_identity=self.model_identity)
        return QidStatus(self.artifacts_dir(q_id), q_id, settings, fields, q_row_count=len(relation.pairs))

    def status_on_disk(self, q_id: str) -> QidStatus | None:
        """The status in the q_id's folder. Raises DamagedStatus if results lie there that no status vouches for."""
        artifacts_dir = self.artifacts_dir(q_id)
        status = read_status_of_results(artifacts_dir)
        if status and status.q_id != q_id:
            raise DamagedStatus(artifacts_dir / STATUS_FILE, f"is damaged or of another q_id ({status.q_id})")
        return status

    def status_with_results(self, q_id: str) -> QidStatus | None:
        """The status on disk, if it has results to go on from."""
        status = self.status_on_disk(q_id)
        return status if status and status.has_results() else None

    def unusable_statuses(self) -> dict[str, RelfvError]:
        """q_ids whose status cannot be read or is damaged, with the reason."""
        unusable = {}
        for q_id in self.relations:
            try:
                self.status_on_disk(q_id)
            except RelfvError as problem:
                unusable[q_id] = problem
        return unusable

    def differences(self, status: QidStatus) -> list[str]:
        """In what the results of ``status`` are of another experiment than this run."""
        wanted = self.new_status(status.q_id).fingerprint_fields
        models = status.settings.model, self.request.settings.model
        return differences(status.fingerprint_fields, wanted, status.q_id, models=models)

    def is_done(self, status: QidStatus | None) -> bool:
        """Whether a q_id has all that is asked for."""
        if status is None or status.status != "completed" or not is_complete(status):
            return False
        asked = self.request.settings
        return has_extras(status, asked) and has_sweeps(status, asked)


def make_plan(request: RunRequest) -> Plan:
    """Read and check the CSV and the q_ids asked for. Raises InputError."""
    csv_path = Path(request.settings.relation_csv_path)
    relations = load_relations(csv_path)
    chosen = list(relations) if request.q_list is None else list(dict.fromkeys(request.q_list))
    require_q_ids(chosen, relations, "--q_list", csv_path)
    folder = request.out_root / relation_name(csv_path)
    require_folder(folder, "--out_root")
    for ours in (".locks", "report", "run.log", MANIFEST, *chosen):
        require_no_links(folder / ours, below=request.out_root)
    return Plan(
        replace(request, settings=resolved(request.settings)),
        folder,
        {q_id: relations[q_id] for q_id in chosen},
        file_sha256(csv_path),
        model_identity(request.settings.model, request.settings.revision),
    )


def require_same_experiment(plan: Plan, besides: Collection[str]) -> None:
    """Raise InputError if a folder holds results of other settings, rows, model or algorithm, naming what differs."""
    problems = []
    for q_id in plan.relations:
        status = None if q_id in besides else plan.status_with_results(q_id)
        if status and (differing := plan.differences(status)):
            problems.append(f"{q_id} ({', '.join(differing)})")
    if problems:
        raise InputError(
            f"{plan.folder} holds results of another experiment: {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use another --out_root, or --force to "
            "move those folders aside"
        )
