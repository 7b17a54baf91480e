"""Share of the gap between zero-shot and clean prompts that a vector closes, with its bounds.

Where all of 14 queries are closed, 98 % each, their spread says nothing of queries that are not: one in five may fail
and none of 14 be seen. So a bound here is never tighter than the number of queries allows (Gaffke 2005), and it knows
that the layer was chosen (sign flips of the best layer). Formulas and measured coverage: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from relfv.stats import LEVEL, cluster_totals, clustered_mean, signs

MIN_GAP = 0.05
"""Smallest gap, as a difference of probabilities, of which shares are given: a share of a smaller one says nothing."""
_TAIL = (1 - LEVEL) / 2
_N_WEIGHTS = 10_000
"""Number of random weightings of the queries: with so many, the end of an interval moves by a hundredth of its width
from one set to another."""
_N_FLIPS = 4_096
"""Largest number of sign flips by query that are tried: all there are for up to 12 queries."""
_N_BISECTIONS = 12
"""Number of bisections of an interval two gaps wide: they find its end to a thousandth of the gap."""
_N_CHOICES = 2_000
"""Number of the weightings for which the layer is chosen anew; that takes (choice, query, layer) numbers."""


@dataclass(frozen=True)
class Share:
    """A share of the gap and its interval at ``LEVEL``, with the counts that it rests on."""

    value: float
    low: float
    """Above 0 only where flips of sign by query show that some layer of those considered has an effect."""
    high: float
    high_of_mean: float
    """Upper end by Student's t, from the spread of the queries seen: says nothing of queries of another kind."""
    n_queries: int
    """Number of queries with a gap of their own of at least MIN_GAP."""
    n_closing_half: int
    """Number of those queries that have at least half of their own gap closed."""
    others_up_to: float
    """Upper bound, one-sided at ``LEVEL`` (Clopper & Pearson 1934), on the share of queries of the rarer kind: those
    that do not close half of their gap where most do, those that do where most do not."""


class Gap:
    """The gap, P clean minus P zero-shot, of some prompts, and shares of it; counted by query."""

    def __init__(self, low: np.ndarray, high: np.ndarray, clusters: Sequence[int]) -> None:
        """``low`` and ``high`` (prompt,): P zero-shot and clean; ``clusters`` (prompt,): the prompts' queries."""
        self.clusters = clusters
        self.sizes = cluster_totals(np.ones(len(low)), clusters)
        self.totals = cluster_totals(high - low, clusters)
        gap = clustered_mean((high - low)[:, None], clusters)
        self.is_there = bool(gap.mean[0] >= MIN_GAP and gap.low[0] > 0)
        """Whether the mean gap is at least MIN_GAP and clearly above 0; there are no shares of any other."""

    def share(self, effect: np.ndarray, layer: int) -> Share | None:
        """The share: mean ``effect`` (prompt, layer), a difference of P, at the ``layer`` that was chosen among them,
        divided by the mean gap. For a layer that was not chosen, give that column alone. None where there is no gap, or
        a number at ``layer`` is not finite; other layers with such numbers are left out."""
        finite: np.ndarray = np.all(np.isfinite(effect), axis=0)
        if not self.is_there or not finite[layer]:
            return None
        totals = cluster_totals(effect[:, finite], self.clusters)
        layer = int(finite[:layer].sum())
        low, high = self.ends(totals[:, layer])
        return self._share(totals[:, layer], self._low_of_flips(totals, layer, low), high)

    def share_with_layer_chosen_by_others(self, effect: np.ndarray, score: np.ndarray) -> Share | None:
        """The share as in ``share``, with each query's effect at the layer of the largest mean ``score`` (prompt,
        layer) of the *other* queries. The best of L layers on the same prompts is too good by the luck of L draws; this
        is not.

        The choice is made anew within the weights that give the interval.
        """
        found = self._of_finite_layers(effect, score)
        if found is None:
            return None
        totals, scores = found
        chosen = _at_layers_of_others(totals, scores, np.ones((1, len(totals))))[0]
        anew = _at_layers_of_others(totals, scores, _weights(len(totals))[:_N_CHOICES, :-1])
        (low, high), (low_anew, high_anew) = self.ends(chosen), self.ends(chosen, anew)
        low = self._low_of_flips(totals, int(totals.sum(0).argmax()), min(low, low_anew))
        return self._share(chosen, low, max(high, high_anew))

    def closed_by_query(self, effect: np.ndarray, score: np.ndarray) -> np.ndarray | None:
        """(query,): each query's part in the share that ``share_with_layer_chosen_by_others`` gives. Their mean is that
        share, and their spread its error: the linearised ratio."""
        found = self._of_finite_layers(effect, score)
        if found is None:
            return None
        chosen = _at_layers_of_others(*found, np.ones((1, len(found[0]))))[0]
        value = chosen.sum() / self.totals.sum()
        return value + self._residuals(chosen, value)

    def _of_finite_layers(self, effect: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """``effect`` and ``score`` as totals (query, layer) of the layers where all numbers are finite; None where
        there is no share."""
        finite = np.isfinite(effect).all(0) & np.isfinite(score).all(0)
        if not self.is_there or not finite.any():
            return None
        return cluster_totals(effect[:, finite], self.clusters), cluster_totals(score[:, finite], self.clusters)

    def _share(self, totals: np.ndarray, low: float, high: float) -> Share:
        value = totals.sum() / self.totals.sum()
        of_mean = clustered_mean(self._residuals(totals, value)[:, None], range(len(totals)))
        with_gap = self.totals >= MIN_GAP * self.sizes
        half_closed = totals[with_gap] >= self.totals[with_gap] / 2
        n, n_closed = len(half_closed), int(half_closed.sum())
        others = at_most(min(n_closed, n - n_closed), n)
        return Share(float(value), low, high, float(value + of_mean.high[0]), n, n_closed, others)

    def _residuals(self, totals: np.ndarray, value: float) -> np.ndarray:
        """(..., query): how far each query is from ``value`` in units of the mean gap: the linearised ratio."""
        return (totals - value * self.totals) / self.totals.mean()

    def ends(self, chosen: np.ndarray, chosen_anew: np.ndarray | None = None) -> tuple[float, float]:
        """Gaffke's interval of the ratio of the totals ``chosen`` (query,): random weights on the queries seen and on
        one more, which is as bad (or as good) as any seen, and no better than closing nothing (no worse than closing
        all). With ``chosen_anew`` (draw, query) each draw of weights has totals of its own."""
        value = chosen.sum() / self.totals.sum()
        seen = self._residuals(chosen, value)
        drawn = seen[None] if chosen_anew is None else self._residuals(chosen_anew, value)
        weights = _weights(len(chosen))[: _N_WEIGHTS if chosen_anew is None else len(chosen_anew)]
        mean = (weights[:, :-1] * drawn).sum(1)
        low = np.quantile(mean + weights[:, -1] * min(seen.min(), -value), _TAIL)
        high = np.quantile(mean + weights[:, -1] * max(seen.max(), 1 - value), 1 - _TAIL)
        return float(value + low), float(value + high)

    def _low_of_flips(self, totals: np.ndarray, layer: int, limit: float) -> float:
        """The largest share s, up to ``limit``, that the test of the best of all layers rejects: flips of the queries'
        signs make some layer of ``totals`` (query, layer) reach as far above s as ``layer`` is in no more than
        ``_TAIL`` of them.

        What is flipped is effect - s * gap, as if every layer's share were s; of layers that fall short of s it is
        effect - their own share * gap, or how far they fall short would pass for noise (Hansen 2005).
        """
        flips = signs(len(totals), _N_FLIPS)
        if len(flips) * _TAIL < 1:
            return min(limit, self._low_of_few(totals, layer))
        effects, gaps, gap = totals.T @ flips.T, flips @ self.totals, self.totals.sum()
        own = totals.sum(0)[:, None] / gap

        def rejects(share: float) -> bool:
            reached = (effects - np.minimum(share, own) * gaps).max(0)
            return (reached >= (own[layer] - share) * gap - 1e-9).mean() <= _TAIL

        if rejects(limit):
            return limit
        low, high = limit - 2.0, limit
        for _ in range(_N_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if rejects(middle) else (low, middle)
        return low

    def _low_of_few(self, totals: np.ndarray, layer: int) -> float:
        """The lower end by Student's t, with its tail divided by the layers: five queries have 32 flips, too few to
        show anything."""
        from scipy import stats  # slow to import

        value = totals[:, layer].sum() / self.totals.sum()
        se = clustered_mean(self._residuals(totals[:, layer], value)[:, None], range(len(totals))).se[0]
        return float(value - stats.t.ppf(1 - _TAIL / totals.shape[1], len(totals) - 1) * se)


def mean_between(
    values: np.ndarray, clusters: Sequence[int], least: float = 0.0, most: float = 1.0
) -> tuple[float, float, float]:
    """Mean of ``values`` (trial,), which lie between ``least`` and ``most``, with its interval at ``LEVEL``: Gaffke's,
    as of a share, with one more query that is at either end, or as far as any seen."""
    n = len(values)
    totals = cluster_totals((values - least) / (most - least), clusters)
    low, high = Gap(np.zeros(n), np.ones(n), clusters).ends(totals)
    # Trials of queries that were drawn unequally often can lead a ratio's linearised end beyond what is possible.
    ends = np.clip([least + (most - least) * end for end in (low, high)], min(least, *values), max(most, *values))
    return float(np.mean(values)), float(ends[0]), float(ends[1])


def mean_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``other`` minus mean of ``one``, both (query,) of the same queries, with its interval. The one more query
    that the interval allows for is one that ``one`` closes and ``other`` does not, or the other way round."""
    return mean_between(other - one, range(len(one)), -1.0, 1.0)


def at_most(seen: int, n: int) -> float:
    """Upper bound, one-sided at ``LEVEL``, on a share of which ``seen`` of ``n`` were seen (Clopper & Pearson 1934)."""
    from scipy import stats  # slow to import

    return float(stats.beta.ppf(LEVEL, seen + 1, n - seen)) if seen < n else 1.0


@lru_cache(maxsize=4)
def _weights(n: int) -> np.ndarray:
    """float64 (draw, n + 1): uniform on the simplex, always the same."""
    drawn = np.random.default_rng(n).standard_exponential((_N_WEIGHTS, n + 1))
    return drawn / drawn.sum(1, keepdims=True)


def _at_layers_of_others(totals: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draw, query): each query's ``totals`` (query, layer) where the ``scores`` of the others, by ``weights`` (draw,
    query), are best."""
    of_all = weights @ scores
    best = [(of_all - weights[:, [i]] * scores[i]).argmax(1) for i in range(len(totals))]
    return np.stack([of_query[layers] for of_query, layers in zip(totals, best, strict=True)], axis=1)
