"""All relations together, beside the q_ids' folders: what the files of finished q_ids
give, put into aggregate.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from relfv.errors import RunError
from relfv.stages.ability import RULE, majority_accuracy, p_by_majority, why_not
from relfv.stages.function_vector import FV, STEP_E_EVAL, TOP_HEADS, heads_of
from relfv.stages.left_out_relation import MEANING as LEFT_OUT_MEANING
from relfv.stages.left_out_relation import over_targets
from relfv.stages.means import MEANS
from relfv.stages.over_relations import AVERAGED, OverRelations, RelationResults
from relfv.stages.scores import CIE
from relfv.stages.similarity import SIMILARITIES, agreement, similarities
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.stats import FDR, called_at_once
from relfv.store.files import sha256_file
from relfv.store.folder import File, QidFolder
from relfv.store.formats import SEAL, csv_bytes, finite, read_json, unsealed
from relfv.types import HeadId

MEANING = {
    "relations": f"a relation counts where {RULE}; why_not says why it does not, and such a one is left out unless "
    "--all keeps it",
    "heads": "AIE: the mean of each head's score over the relations, each counting once; intervals are Student's t "
    "over relations, p-values flip the signs of whole relations, of signed effects even where heads are "
    "ranked by absolute ones; in_top_k is the share of resamples of the relations "
    "in which the head is among the top k, n_in_own_top the number of relations whose own top heads it is one of",
    "left_out": "heads chosen by the other relations' AIE",
    **{f"left_out.{name}": words for name, words in LEFT_OUT_MEANING.items()},
    "similarity": "; ".join(f"{name}: {words}" for name, words in SIMILARITIES.items())
    + "; of all but the last the mean over relations is taken away first",
    "agreement": "Spearman's correlation of two of these over pairs of relations, and its one-sided p-value over "
    "orders of the relations (Mantel)",
}


def measured(qid: QidFolder, name: str) -> RelationResults:
    """The numbers of one finished relation, from its files."""
    trials, clean = qid.read(TRIALS), qid.read(STEP_E_EVAL)["reference"]["clean"]
    return RelationResults(
        name=name,
        scored=tuple(sorted(qid.read(CIE), key=lambda head: head.id)),
        top=tuple(heads_of(qid.read(TOP_HEADS))),
        clean_acc=clean["acc"],
        majority_acc=majority_accuracy(trials),
        n_trials=len(trials.questions),
        n_queries=len(set(trials.clusters)),
        vector=qid.read(FV),
        means=qid.read(MEANS).values,
        answers=frozenset(question.target.token_id for question in trials.questions),
    )


def describe_relations(
    relations: Sequence[RelationResults], names: Mapping[str, str], included: Collection[str]
) -> dict[str, Any]:
    """q_id -> whether the relation is included, and its numbers; ``names`` has each relation in words, where there are
    some."""
    return {
        one.name: {
            "name": names[one.name],
            "included": one.name in included,
            "why_not": why_not(one),
            "clean_acc": one.clean_acc,
            "majority_acc": one.majority_acc,
            "p_by_majority": p_by_majority(one),
            "n_trials": one.n_trials,
            "n_queries": one.n_queries,
        }
        for one in relations
    }


def describe_heads(heads: OverRelations, n_relations: int) -> dict[str, Any]:
    """The universal heads, and how stable their list is under resampling of the relations."""
    at, stable = {head.id: i for i, head in enumerate(heads.scored)}, heads.stability
    return {
        "n_heads": len(heads.scored),
        "n_called": int((heads.fdr <= FDR).sum()),
        "fdr_level": FDR,
        "n_called_at_once": called_at_once(len(heads.scored), n_relations),
        "half_overlap": finite(stable.half_overlap),
        "chance_overlap": stable.chance_overlap,
        "n_resamples": stable.n_bootstrap,
        "universal": [
            {"layer": head.id.layer, "head": head.id.head, "aie": head.scores[heads.score_key], **_errors(heads, i)}
            for head in heads.ranked[: heads.k]
            for i in [at[head.id]]
        ],
    }


def _errors(heads: OverRelations, i: int) -> dict[str, Any]:
    return {
        "se": finite(heads.se[i]),
        "ci_low": finite(heads.low[i]),
        "ci_high": finite(heads.high[i]),
        "p_value": float(heads.p_value[i]),
        "fdr": float(heads.fdr[i]),
        "in_top_k": float(heads.stability.in_top_k[i]),
        "n_positive": int(heads.n_positive[i]),
        "n_in_own_top": int(heads.n_in_own_top[i]),
    }


def describe_similarity(relations: Sequence[RelationResults], heads: OverRelations) -> dict[str, Any]:
    """Matrices by name, None where a number is not known, and how they agree."""
    matrices = similarities(relations, heads.universal, heads.score_key)
    return {
        "order": [one.name for one in relations],
        "matrices": {
            name: [[finite(value) for value in row] for row in matrix.tolist()] for name, matrix in matrices.items()
        },
        "agreement": agreement(matrices),
    }


def describe_left_out(targets: Mapping[str, Any], waiting: Sequence[str]) -> dict[str, Any]:
    """The entry on left-out relations: ``targets`` by name as ``leave_out`` gives them; ``waiting`` are those still to
    be made."""
    return {"targets": dict(targets), "waiting": list(waiting), "over_relations": over_targets(targets.values())}


def aie_bytes(heads: OverRelations, n_relations: int) -> bytes:
    """aggregate_aie.csv: a row a head, best first; means over relations, then what is known of the score key's."""
    order = {head.id: i for i, head in enumerate(heads.scored)}
    errors = {head: _errors(heads, i) for head, i in order.items()}
    names = [f"{heads.score_key}_{name}" for name in ("se", "ci_low", "ci_high", "p_value", "fdr")]
    rows = [
        [
            *(str(value) for value in (head.id.layer, head.id.head, n_relations, head.n_trials)),
            *(repr(head.scores[name]) for name in AVERAGED),
            *("inf" if value is None else repr(value) for value in errors[head.id].values()),
        ]
        for head in heads.ranked
    ]
    header = ["layer", "head", "n_qid", "n_trials", *AVERAGED, *names, "in_top_k", "n_positive", "n_in_own_top"]
    return csv_bytes([header, *rows])


# --- files, beside the q_ids' folders --------------------------------------------------------------------------------

AGGREGATE, AGGREGATE_CSV = "aggregate.json", "aggregate_aie.csv"
HEATMAP_FIGURE, SIMILARITY_FIGURE = "aggregate_aie.png", "aggregate_similarity.png"
_READ: tuple[File[Any], ...] = (TRIALS, MEANS, CIE, TOP_HEADS, FV, STEP_E_EVAL, ZERO_SHOT_TRIALS, STEP6_SUMMARY)
_READ_BY_TARGET: tuple[File[Any], ...] = (MEANS, TOP_HEADS, ZERO_SHOT_TRIALS, STEP6_SUMMARY)


def relation_origin(root: Path, name: str, files: Sequence[File[Any]] = _READ) -> dict[str, str | None]:
    """The sha256 of the files of the q_id at ``root / name`` that its numbers rest on, by their names in ``root``;
    None where one is missing."""
    qid = QidFolder(root / name / "artifacts", Path(name).name)
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in map(qid.path, files)}


def target_origin(root: Path, name: str, others: Sequence[HeadId], algorithm_version: int) -> dict[str, Any]:
    """Record of what the numbers of a left-out relation rest on: its files, the others' heads, the algorithm's
    version."""
    return {
        "files": relation_origin(root, name, _READ_BY_TARGET),
        "heads_of_the_others": [[head.layer, head.head] for head in others],
        "algorithm_version": algorithm_version,
    }


def read_aggregate(root: Path) -> dict[str, Any]:
    """The document that ``relfv aggregate`` wrote, without its own hash. Raises RunError if it is missing or not as it
    was written."""
    path = root / AGGREGATE
    content = read_json(path)
    expected = {SEAL, "verdict", "relations", "heads", "left_out", "similarity", "made_from", "beside"}
    sound = isinstance(content, dict) and expected <= content.keys()
    # A name is a path below the folder, and leads nowhere else.
    if not sound or any(".." in Path(name).parts or Path(name).is_absolute() for name in content["relations"]):
        raise RunError(f"{path}: is damaged or not a file of relfv aggregate")
    return unsealed(content, path)


def aggregate_problems(root: Path, document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """-> (files beside it that are missing or not as they were written; what it was made from and is another now)."""
    damaged = [name for name, digest in document["beside"].items() if sha256_file(root / name) != digest]
    changed = [
        f"made from another {name}"
        for relation in document["relations"]
        for name, digest in relation_origin(root, relation).items()
        if document["made_from"].get(name) != digest
    ]
    return damaged, changed
