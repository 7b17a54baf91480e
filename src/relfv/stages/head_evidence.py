"""The entries of top_heads.json on a head beside its score: how sure it is, how large, and what these trials could have
found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from relfv.shares import MIN_GAP
from relfv.stats import FDR, POWER, called_at_once, detectable_mean
from relfv.store.formats import finite
from relfv.types import ScoredHead

_COLUMNS = ("ci_low", "ci_high", "p_value", "fdr", "queries_behind_half")


def head_entry(head: ScoredHead, score_key: str) -> dict[str, Any]:
    """The entry of a head: which head, and its scores."""
    return {
        "layer": head.id.layer,
        "head": head.id.head,
        "score_key": score_key,
        "rank_score": head.scores[score_key],
        "mean_delta_p": head.scores["mean_delta_p"],
        "mean_delta_logprob": head.scores["mean_delta_logprob"],
        "n_trials": head.n_trials,
    }


def evidence_of_head(head: ScoredHead, noise: float, share_in_top_k: float | None, p_clean: float) -> dict[str, Any]:
    """The evidence on a head's score: its interval, p-values and the like; ``p_clean`` is the mean P of clean prompts.
    Scores of other tools may come without these columns; then they are left out."""
    evidence: dict[str, Any] = {
        column: finite(head.scores[column])
        for column in (f"mean_delta_p_{name}" for name in _COLUMNS)
        if column in head.scores
    }
    if evidence:
        called = head.scores["mean_delta_p_fdr"] <= FDR and abs(head.scores["mean_delta_p"]) > noise
        evidence["distinguishable"] = called
    if "mean_p_base" in head.scores:
        gap = p_clean - head.scores["mean_p_base"]
        evidence["share_of_clean_minus_corrupted"] = head.scores["mean_delta_p"] / gap if gap >= MIN_GAP else None
    if share_in_top_k is not None:
        evidence["in_top_k"] = share_in_top_k
    return evidence


def evidence_of_list(
    top: Sequence[ScoredHead], called: Sequence[bool], n_heads: int, clusters: Sequence[int]
) -> dict[str, Any]:
    """How many of the ``top`` heads are ``called``, how many of ``n_heads`` must be for any to be, and the smallest
    mean_delta_p that is found with probability POWER in a head whose effect differs from query to query as theirs do:
    tested alone, and among all."""
    n_queries = len(set(clusters))
    at_once = called_at_once(n_heads, n_queries)
    numbers: dict[str, Any] = {
        "n_distinguishable": sum(called),
        "fdr_level": FDR,
        "n_queries": n_queries,
        "n_called_at_once": at_once,
    }
    if all("mean_delta_p_se" in head.scores for head in top):
        se = float(np.median([head.scores["mean_delta_p_se"] for head in top]))
        # Benjamini and Hochberg call the n smallest p-values if these are at most n * FDR / heads.
        among_all = FDR * max(sum(called), at_once, 1) / n_heads
        numbers["detectable_mean_delta_p"] = {
            "power": POWER,
            "se": finite(se),
            "alone": finite(detectable_mean(se, clusters, FDR)) if se else None,
            "among_all": finite(detectable_mean(se, clusters, among_all)) if se and at_once <= n_heads else None,
        }
    return numbers
