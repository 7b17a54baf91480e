"""The plan of a ``relfv run``: what it is to do, known from the CSV and the folder alone, before a model is opened."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.fingerprints import differences, fingerprint_fields
from relfv.models.given import GivenModel
from relfv.models.sources import model_identity
from relfv.models.stored import resolved
from relfv.progress import at_work
from relfv.relations import csv_file, load_relations, relation_name, require_q_ids, rows_sha256
from relfv.report.registered import PLAN
from relfv.requests import without_requests
from relfv.runs.figure import has_figures
from relfv.runs.manifest import MANIFEST, OF_SHARD
from relfv.runs.qid import has_extras, missing_requests
from relfv.runs.registered import WrittenPlan, to_register
from relfv.settings import Settings
from relfv.stages.prompt_formats import q_ids_with_formats, with_formats
from relfv.stages.table import STEP_D, is_complete, settings_of
from relfv.stages.trials import ineligible_reason
from relfv.store.files import remove_temporaries, require_folder, require_no_links, sha256_bytes
from relfv.store.folder import QidFolder
from relfv.store.locks import held_by, lock
from relfv.store.status import STATUS_FILE, DamagedStatus, QidStatus, read_status_of_results
from relfv.types import Relation

STEP_D_FIELDS = frozenset({"rows_sha256", "model_identity", "algorithm_version"}).union(*map(settings_of, STEP_D))
"""Fields of the fingerprint that the results of StepD depend on."""


@dataclass(frozen=True)
class OnRay:
    """A Ray cluster to run on."""

    address: str
    """Address of the cluster: ``auto`` for the one that is there, ``local`` for one of this machine alone, or where its
    head is."""
    gpus_per_worker: float = 1.0
    workers: int | None = None
    """Number of workers; None for as many as fit."""


@dataclass(frozen=True)
class RunRequest:
    """One call of ``relfv run``."""

    settings: Settings
    q_list: tuple[str, ...] | None
    """q_ids to run; None for all of the CSV, in its order."""
    out_root: Path
    force: bool = False
    """Move existing folders of the chosen q_ids aside, under a dated name, and start afresh."""
    dry_run: bool = False
    """Say what would be done and touch nothing."""
    reuse_stepd: Path | None = None
    """Results whose StepD files are taken into new folders instead of computing them again."""
    shard: tuple[int, int] | None = None
    """(i, n): only the i-th of the chosen q_ids, and every n-th after it, for file systems without locks."""
    ray: OnRay | None = None
    """Ray cluster to share the q_ids out to; None: this machine."""
    devices: tuple[str, ...] = ()
    """Devices to share the q_ids out to, a process on each; empty: this process, on the settings' device."""
    per_card: int = 1
    """Processes on each device."""
    given: GivenModel | None = None
    """A model that is open already, in place of the one that the settings name."""
    plan: Path | None = None
    """JSON file of what is to be shown (runs/registered.py), registered before anything is computed."""

    @property
    def processes_a_card(self) -> int:
        """Number of processes that share the card that has most of them."""
        if self.ray:
            return max(1, int(1 / self.ray.gpus_per_worker)) if self.ray.gpus_per_worker else 1
        cards = [card for device in self.devices for card in device.split("+")]
        return max(map(cards.count, cards), default=1)


def devices_from(text: str) -> tuple[str, ...]:
    """Split a text such as ``cuda:0,cuda:1`` into devices."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class RunPlan:
    """A checked request: what a run is to do."""

    request: RunRequest
    """The request with its settings resolved: no ``auto`` for what the checkpoint says."""
    folder: Path
    """The relation's folder, ``<out_root>/<REL>``."""
    relations: dict[str, Relation]
    csv_sha256: str
    model_identity: str
    written: WrittenPlan | None = None
    """The plan of what is to be shown, as ``--plan`` gave it."""

    def own(self, name: str) -> Path:
        """Path of a file beside the q_ids' folders; a shard has a file of its own, which no other run writes."""
        return self.folder / (f"{name}{OF_SHARD.format(*shard)}" if (shard := self.request.shard) else name)

    def artifacts_dir(self, q_id: str) -> Path:
        """The q_id's folder ``<out_root>/<REL>/<Q>/artifacts``."""
        return self.folder / q_id / "artifacts"

    @contextmanager
    def locked(self, q_id: str) -> Iterator[str | None]:
        """Hold the q_id's lock while open, with what a killed process left half-written removed; yields who else holds
        it, or None."""
        path = QidFolder(self.artifacts_dir(q_id), q_id).lock
        with lock(path, needed=self.request.shard is None) as holder:  # no other shard has this q_id
            if holder is None:
                remove_temporaries(self.artifacts_dir(q_id))
            yield holder

    def skip_reason(self, q_id: str) -> str | None:
        """Reason why a q_id cannot run under these settings, or None."""
        settings = self.request.settings
        reason = ineligible_reason(self.relations[q_id], settings.n_demos, settings.corruption)
        return reason or self._was_skipped(q_id)

    def _was_skipped(self, q_id: str) -> str | None:
        """Reason why an earlier run of the same experiment skipped a q_id: its prompts are too long, which only the
        model's tokenizer could tell. None if it did not."""
        status = None
        if not self.request.force:
            with suppress(RelfvError):  # reported elsewhere
                status = self.status_on_disk(q_id)
        return status.reason if status and status.status == "skipped" and not self.differences(status) else None

    def new_status(self, q_id: str) -> QidStatus:
        """A pending status for a q_id that has none."""
        relation, settings = self.relations[q_id], self.request.settings
        settings = without_requests(settings)  # a new q_id has no sweeps or studies yet
        rows = rows_sha256(relation, settings.corruption)
        fields = fingerprint_fields(settings, rows_sha256=rows, model_identity=self.model_identity)
        n_rows = len(relation.pairs)
        return QidStatus(self.artifacts_dir(q_id), q_id, settings, fields, q_row_count=n_rows, name=relation.name)

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

    def n_free(self, q_ids: Sequence[str]) -> int:
        """Number of ``q_ids`` that no other run is at, or has done meanwhile."""
        held = [q_id for q_id in q_ids if held_by(QidFolder(self.artifacts_dir(q_id), q_id).lock)]
        return sum(q_id not in held and not self._is_over(q_id) for q_id in q_ids)

    def _is_over(self, q_id: str) -> bool:
        with suppress(RelfvError):  # reported elsewhere
            status = self.status_on_disk(q_id)
            return status is not None and status.status == "completed"
        return False

    def unusable_statuses(self) -> dict[str, RelfvError]:
        """q_ids whose status cannot be read or is damaged, with the reason."""
        unusable = {}
        for q_id in self.relations:
            try:
                self.status_on_disk(q_id)
            except RelfvError as problem:
                unusable[q_id] = problem
        return unusable

    def differences(self, status: QidStatus, of: Collection[str] = ()) -> list[str]:
        """List how the experiment that made the results of ``status`` differs from this run; ``of`` limits this to some
        fields of the fingerprint."""
        both = status.fingerprint_fields, self.new_status(status.q_id).fingerprint_fields
        there, here = ({name: value for name, value in side.items() if not of or name in of} for side in both)
        models = status.settings.model, self.request.settings.model
        return differences(there, here, status.q_id, models=models)

    def asked(self, q_id: str) -> str:
        """Everything that a q_id's results are compared with, as one text: the whole CSV, since studies use other
        relations, and names are taken from it."""
        return self._asked_of_all + rows_sha256(self.relations[q_id], self.request.settings.corruption)

    @cached_property
    def _asked_of_all(self) -> str:
        settings = self.request.settings
        fields = fingerprint_fields(settings, rows_sha256="", model_identity=self.model_identity)
        return json.dumps([__version__, fields, settings.to_json(), self.csv_sha256])

    def require_no_links(self) -> None:
        """Raise InputError if a link leads out of the folder of one of the q_ids."""
        for q_id in self.relations:
            require_no_links(self.folder / q_id, below=self.request.out_root)

    def besides(self, q_ids: Collection[str]) -> RunPlan:
        """A copy of this plan without these ``q_ids``."""
        return replace(self, relations={q: relation for q, relation in self.relations.items() if q not in q_ids})

    def is_done(self, status: QidStatus | None) -> bool:
        """Whether a q_id has all that is asked for."""
        if status is None or status.status != "completed" or not is_complete(status):
            return False
        asked = self.request.settings
        missing = missing_requests(status, asked, self.relations[status.q_id])
        return has_extras(status, asked) and not missing and has_figures(status, asked)


def chosen_relations(request: RunRequest) -> dict[str, Relation]:
    """The relations of the CSV that are asked for. Raises InputError."""
    csv_path = csv_file(request.settings.relation_csv_path)
    relations = load_relations(csv_path)
    chosen = list(relations) if request.q_list is None else list(dict.fromkeys(request.q_list))
    require_q_ids(chosen, relations, "--q_list", csv_path)
    require_q_ids(q_ids_with_formats(with_formats(request.settings).formats), relations, "--formats", csv_path)
    if request.shard:
        i, n = request.shard
        if not (chosen := chosen[i - 1 :: n]):
            raise InputError(f"--shard {i}/{n}: there are fewer than {i} q_ids, so none is left for it")
    return {q_id: relations[q_id] for q_id in chosen}


def make_plan(request: RunRequest) -> RunPlan:
    """Read and check the CSV and the q_ids asked for. Raises InputError."""
    request = replace(request, settings=with_formats(request.settings))
    csv_path, relations = csv_file(request.settings.relation_csv_path), chosen_relations(request)
    folder = request.out_root / relation_name(csv_path)
    require_folder(folder, "--out_root")
    for ours in (".locks", "report", "tables", "run.log", MANIFEST, PLAN):
        require_no_links(folder / ours, below=request.out_root)
    written = to_register(request, csv_path, folder) if request.plan else None
    given = request.given
    with at_work("reading", f"the CSV, and what {request.settings.model} is, by its config and hash"):
        return RunPlan(
            replace(request, settings=given.resolved(request.settings) if given else resolved(request.settings)),
            folder,
            relations,
            sha256_bytes(csv_path.read_bytes()),
            given.identity() if given else model_identity(request.settings.model, request.settings.revision),
            written,
        )


def require_same_experiment(plan: RunPlan, besides: Collection[str]) -> None:
    """Raise InputError if a folder holds results of other settings, rows, model or algorithm, naming what differs."""
    problems, reusable = [], True
    for q_id in plan.relations:
        status = None if q_id in besides else plan.status_with_results(q_id)
        if status and (differing := plan.differences(status)):
            problems.append(f"{q_id} ({', '.join(differing)})")
            reusable &= not plan.differences(status, STEP_D_FIELDS)
    if problems:
        raise InputError(
            f"{plan.folder} holds results of another experiment: {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use another --out_root"
            f"{f' with --reuse_stepd {plan.request.out_root}, since StepD is the same' if reusable else ''}, or "
            "--force to move those folders aside"
        )
