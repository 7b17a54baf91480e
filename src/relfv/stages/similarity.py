"""Which relations are alike, by several measures, and whether the measures agree: representational similarity analysis
(Kriegeskorte et al. 2008) with the permutation test of Mantel (1967)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from relfv.stages.cross import compare_directions
from relfv.stages.over_relations import RelationResults
from relfv.types import HeadId

SIMILARITIES = {
    "vectors": "cosine of the function vectors",
    "head_outputs": "cosine of the universal heads' clean means (z, one after the other)",
    "effects": "cosine of the effects of all heads (the score key's mean on each)",
    "answers": "share of the scored tokens that two relations have in common (Jaccard)",
}
"""Name -> what it is. From all but the last the mean over relations is taken away first: what every relation shares,
such as the format, would make all of them alike."""
IN_WORDS = {
    "vectors": "function vectors",
    "head_outputs": "universal heads' outputs",
    "effects": "effects of heads",
    "answers": "scored tokens shared",
}
"""Name -> how it is called in figures and on the page."""
N_PERMUTATIONS = 10_000
_ALL_UP_TO = 7
"""Number of relations up to which all their orders are tried: 7 have 5,040."""


def similarities(
    relations: Sequence[RelationResults], universal: Sequence[HeadId], score_key: str
) -> dict[str, np.ndarray]:
    """Name -> float64 (relation, relation), as in SIMILARITIES; NaN where a relation does not differ from the mean."""
    rows = {
        "vectors": [one.vector for one in relations],
        "head_outputs": [np.concatenate([one.means[head.layer, head.head] for head in universal]) for one in relations],
        "effects": [[head.scores[score_key] for head in one.scored] for one in relations],
    }
    found = {name: _centred_cosines(np.array(values, dtype=np.float64)) for name, values in rows.items()}
    answers = [[len(a.answers & b.answers) / len(a.answers | b.answers) for b in relations] for a in relations]
    return {**found, "answers": np.array(answers)}


def _centred_cosines(rows: np.ndarray) -> np.ndarray:
    _, cosines = compare_directions(rows - rows.mean(0))
    return np.array(cosines, dtype=np.float64)


def agreement(matrices: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The result of ``mantel`` for every pair of ``matrices``."""
    return [{"a": a, "b": b, **mantel(matrices[a], matrices[b])} for a, b in itertools.combinations(matrices, 2)]


def mantel(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Spearman's correlation of the entries above the diagonal of two symmetric matrices (relation, relation), and the
    share of orders of the relations of ``one`` under which it is as large or larger (one-sided; the order as it is
    among them). All orders of up to 7 relations, else 10,000, always the same.

    None for fewer than three relations, or where a matrix holds NaN or nothing but one value.
    """
    from scipy import stats

    n = len(one)
    unknown = {"correlation": None, "p_value": None, "n_orders": 0}
    i, j = np.triu_indices(n, 1)
    if n < 3 or not (np.isfinite(one[i, j]).all() and np.isfinite(other[i, j]).all()):
        return unknown
    # Values that differ only by rounding are ties: a permuted matrix has the same entries, and so the same ranks.
    ranks = [stats.rankdata(np.round(matrix[i, j], 12)) for matrix in (one, other)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    if scale == 0:
        return unknown
    square = np.zeros((n, n))
    square[i, j] = square[j, i] = centred[0]
    orders = _orders(n)
    as_large = sum(
        np.count_nonzero(square[some[:, i], some[:, j]] @ centred[1] >= float(centred[0] @ centred[1]) - 1e-6)
        for some in np.array_split(orders, max(1, len(orders) // 500))
    )
    correlation = float(centred[0] @ centred[1]) / scale
    return {"correlation": correlation, "p_value": float(as_large / len(orders)), "n_orders": len(orders)}


def _orders(n: int) -> np.ndarray:
    """Orders of n relations, int (order, n), the first of them unchanged."""
    if n <= _ALL_UP_TO:
        return np.array(list(itertools.permutations(range(n))))
    rng = np.random.default_rng(n)
    orders = np.array([rng.permutation(n) for _ in range(N_PERMUTATIONS)])
    orders[0] = np.arange(n)
    return orders
