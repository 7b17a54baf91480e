"""The spec's quantities over the trials whose clean prompt is answered right, beside those over all: an effect on the P
of an answer that the model does not know says little of how it does the relation.

Which heads are the top ones, their means and the vector stay those of all trials. What this stratum can and cannot
tell: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relfv.stats import clustered_mean
from relfv.store.formats import finite
from relfv.types import HeadId
from relfv.words import ci

MIN_QUERIES = 6
"""Smallest number of queries for which numbers are given: with fewer, no flips of their signs give a two-sided p-value
of 0.05, and a t interval rests on a guess at its shape."""

Numbers = Mapping[str, Any]


def answered_right(
    right: Sequence[int],
    clusters: Sequence[int],
    effects: np.ndarray,
    heads: Sequence[HeadId],
    rows: Sequence[Numbers],
    clusters_of_rows: Sequence[int],
) -> dict[str, Any]:
    """The numbers on trials answered right for summary.json. ``right`` (trial,): 1 where the clean prompt is answered
    right; ``effects`` (trial, head): delta P of the top ``heads``; ``rows`` are eval_trials.jsonl of one layer, with
    their queries.

    A zero-shot prompt belongs to the stratum if its query is answered right in half of its clean prompts or more.
    """
    chosen, of_trial, of_row = np.asarray(right, dtype=bool), np.asarray(clusters), np.asarray(clusters_of_rows)
    known = [query for query in set(clusters) if chosen[of_trial == query].mean() >= 0.5]
    rows_of_known = [row for row, query in zip(rows, clusters_of_rows, strict=True) if query in known]
    effects = np.column_stack([effects.mean(1), effects])
    of_all, own = _intervals(effects, of_trial), _intervals(effects[chosen], of_trial[chosen])
    return {
        "n_trials": int(chosen.sum()),
        "n_queries": len({*of_trial[chosen].tolist()}),
        "min_queries": MIN_QUERIES,
        "top_heads": {"all": of_all[0], "answered_right": own[0]},
        "heads": [{**vars(head), "answered_right": of} for head, of in zip(heads, own[1:], strict=True)],
        "step6": {
            "all": _of_rows(rows, of_row),
            "answered_right": _of_rows(rows_of_known, of_row[np.isin(of_row, known)]),
        },
    }


def _intervals(values: np.ndarray, clusters: np.ndarray) -> list[dict[str, Any] | None]:
    """Mean and interval of each column of ``values`` (trial, column); None for too few queries."""
    if len({*clusters.tolist()}) < MIN_QUERIES:
        return [None] * values.shape[1]
    found = clustered_mean(values, clusters.tolist())
    return [
        {"mean_delta_p": finite(mean), "ci_low": finite(low), "ci_high": finite(high)}
        for mean, low, high in zip(found.mean, found.low, found.high, strict=True)
    ]


def _of_rows(rows: Sequence[Numbers], clusters: np.ndarray) -> dict[str, Any]:
    """Numbers of some zero-shot ``rows``: means without and with the vector, as eval_summary.json has them of all rows,
    and the interval of the change in P."""
    n = {"n_eval": len(rows), "n_queries": len({*clusters.tolist()})}
    (change,) = _intervals(np.array([[row["delta_p"]] for row in rows], dtype=np.float64).reshape(-1, 1), clusters)
    if change is None:
        return n
    means = {
        f"{mean}_{half}": float(np.mean([row[f"{key}_{half}"] for row in rows]))
        for mean, key in (("acc", "accuracy"), ("mean_p", "p"))
        for half in ("base", "with")
    }
    return {**n, **means, **change}


def stratum_sentence(numbers: Numbers) -> str:
    """Sentence of the verdict on the stratum; empty where it is all trials."""
    of, able = numbers["answered_right"], numbers["ability"]
    n, n_all = of["n_trials"], able["n_trials"]
    if n == n_all:
        return ""
    words = f"Of {n_all} clean prompts {n} are answered right ({of['n_queries']} of {able['n_queries']} queries)"
    heads, step6 = of["top_heads"], of["step6"]
    if not heads["answered_right"]:
        return f"{words}: too few for numbers of their own." if n else ""
    said = f"{words}: over those the top heads' mean CIE is {_beside(heads)}"
    if "mean_delta_p" in step6["answered_right"]:
        said += f"; the vector changes P of the {step6['answered_right']['n_eval']} zero-shot prompts of queries "
        said += f"answered right by {_beside(step6)}"
    return f"{said}."


def _beside(of: Numbers) -> str:
    own, every = of["answered_right"], of["all"]
    ends = ci(own["ci_low"], own["ci_high"], "{:+.3f}".format)
    return f"{own['mean_delta_p']:+.3f} ({ends}), over all {every['mean_delta_p']:+.3f}"
