"""What a mean over trials is worth: intervals, false-discovery control, stability of a ranking.

25 trials draw their query from as few as ten rows, and trials that share a query are no independent observations. So
everything here counts *queries* (clusters), not trials. Formulas, assumptions and sources: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of every interval."""
FDR = 0.05
"""Share of false ones among the heads that are called distinguishable from noise."""


@dataclass(frozen=True)
class ClusteredMean:
    """Means over trials with errors clustered by query; arrays are (column,)."""

    mean: np.ndarray
    se: np.ndarray
    """Standard error: CR2, unbiased for independent trials of equal variance whatever the clusters' sizes."""
    low: np.ndarray
    """Lower end of the interval at ``LEVEL``."""
    high: np.ndarray
    p_value: np.ndarray
    """Two-sided, of a mean of 0. 1 where every trial has exactly 0."""
    n_clusters: int
    df: float
    """Degrees of freedom of the t distribution: fewer than n_clusters - 1 where clusters differ in size."""


def clustered_mean(values: np.ndarray, clusters: Sequence[int]) -> ClusteredMean:
    """Mean of ``values`` (trial, column) with ``clusters`` (trial,) naming each trial's query.

    With a single cluster nothing is known of the error: infinite intervals, p-values of 1.
    """
    values = np.asarray(values, dtype=np.float64)
    sizes, member = _members(clusters)
    n, n_clusters = len(values), len(sizes)
    mean = values.mean(0)
    if n_clusters < 2:
        unknown = np.full(mean.shape, np.inf)
        return ClusteredMean(mean, unknown, mean - unknown, mean + unknown, np.ones(mean.shape), n_clusters, 0.0)
    residual = member @ (values - mean)
    # A cluster's residuals are too small by its own pull on the mean; CR2 (Bell & McCaffrey 2002) undoes that.
    se = np.sqrt((residual**2 / (1 - sizes / n)[:, None]).sum(0)) / n
    return _with_interval(mean, se, sizes)


def mean_with_left_out(mean: np.ndarray, without: np.ndarray, clusters: Sequence[int]) -> ClusteredMean:
    """``mean`` (column,) over all trials, with the error that ``without`` (cluster, column) shows: the same estimate
    from the other clusters alone, everything that it rests on included. Rows in the order of ``np.unique(clusters)``,
    two or more.

    Where the estimate is nothing but a mean over trials this is ``clustered_mean`` to the last digit.
    """
    sizes, _ = _members(clusters)
    se = np.sqrt(((1 - sizes / sizes.sum())[:, None] * (without - mean) ** 2).sum(0))
    return _with_interval(mean, se, sizes)


def _with_interval(mean: np.ndarray, se: np.ndarray, sizes: np.ndarray) -> ClusteredMean:
    from scipy import stats  # takes a second to import, which commands that compute nothing should not cost

    df = min(_satterthwaite(sizes, together) for together in (False, True))
    half = stats.t.ppf(0.5 + LEVEL / 2, df) * se
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * stats.t.sf(np.abs(mean / se), df)
    p_value = np.where(se > 0, p_value, np.where(mean == 0, 1.0, 0.0))
    return ClusteredMean(mean, se, mean - half, mean + half, p_value, len(sizes), df)


def _members(clusters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (cluster,), and the 0/1 matrix (cluster, trial) of who belongs where."""
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


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values: those at most FDR are called, and about that share of them wrongly."""
    from scipy import stats

    return stats.false_discovery_control(p_values, method="bh")


@dataclass(frozen=True)
class Stability:
    """How much of a top-k list is the sample's doing; arrays are (column,)."""

    in_top_k: np.ndarray
    """Share of bootstrap samples of queries in which the column is among the k best."""
    n_bootstrap: int
    half_overlap: float
    """Mean share of the k that two halves of the queries have in common, over random halvings; NaN for one query."""
    n_halvings: int
    chance_overlap: float
    """The same for two lists drawn at random: k / columns."""


def top_k_stability(
    scores: np.ndarray, clusters: Sequence[int], k: int, *, seed: str, n_bootstrap: int = 1000, n_halvings: int = 200
) -> Stability:
    """Rank columns of ``scores`` (trial, column) by their mean over resampled queries. The same for the same
    ``seed``."""
    sizes, member = _members(clusters)
    n_clusters, n_columns = len(sizes), scores.shape[1]
    k = min(k, n_columns)
    totals = member @ scores
    rng = np.random.default_rng(np.frombuffer(seed.encode(), dtype=np.uint8).tolist())
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_bootstrap)
    in_top = _top_k(counts @ totals / (counts @ sizes)[:, None], k).mean(0)
    overlap = float("nan")
    if n_clusters > 1:
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


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """bool (sample, column): the k largest of each row."""
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval at ``LEVEL``."""

    value: float
    low: float
    high: float


MIN_GAP = 0.05
"""Between probabilities: a share of a smaller gap says nothing."""


def share_of_gap(low: np.ndarray, high: np.ndarray, reached: np.ndarray, clusters: Sequence[int]) -> Interval | None:
    """(mean reached - mean low) / (mean high - mean low) over prompts (prompt,), its interval from the linearised ratio
    with errors clustered as in ``clustered_mean``. None where the gap is below MIN_GAP or not clearly above 0."""
    gap = clustered_mean((high - low)[:, None], clusters)
    if gap.mean[0] < MIN_GAP or not gap.low[0] > 0:
        return None
    share = float((reached - low).mean() / gap.mean[0])
    error = clustered_mean(((reached - low - share * (high - low)) / gap.mean[0])[:, None], clusters)
    return Interval(share, share + float(error.low[0]), share + float(error.high[0]))


def layer_chosen_by_others(values: np.ndarray, clusters: Sequence[int]) -> np.ndarray:
    """``values`` (prompt, layer) -> (prompt,): each prompt's value at the layer that is best for the *other* clusters.

    The best of L layers on the same prompts is too good by the luck of L draws; this is not. With one cluster: NaN.
    """
    cluster_of = np.asarray(clusters)
    chosen = np.full(len(values), np.nan)
    for cluster in np.unique(cluster_of):
        inside = cluster_of == cluster
        if not inside.all():
            chosen[inside] = values[inside, int(values[~inside].mean(0).argmax())]
    return chosen
