"""Comparison of one relation under two models or two settings: what its vector does, prompt by prompt, and which heads
it is made of.

Everything is paired: the same queries under both, so that what makes a query hard falls out of the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relfv.shares import Gap, mean_difference
from relfv.stages.agreement import cosines
from relfv.stages.controls import CONTROLS_FILE
from relfv.stages.function_vector import FV, TOP_HEADS, heads_of
from relfv.stages.scores import AIE, measure_of
from relfv.stages.step6 import EVAL_TRIALS
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated_of
from relfv.stats import clustered_mean, overlap_by_chance, top_k_is_decided
from relfv.store.folder import QidFolder
from relfv.store.formats import finite
from relfv.store.status import QidStatus
from relfv.types import HeadId, WordPair

MEANING = {
    "p": "P of the scored token on zero-shot prompts, with each side's vector at the layer that is best for it",
    "acc": "accuracy of that token, likewise",
    "held_out_share": "share of the gap between zero-shot and clean prompts that is closed, with each query's own "
    "trials left out of means, ranking and choice of layer",
    "heads": "heads that both vectors are made of, beside what two random choices would share; between two models of "
    "one shape heads of one number need have nothing in common",
    "cosine": "of the two function vectors, where the residual streams are equally wide; of two models' vectors it "
    "says nothing unless one was trained from the other",
}
COMPARED = ("p", "acc", "held_out_share")
"""Names of the numbers that are given with their difference and its interval."""


@dataclass(frozen=True)
class Side:
    """A completed q_id under one model and its settings. Arrays are (prompt,), or (prompt, layer)."""

    queries: tuple[tuple[WordPair, int], ...]
    """The query of each prompt, with a number that counts up where one is evaluated several times."""
    clusters: np.ndarray
    p: np.ndarray
    acc: np.ndarray
    p_zero_shot: np.ndarray
    layer: int
    n_layers: int
    heads: frozenset[HeadId]
    decided: bool
    """Whether the scores say which heads are the best k: no tie at the end of the list."""
    swept: frozenset[HeadId]
    vector: np.ndarray
    controls: dict[str, np.ndarray] | None
    """``zero`` and ``clean`` (prompt,), ``held_out`` and ``score`` (prompt, layer); None where the extras were left
    out."""


def side_of(status: QidStatus) -> Side:
    """Read the files of a completed q_id. Raises RelfvError for those that are not as relfv writes them."""
    qid = QidFolder(status.artifacts_dir, status.q_id)
    scored, heads = qid.read(AIE), heads_of(qid.read(TOP_HEADS))
    trials, overall = evaluated_of(qid.read(ZERO_SHOT_TRIALS), status.settings), qid.read(STEP6_SUMMARY)
    rows = qid.read(EVAL_TRIALS, overall["best_layer"])
    columns = {name: np.array([row[name] for row in rows]) for name in ("p_with", "p_base", "accuracy_with")}
    seen: Counter[WordPair] = Counter()
    queries = []
    for question in trials.questions:
        queries.append((question.query, seen[question.query]))
        seen[question.query] += 1
    return Side(
        queries=tuple(queries),
        clusters=np.array(trials.clusters),
        p=columns["p_with"],
        acc=columns["accuracy_with"].astype(np.float64),
        p_zero_shot=columns["p_base"],
        layer=overall["best_layer"],
        n_layers=len(overall["expected_layers"]),
        heads=frozenset(heads),
        decided=top_k_is_decided(np.array([head.scores[status.settings.score_key] for head in scored]), len(heads)),
        swept=frozenset(head.id for head in scored),
        vector=qid.read(FV),
        controls=_controls(qid, measure_of(status.settings.score_key)) if qid.has(CONTROLS_FILE) else None,
    )


def _controls(qid: QidFolder, measure: str) -> dict[str, np.ndarray] | None:
    prompts = qid.read(CONTROLS_FILE)["by_prompt"]
    if "p_held_out" not in prompts:  # all trials have one query
        return None
    by_layer = {
        name: np.array([prompts[key][layer] for layer in prompts[key]], dtype=np.float64).T
        for name, key in (("held_out", "p_held_out"), ("score", f"{measure}_held_out"))
    }
    return {"zero": np.array(prompts["p_zero_shot"]), "clean": np.array(prompts["p_clean"]), **by_layer}


def compare(one: Side, other: Side) -> dict[str, Any]:
    """The comparison of ``other`` with ``one`` over the queries that both evaluate: for each of COMPARED the values,
    their difference and its interval; heads and vectors. None stands for what there is no way to know."""
    at = {query: i for i, query in enumerate(other.queries)}
    pairs = [(i, at[query]) for i, query in enumerate(one.queries) if query in at]
    here, there = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
    clusters = one.clusters[here]
    shared = {one.queries[i][0].input for i in here}
    found: dict[str, Any] = {
        "n_queries": len(set(clusters.tolist())),
        "n_queries_of_one_alone": len({pair.input for pair, _ in (*one.queries, *other.queries)} - shared),
        "p_zero_shot_a": _mean(one.p_zero_shot[here]),
        "p_zero_shot_b": _mean(other.p_zero_shot[there]),
        "best_layer_a": one.layer,
        "best_layer_b": other.layer,
    }
    for measure in ("p", "acc"):
        found |= _paired(measure, getattr(one, measure)[here], getattr(other, measure)[there], clusters)
    found |= _shares(one, other, here, there, clusters)
    return {**found, **_heads(one, other), "cosine": _cosine(one.vector, other.vector)}


def _paired(measure: str, one: np.ndarray, other: np.ndarray, clusters: np.ndarray) -> dict[str, float | None]:
    if not len(one):
        return _named(measure, None, None, None, None, None)
    mean = clustered_mean((other - one)[:, None], clusters.tolist())
    ends = (finite(float(end[0])) for end in (mean.mean, mean.low, mean.high))
    return _named(measure, float(one.mean()), float(other.mean()), *ends)


def _shares(
    one: Side, other: Side, here: np.ndarray, there: np.ndarray, clusters: np.ndarray
) -> dict[str, float | None]:
    closed = [_closed(side, rows, clusters) for side, rows in ((one, here), (other, there))]
    if closed[0] is None or closed[1] is None:
        a, b = (None if by_query is None else float(by_query.mean()) for by_query in closed)
        return _named("held_out_share", a, b, None, None, None)
    ends = mean_difference(closed[0], closed[1])
    return _named("held_out_share", float(closed[0].mean()), float(closed[1].mean()), *ends)


def _closed(side: Side, rows: np.ndarray, clusters: np.ndarray) -> np.ndarray | None:
    """(query,): what each query adds to the held-out share; None where there is no gap to have a share of."""
    if side.controls is None or not len(rows):
        return None
    of = {name: values[rows] for name, values in side.controls.items()}
    gap = Gap(of["zero"], of["clean"], clusters.tolist())
    return gap.closed_by_query(of["held_out"] - of["zero"][:, None], of["score"])


def _named(measure: str, *values: float | None) -> dict[str, float | None]:
    columns = (f"{measure}_a", f"{measure}_b", f"{measure}_difference", f"{measure}_low", f"{measure}_high")
    return dict(zip(columns, values, strict=True))


def _heads(one: Side, other: Side) -> dict[str, Any]:
    """Numbers of heads on each side, and of shared ones only where both chose among the same heads, by their scores."""
    names = ("n_heads_shared", "n_heads_a", "n_heads_b", "n_heads_shared_by_chance", "p_value_of_shared")
    sizes = len(one.heads), len(other.heads)
    if one.swept != other.swept or one.n_layers != other.n_layers or not (one.decided and other.decided):
        return dict(zip(names, (None, *sizes, None, None), strict=True))
    shared = len(one.heads & other.heads)
    return dict(zip(names, (shared, *sizes, *overlap_by_chance(shared, *sizes, len(one.swept))), strict=True))


def _cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    if one.shape != other.shape:
        return None
    return finite(cosines(np.stack([one, other]))[0, 1])


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def over_q_ids(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over relations of each difference, with the interval that their spread gives (Student's t); None where
    there are fewer than two."""
    found: dict[str, Any] = {}
    for measure in COMPARED:
        known = [row for row in rows if row[f"{measure}_difference"] is not None]
        if len(known) < 2:
            found |= _named(measure, None, None, None, None, None)
            continue
        a, b = (np.array([row[f"{measure}_{side}"] for row in known]) for side in "ab")
        found |= _paired(measure, a, b, np.arange(len(known)))
    return found
