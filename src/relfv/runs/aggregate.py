"""``relfv aggregate``: results of all relations of a finished tree together.

All but leaving one relation out comes from files; that is kept while what it was made from is what it was, and if
nothing of it is missing, the model is never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv import ALGORITHM_VERSION
from relfv.errors import InputError
from relfv.logs import show
from relfv.relations import called
from relfv.report.page import write_pages
from relfv.report.registered import excluded_in
from relfv.runs.joint import Joint, found_earlier, only_command
from relfv.runs.qid import open_for, work_on
from relfv.runs.several import completed_q_ids, require_alike, shared_settings
from relfv.settings import Settings
from relfv.stages.ability import why_not
from relfv.stages.aggregate import (
    AGGREGATE,
    AGGREGATE_CSV,
    HEATMAP_FIGURE,
    MEANING,
    SIMILARITY_FIGURE,
    aie_bytes,
    describe_heads,
    describe_left_out,
    describe_relations,
    describe_similarity,
    measured,
    read_aggregate,
    relation_origin,
    target_origin,
)
from relfv.stages.aggregate_verdict import verdict
from relfv.stages.cross import CROSS_SETTINGS
from relfv.stages.left_out_relation import leave_out
from relfv.stages.means import MEANS
from relfv.stages.over_relations import OverRelations, heads_of_the_others, over_relations
from relfv.stages.similarity import IN_WORDS
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import evaluated_prompts
from relfv.stats import LEVEL
from relfv.store.files import require_no_links
from relfv.store.folder import QidFolder
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)


def aggregate(
    root: Path,
    q_list: Sequence[str] | None,
    overlay: Callable[[Settings], Settings],
    *,
    keep_all: bool = False,
    no_model: bool = False,
) -> int:
    """Aggregate the completed q_ids of ``root``, a relation's folder or one that holds several, or those of ``q_list``;
    ``overlay`` puts the command's flags over the settings that they were made with. ``keep_all`` counts relations that
    the model cannot do, too; with ``no_model`` what needs the model and is not there is left out. Returns the exit
    code.

    Raises InputError for fewer than two relations to count, damaged ones, and ones made with other settings.
    """
    for ours in (AGGREGATE, AGGREGATE_CSV, HEATMAP_FIGURE, SIMILARITY_FIGURE, ".locks", "report"):
        require_no_links(root / ours, below=root)
    statuses = _not_excluded(root, completed_q_ids(root, q_list, below=True))
    require_alike(root, statuses)
    with only_command("aggregate", root / AGGREGATE):
        together = _Together(root, statuses, keep_all=keep_all)
        together.write_if_changed()
        if together.waiting and not no_model:
            settings = shared_settings(root, statuses, overlay)
            together.judge_waiting(open_for(settings))
    log.info("%s", together.document()["verdict"])
    log.info("report: %s", write_pages(root))
    show(root / AGGREGATE)
    return 0


def _not_excluded(root: Path, statuses: Mapping[str, QidStatus]) -> dict[str, QidStatus]:
    """The q_ids that the plan registered for their relation (``relfv run --plan``) does not exclude."""
    reasons = {name: excluded_in(of.artifacts_dir.parent.parent).get(of.q_id) for name, of in statuses.items()}
    for name, why in reasons.items():
        if why:
            log.info("left out: %s, excluded by the registered plan: %s", name, why)
    kept = {name: status for name, status in statuses.items() if not reasons[name]}
    if len(kept) < 2:
        raise InputError(
            f"{root}: {len(kept)} completed q_id(s) besides those that the registered plan excludes; expected at least "
            "two, so run more with 'relfv run'"
        )
    return kept


class _Together(Joint):
    """The relations of one tree. A target is a relation that is left out."""

    hashes, doing = "beside", "heads of the other relations"

    def __init__(self, root: Path, statuses: Mapping[str, QidStatus], *, keep_all: bool) -> None:
        self.path, self._statuses, self._all = root / AGGREGATE, statuses, keep_all
        self._settings = next(iter(statuses.values())).settings
        relations = [measured(QidFolder(of.artifacts_dir, of.q_id), name) for name, of in statuses.items()]
        cannot = {one.name: why for one in relations if (why := why_not(one))}
        for name, why in cannot.items():
            log.info("%s %s: %s", name, "counted all the same" if keep_all else "left out", why)
        counted = [one for one in relations if keep_all or one.name not in cannot]
        if len(counted) < 2:
            raise InputError(
                f"{root}: {len(counted)} of {len(relations)} relations are ones that the model can do "
                f"({'; '.join(f'{name}: {why}' for name, why in cannot.items())}); expected at least two, so run "
                "more, or keep them by --all"
            )
        self._relations, self._counted = relations, counted
        self._heads = over_relations(counted, self._settings.score_key, self._settings.topk)
        self._others = {
            one.name: heads_of_the_others(counted, one.name, self._settings.score_key, self._settings.topk)
            for one in counted
        }
        self._made_from = {name: sha for one in relations for name, sha in relation_origin(root, one.name).items()}
        self._similarity = describe_similarity(counted, self._heads)
        found = found_earlier(self.path, read_aggregate)
        origins = {name: target_origin(root, name, heads, ALGORITHM_VERSION) for name, heads in self._others.items()}
        super().__init__(found, found["left_out"]["targets"] if found else {}, origins)

    def _tell(self, name: str, seconds: float) -> None:
        log.info("%s left out in %.1f s", name, seconds)

    def _judged(self, model: LanguageModel, name: str) -> dict[str, Any]:
        work = work_on(self._statuses[name], lambda: model)
        own = next(one for one in self._counted if one.name == name)
        prompts, facts = work.once(evaluated_prompts), model.facts()
        found = leave_out(
            model,
            prompts,
            work.read(MEANS),
            own.top,
            self._others[name],
            [head.id for head in own.scored],
            work.read(STEP6_SUMMARY)["best_layer"],
            work.settings.alpha,
            seed=f"{work.settings.seed}:{work.q_id}",
        )
        shared = len({*own.top} & {*self._others[name]})
        return {
            "made_from": self._origins[name],
            "made_by": {key: facts[key] for key in ("engine", "device", "dtype")},
            "n_eval": len(prompts),
            "n_queries": len(set(prompts.clusters)),
            "n_heads_shared_with_own": shared,
            **found,
        }

    def document(self) -> dict[str, Any]:
        """The content of aggregate.json but for hashes; relations in their folders' order."""
        first = next(iter(self._statuses.values()))
        names = {name: status.name for name, status in self._statuses.items()}
        included = {one.name for one in self._counted}
        found = {
            "root": self.path.parent.resolve().name,
            "meaning": MEANING,
            "model": first.settings.model,
            **{name: first.fingerprint_fields[name] for name in CROSS_SETTINGS},
            "score_key": self._settings.score_key,
            "k": self._heads.k,
            "alpha": self._settings.alpha,
            "ci_level": LEVEL,
            "all": self._all,
            "relations": describe_relations(self._relations, names, included),
            "heads": describe_heads(self._heads, len(self._counted)),
            "left_out": describe_left_out(self.done, self.waiting),
            "similarity": self._similarity,
            "made_from": self._made_from,
        }
        return {"verdict": verdict(found), **found}

    def _beside(self, document: Mapping[str, Any]) -> dict[str, bytes]:
        return self._table_and_figures

    @cached_property
    def _table_and_figures(self) -> dict[str, bytes]:
        """The files beside aggregate.json, which leaving a relation out does not change."""
        return {
            AGGREGATE_CSV: aie_bytes(self._heads, len(self._counted)),
            **_figures(self._heads, self._similarity, [self._statuses[one.name] for one in self._counted]),
        }


def _figures(heads: OverRelations, alike: Mapping[str, Any], statuses: Sequence[QidStatus]) -> dict[str, bytes]:
    from relfv.figures.images import Heatmap, caption, heatmaps
    from relfv.figures.relations import similarity

    about = caption(statuses[0].settings)
    title = f"AIE of every head over {len(statuses)} relations (top {heads.k} framed)"
    shown = Heatmap(heads.scored, heads.ranked[: heads.k], "")
    names = [called(name, of.name) for name, of in zip(alike["order"], statuses, strict=True)]
    matrices = {name: np.array(matrix, dtype=np.float64) for name, matrix in alike["matrices"].items()}
    return {
        HEATMAP_FIGURE: heatmaps([shown], heads.score_key, title, about).to_bytes(),
        SIMILARITY_FIGURE: similarity(names, {IN_WORDS[name]: of for name, of in matrices.items()}, about).to_bytes(),
    }
