"""``relfv cross``: every q_id's function vector on every q_id's prompts, from a finished tree.

A target is kept while the vectors, prompts and settings that it was made from are what they were; if that is all of
them, the model is never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import InputError
from relfv.logs import show
from relfv.relations import called
from relfv.report.page import write_report
from relfv.runs.joint import Joint, found_earlier, only_command
from relfv.runs.qid import open_for, work_on
from relfv.runs.several import completed_q_ids, shared_settings
from relfv.settings import Settings
from relfv.stages.cross import (
    CROSS,
    CROSS_FIGURE,
    CROSS_SETTINGS,
    MEANING,
    compare_directions,
    cross_origin,
    inject_vectors,
    judge_target,
    overall_verdict,
    read_cross,
)
from relfv.stages.function_vector import FV
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import evaluated_prompts
from relfv.stats import LEVEL
from relfv.store.files import require_no_links
from relfv.store.folder import QidFolder
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)


def cross(folder: Path, q_list: Sequence[str] | None, overlay: Callable[[Settings], Settings]) -> int:
    """Cross the completed q_ids of a relation's ``folder``, or those of ``q_list``; ``overlay`` puts the command's
    flags over the settings that the q_ids were made with. Returns the exit code.

    Raises InputError for fewer than two q_ids, damaged ones, and another model or arithmetic than theirs.
    """
    for ours in (CROSS, CROSS_FIGURE, ".locks", "report"):
        require_no_links(folder / ours, below=folder)
    statuses = completed_q_ids(folder, q_list)
    settings = shared_settings(folder, statuses, overlay)
    with only_command("cross", folder / CROSS):
        _Crossing(folder, statuses, named=q_list is not None).run(lambda: open_for(settings))
    log.info("report: %s", write_report(folder))
    show(folder / CROSS)
    return 0


class _Crossing(Joint):
    """Crossing of the q_ids ``statuses``."""

    hashes, doing = "figure", "every vector on its prompts"

    def __init__(self, folder: Path, statuses: Mapping[str, QidStatus], *, named: bool) -> None:
        """Take ``named`` as True if the q_ids were named one by one; else they are all that are completed, and none may
        be missing."""
        self.path, self._statuses, self._q_ids = folder / CROSS, statuses, list(statuses)
        folders = [QidFolder(status.artifacts_dir, q_id) for q_id, status in statuses.items()]
        self._vectors = np.stack([of_qid.read(FV) for of_qid in folders])
        found = found_earlier(self.path, read_cross)
        earlier = found["targets"] if found else {}
        if narrowed := [q_id for q_id in earlier if q_id not in statuses and not named]:
            raise InputError(
                f"{self.path} has {', '.join(narrowed)}, not completed now; let 'relfv run' finish, or name by "
                "--q_list the q_ids to cross without"
            )
        origins = {
            q_id: cross_origin(folder, q_id, self._q_ids, status.fingerprint_fields)
            for q_id, status in statuses.items()
        }
        super().__init__(found, earlier, origins)

    def run(self, opened: Callable[[], LanguageModel]) -> None:
        """Compute the targets that are missing or made from something else."""
        log.info("%d q_ids to cross, %d done before", len(self.waiting), len(self.done))
        if self.waiting:
            self.judge_waiting(opened())
            log.info("%s", self.document()["verdict"])
        else:
            self.write_if_changed()

    def _tell(self, name: str, seconds: float) -> None:
        log.info("%s in %.1f s: %s", name, seconds, self.done[name]["verdict"])

    def _judged(self, model: LanguageModel, name: str) -> dict[str, Any]:
        work = work_on(self._statuses[name], lambda: model)
        prompts, alpha, facts = work.once(evaluated_prompts), work.settings.alpha, model.facts()
        effects = inject_vectors(model, prompts, self._q_ids, self._vectors, alpha)
        judged = judge_target(effects, prompts, self._q_ids, name, work.read(STEP6_SUMMARY)["best_layer"])
        return {
            "verdict": judged.pop("verdict"),
            "alpha": alpha,
            "n_eval": len(prompts),
            "n_queries": len(set(prompts.clusters)),
            "made_from": self._origins[name],
            "made_by": {
                **{fact: facts[fact] for fact in ("engine", "device", "dtype")},
                "prompts_per_pass": effects.per_pass,
            },
            **judged,
        }

    def document(self) -> dict[str, Any]:
        """The content of cross_fv.json but for hashes; targets in the q_ids' order."""
        first = next(iter(self._statuses.values()))
        norms, cosine = compare_directions(self._vectors)
        return {
            "relation": self.path.parent.resolve().name,
            "verdict": overall_verdict(self.done, len(self._q_ids)),
            "meaning": MEANING,
            "model": first.settings.model,
            **{name: first.fingerprint_fields[name] for name in CROSS_SETTINGS},
            "layers": first.expected_layers,
            "ci_level": LEVEL,
            "q_ids": self._q_ids,
            "norms": norms,
            "cosine": cosine,
            "targets": self.done,
        }

    def _beside(self, document: Mapping[str, Any]) -> dict[str, bytes]:
        names = {q_id: status.name for q_id, status in self._statuses.items()}
        return {CROSS_FIGURE: _figure(document, names, next(iter(self._statuses.values())).settings)}


def _figure(document: Mapping[str, Any], names: Mapping[str, str], settings: Settings) -> bytes:
    from relfv.figures.images import caption, cross

    q_ids, targets = document["q_ids"], document["targets"]
    layers = {q_id: entry["best_layer"] for q_id, entry in targets.items()}
    delta_p = np.full((len(q_ids), len(q_ids)), np.nan)
    for i, target in enumerate(q_ids):
        if target in targets:
            row = targets[target]["per_layer"][str(layers[target])]
            delta_p[i] = [row[source]["mean_delta_p"] for source in q_ids]
    shown = [called(q_id, names[q_id]) for q_id in q_ids]
    return cross(shown, [layers.get(q_id) for q_id in q_ids], delta_p, caption(settings)).to_bytes()
