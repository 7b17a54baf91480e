"""Statistics of a mean over trials: intervals, false-discovery control, stability of a ranking.

25 trials draw their query from as few as ten rows, and trials that share a query are no independent observations. So
everything here counts *queries* (clusters), not trials. Formulas, assumptions and sources: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEVEL = 0.95
"""Confidence level of every interval."""
FDR = 0.05
"""Expected share of false ones among the heads that are called distinguishable from noise."""
N_FLIPS = 20_000
"""Largest number of sign flips by query that are tried: all there are for up to 14 queries, else this many, at
random."""
POWER = 0.8
"""Probability of finding an effect that is called large enough to be found."""
FEW_QUERIES = 2
"""Number of queries: a mean of which half comes from so few says little of the next query."""


@dataclass(frozen=True)
class ClusteredMean:
    """Means over trials with errors clustered by query; arrays are (column,)."""

    mean: np.ndarray
    se: np.ndarray
    """Standard error: CR2, unbiased for independent trials of equal variance whatever the clusters' sizes."""
    low: np.ndarray
    """Lower end of the interval at ``LEVEL``."""
    high: np.ndarray
    n_clusters: int
    df: float
    """Degrees of freedom of the t distribution: fewer than n_clusters - 1 where clusters differ in size."""


def clustered_mean(values: np.ndarray, clusters: Sequence[int]) -> ClusteredMean:
    """Mean of ``values`` (trial, column) with ``clusters`` (trial,) naming each trial's query.

    With a single cluster nothing is known of the error: infinite intervals.
    """
    values = np.asarray(values, dtype=np.float64)
    sizes, member = _members(clusters)
    n, n_clusters = len(values), len(sizes)
    mean = values.mean(0)
    if n_clusters < 2:
        unknown = np.full(mean.shape, np.inf)
        return ClusteredMean(mean, unknown, mean - unknown, mean + unknown, n_clusters, 0.0)
    residual = member @ (values - mean)
    # A cluster's residuals are too small by its own pull on the mean; CR2 (Bell & McCaffrey 2002) undoes that.
    se = np.sqrt((residual**2 / (1 - sizes / n)[:, None]).sum(0)) / n
    return _with_interval(mean, se, sizes)


def mean_with_left_out(mean: np.ndarray, without: np.ndarray, clusters: Sequence[int]) -> ClusteredMean:
    """``mean`` (column,) over all trials, with the error that ``without`` (cluster, column) shows: for each cluster the
    same estimate from the other clusters alone, everything that it rests on included. Rows in the order of
    ``np.unique(clusters)``, two or more.

    Where the estimate is nothing but a mean over trials this is ``clustered_mean`` to the last digit.
    """
    sizes, _ = _members(clusters)
    se = np.sqrt(((1 - sizes / sizes.sum())[:, None] * (without - mean) ** 2).sum(0))
    return _with_interval(mean, se, sizes)


def _with_interval(mean: np.ndarray, se: np.ndarray, sizes: np.ndarray) -> ClusteredMean:
    from scipy import stats  # takes a second to import, which commands that compute nothing should not cost

    df = _degrees_of_freedom(sizes)
    half = stats.t.ppf(0.5 + LEVEL / 2, df) * se
    return ClusteredMean(mean, se, mean - half, mean + half, len(sizes), df)


def detectable_mean(se: float, clusters: Sequence[int], p_value: float) -> float:
    """The mean over trials that would have a two-sided p-value of at most ``p_value`` with probability ``POWER``, where
    its standard error is ``se``: Student's t, two quantiles apart. Infinite for a single cluster."""
    from scipy import stats

    sizes, _ = _members(clusters)
    if len(sizes) < 2:
        return math.inf
    df = _degrees_of_freedom(sizes)
    return float((stats.t.ppf(1 - p_value / 2, df) + stats.t.ppf(POWER, df)) * se)


def _degrees_of_freedom(sizes: np.ndarray) -> float:
    return min(_satterthwaite(sizes, together) for together in (False, True))


def _members(clusters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the clusters (cluster,), and the 0/1 matrix (cluster, trial) of which trial belongs to which."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    member = (index[None] == np.arange(index.max() + 1)[:, None]).astype(np.float64)
    return member.sum(1), member


def _satterthwaite(sizes: np.ndarray, together: bool) -> float:
    """Degrees of freedom of the CR2 variance if trials are independent, or if those of a cluster move ``together``.

    The variance is a sum of squares of correlated normal numbers; the chi-square of the same first two moments has
    tr(B)**2 / tr(B B) degrees of freedom, B their covariance.
    """
    n = sizes.sum()
    of_clusters = np.diag(sizes**2 if together else sizes)
    centred = np.eye(len(sizes)) - np.outer(sizes / n, np.ones(len(sizes)))
    weight = 1 / np.sqrt(1 - sizes / n)
    b = weight[:, None] * (centred @ of_clusters @ centred.T) * weight
    return float(np.trace(b) ** 2 / np.sum(b * b))


def cluster_totals(values: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    """Sums of ``values`` (trial, ...) over the trials of each cluster, in the order of ``np.unique(clusters)``."""
    _, member = _members(clusters)
    return np.tensordot(member, np.asarray(values, dtype=np.float64), 1)


@lru_cache(maxsize=4)
def signs(n: int, limit: int = N_FLIPS) -> np.ndarray:
    """float64 (flip, n) of 1 and -1, the first row all 1: every combination where there are at most ``limit``, else
    that one and random ones, always the same."""
    if 2**n <= limit:
        return 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    flips = np.random.default_rng(n).choice([-1.0, 1.0], (limit, n))
    flips[0] = 1
    return flips


def sign_flip_p_values(values: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    """Two-sided p-values (column,) for the hypothesis that the means of ``values`` (trial, column) are 0: the share of
    sign flips, each of whole clusters, that give a mean at least as far from 0 (Fisher 1935).

    Valid where a cluster's sum is as likely to be x as -x, whatever its size and shape. Never below 2 / 2**clusters.
    """
    totals = cluster_totals(values, clusters)
    totals = (totals / np.maximum(np.abs(totals).max(0), 1e-300)).astype(np.float32)  # float32 is twice as fast
    flips = signs(len(totals)).astype(np.float32)
    if len(flips) < N_FLIPS:
        flips = flips[: len(flips) // 2]  # the other half mirrors it
    # Sums that differ only in the order of addition count as equally far from 0.
    limit = np.abs(totals.sum(0)) - np.float32(1e-5)
    as_far = np.zeros(totals.shape[1])
    for start in range(0, len(flips), 500):  # few enough rows to stay in the cache
        sums = flips[start : start + 500] @ totals
        as_far += (np.abs(sums, out=sums) >= limit).sum(0, dtype=np.int16)  # wider integers take three times as long
    return as_far / len(flips)


def best_column_p_value(values: np.ndarray, clusters: Sequence[int], column: int) -> float:
    """One-sided p-value for the hypothesis that the mean of one ``column`` of ``values`` (trial, column), chosen among
    all, is not above 0: the share of sign flips, each of whole clusters, with which some column does as well."""
    totals = cluster_totals(values, clusters)
    # Columns with a mean below 0 are centred: how far they lie below 0 is no noise (Hansen 2005).
    best = (signs(len(totals)) @ (totals - np.minimum(totals.mean(0), 0))).max(1)
    return float((best >= totals[:, column].sum() - 1e-9).mean())


def queries_behind_half(values: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    """int (column,): the fewest clusters whose sums make up half of the mean of ``values`` (trial, column); 0 where
    that is 0."""
    totals = cluster_totals(values, clusters)
    whole = totals.sum(0)
    largest_first = -np.sort(-totals * np.sign(whole), axis=0)
    return np.where(whole == 0, 0, 1 + (largest_first.cumsum(0) < np.abs(whole) / 2).sum(0))


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values: those at most FDR are called, and about that share of them wrongly."""
    from scipy import stats

    return stats.false_discovery_control(p_values, method="bh")


def overlap_by_chance(shared: int, k_one: int, k_other: int, n: int) -> tuple[float, float]:
    """-> (how many of ``n`` two sets of these sizes drawn at random share on average, P that they share ``shared`` or
    more): the hypergeometric distribution."""
    from scipy import stats

    return k_one * k_other / n, float(stats.hypergeom.sf(shared - 1, n, k_one, k_other))


def called_at_once(n_columns: int, n_clusters: int) -> int:
    """How many of ``n_columns`` must have the smallest p-value that flips of ``n_clusters`` signs can give for
    ``false_discovery`` to call them: with few clusters it calls many or none."""
    return math.ceil(n_columns * smallest_p_value(n_clusters) / FDR)


def smallest_p_value(n_clusters: int) -> float:
    """The smallest p-value that flips of ``n_clusters`` signs can give."""
    return max(2 / 2**n_clusters, 1 / N_FLIPS)


@dataclass(frozen=True)
class Stability:
    """Stability of a top-k list under resampling of the queries; arrays are (column,)."""

    in_top_k: np.ndarray
    """Share of bootstrap samples of queries in which the column is among the k best."""
    n_bootstrap: int
    half_overlap: float
    """Mean share of the k that two halves of the queries have in common, over random halvings; NaN for one query,
    and where the columns' means do not say which the k best are.
    No bound on anything where the scores of all trials rest on one estimate, such as a clean mean of all of them."""
    n_halvings: int
    chance_overlap: float
    """Expected share of the k that two lists drawn at random have in common: k / columns."""


def top_k_stability(
    scores: np.ndarray, clusters: Sequence[int], k: int, *, seed: str, n_bootstrap: int = 1000, n_halvings: int = 200
) -> Stability:
    """Rank columns of ``scores`` (trial, column) by their mean over resampled queries. The result is the same for the
    same ``seed``."""
    sizes, member = _members(clusters)
    n_clusters, n_columns = len(sizes), scores.shape[1]
    k = min(k, n_columns)
    totals = member @ scores
    rng = np.random.default_rng(np.frombuffer(seed.encode(), dtype=np.uint8).tolist())
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_bootstrap)
    in_top = _top_k(counts @ totals / (counts @ sizes)[:, None], k).mean(0)
    overlap = float("nan")
    if n_clusters > 1 and top_k_is_decided(totals.sum(0), k):
        shared = []
        for _ in range(n_halvings):
            order = rng.permutation(n_clusters)
            halves = np.zeros((2, n_clusters))
            halves[0, order[: n_clusters // 2]] = 1
            halves[1] = 1 - halves[0]
            first, second = _top_k(halves @ totals / (halves @ sizes)[:, None], k)
            shared.append(float((first & second).sum()) / k)
        overlap = float(np.mean(shared))
    return Stability(in_top, n_bootstrap, overlap, n_halvings, k / n_columns)


def top_k_is_decided(scores: np.ndarray, k: int) -> bool:
    """Whether ``scores`` (column,) say which the k largest are: where the k-th and the next are equal, the order of
    columns does, and that two such lists are alike shows nothing."""
    best_first = -np.sort(-scores)
    return k >= len(scores) or bool(best_first[k - 1] > best_first[k])


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """bool (sample, column): the k largest of each row, the first of equal ones, as heads are listed."""
    last = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdims=True)))
