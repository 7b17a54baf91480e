"""Agreement of vectors, lists of heads and scores that were made several times: means over all pairs, with errors that
count what was made, not pairs.

Ten pairs of five draws are no ten observations: each draw is in four of them. So the interval is a jackknife that
leaves out one draw with all its pairs (Arvesen 1969, for means over pairs). For cosines and correlations it is made on
Fisher's scale, artanh, where it cannot pass 1. Its error is too large rather than too small on average (Efron & Stein
1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relfv.stats import LEVEL, overlap_by_chance, top_k_is_decided
from relfv.types import HeadId

_NEARLY_ONE = 1 - 1e-12
"""Largest cosine or correlation put into artanh, which is infinite at 1; copies of one vector have a cosine of 1."""


@dataclass(frozen=True)
class PairsMean:
    """A mean over all pairs of several draws."""

    mean: float
    low: float | None
    """Lower end of the interval at LEVEL; None for two draws, whose one pair leaves nothing to judge by."""
    high: float | None
    lowest: float
    """Smallest value of all pairs."""
    highest: float
    n_draws: int


def mean_of_pairs(matrix: np.ndarray, most: int | None = None) -> PairsMean | None:
    """Mean above the diagonal of a symmetric ``matrix`` (draw, draw) of correlations, or of counts of at ``most`` that
    many, with its jackknife interval. None where there is no pair, or a pair is not finite."""
    n = len(matrix)
    pairs = matrix[np.triu_indices(n, 1)]
    if n < 2 or not np.isfinite(pairs).all():
        return None
    mean, lowest, highest = float(pairs.mean()), float(pairs.min()), float(pairs.max())
    if n < 3:
        return PairsMean(mean, None, None, lowest, highest, n)
    from scipy import stats

    of_each = matrix.sum(1) - np.diag(matrix)
    means = np.array([mean, *(pairs.sum() - of_each) / (len(pairs) - (n - 1))])
    if most is None:
        means = np.arctanh(np.clip(means, -_NEARLY_ONE, _NEARLY_ONE))
    se = np.sqrt((n - 1) / n * np.sum((means[1:] - means[1:].mean()) ** 2))
    ends = means[0] + np.array([-1, 1]) * stats.t.ppf(0.5 + LEVEL / 2, n - 1) * se
    low, high = (np.tanh(ends) if most is None else np.clip(ends, 0, most)).tolist()
    return PairsMean(mean, low, high, lowest, highest, n)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """float64 (vector, vector) of ``vectors`` (vector, dim); NaN with one of zeros."""
    exact = vectors.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = exact / norms[:, None]
    return np.clip(unit @ unit.T, -1, 1)


def rank_correlations(scores: np.ndarray) -> np.ndarray:
    """float64 (list, list): Spearman's, of ``scores`` (list, head), ties at their mean rank; NaN with a list of equal
    scores."""
    from scipy import stats

    ranks = stats.rankdata(scores, axis=1)
    return cosines(ranks - ranks.mean(1, keepdims=True))


def shared_heads(lists: Sequence[Sequence[HeadId]]) -> np.ndarray:
    """float64 (list, list): how many heads two lists have in common."""
    return np.array([[len({*one} & {*other}) for other in lists] for one in lists], dtype=np.float64)


def by_chance(shared: np.ndarray, k: int, n_heads: int) -> tuple[float, float]:
    """-> (how many of ``n_heads`` two random lists of ``k`` share, p-value that all lists are random).

    Each pair has its hypergeometric p-value. The pairs depend on each other, and twice the mean of p-values is one
    whatever their dependence (Rüschendorf 1982; Vovk & Wang 2020).
    """
    pairs = shared[np.triu_indices(len(shared), 1)].astype(int).tolist()
    p_value_of = {n: overlap_by_chance(n, k, k, n_heads)[1] for n in sorted({*pairs})}
    mean = float(np.mean([p_value_of[n] for n in pairs]))
    return k * k / n_heads, mean if len(pairs) == 1 else min(1.0, 2 * mean)


def common_by_chance(n_common: int, n_lists: int, k: int, n_heads: int) -> tuple[float, float]:
    """-> (how many of ``n_heads`` so many random lists of ``k`` all share on average, P that it is ``n_common`` or
    more): each list in turn takes a hypergeometric number of those that are left."""
    from scipy import stats

    counts = np.arange(k + 1)
    chance = (counts == k).astype(np.float64)
    for _ in range(n_lists - 1):
        chance = np.sum([chance[left] * stats.hypergeom.pmf(counts, n_heads, left, k) for left in counts], axis=0)
    return float(n_heads * (k / n_heads) ** n_lists), float(min(1.0, np.sum(chance[n_common:])))


def agreement(
    vectors: np.ndarray, heads: Sequence[Sequence[HeadId]], scores: np.ndarray
) -> dict[str, dict[str, Any] | None]:
    """How alike two or more draws are: cosine of their ``vectors`` (draw, resid_dim), how many of their top ``heads``
    they share, and Spearman's correlation of the ``scores`` (draw, head) of all heads. Lists that scores do not decide
    share nothing that could be told from chance: None."""
    shared, k = shared_heads(heads), len(heads[0])
    expected, p_value = by_chance(shared, k, scores.shape[1])
    decided = all(top_k_is_decided(of_draw, k) for of_draw in scores)
    of = {
        "cosine": mean_of_pairs(cosines(vectors)),
        "heads_shared": mean_of_pairs(shared, most=k) if decided else None,
        "spearman": mean_of_pairs(rank_correlations(scores)),
    }
    found = {name: vars(mean) if mean else None for name, mean in of.items()}
    return {**found, "heads_by_chance": {"mean": expected, "p_value": p_value if decided else None}}
