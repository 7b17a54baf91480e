from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from measured_relations import HEADS, measured
from relfv.stages.similarity import agreement, mantel, similarities
from relfv.types import HeadId


def matrix(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.standard_normal((n, 6))
    return rows @ rows.T


def test_correlation_and_p_value_of_every_order_by_hand() -> None:
    rng = np.random.default_rng(0)
    one, other = matrix(rng, 5), matrix(rng, 5)
    i, j = np.triu_indices(5, 1)
    found = mantel(one, other)
    rho = stats.spearmanr(one[i, j], other[i, j]).statistic
    assert found["correlation"] == pytest.approx(rho)
    orders = [np.array(order) for order in itertools.permutations(range(5))]
    as_large = [stats.spearmanr(one[np.ix_(o, o)][i, j], other[i, j]).statistic >= rho - 1e-9 for o in orders]
    assert found["p_value"] == pytest.approx(np.mean(as_large))
    assert found["n_orders"] == 120


def test_the_same_likeness_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(1)
    one = matrix(rng, 10)
    assert mantel(one, one + 0.2 * matrix(rng, 10))["p_value"] < 0.01
    assert mantel(one, one)["correlation"] == pytest.approx(1.0)
    small = [mantel(matrix(rng, 6), matrix(rng, 6))["p_value"] <= 0.05 for _ in range(100)]
    assert sum(small) <= 12


def test_what_cannot_be_known_is_none() -> None:
    rng = np.random.default_rng(2)
    flat = np.eye(5)
    assert mantel(flat, matrix(rng, 5))["p_value"] is None
    assert mantel(matrix(rng, 2), matrix(rng, 2))["correlation"] is None
    unknown = matrix(rng, 5)
    unknown[0, 1] = np.nan
    assert mantel(unknown, matrix(rng, 5))["correlation"] is None


def test_what_all_relations_share_makes_none_of_them_alike() -> None:
    rng = np.random.default_rng(3)
    kinds = np.repeat(rng.standard_normal((2, 40)), 4, axis=0)  # two kinds of four relations
    shared, relations = 50 * rng.standard_normal(40), []
    for i, kind in enumerate(kinds):
        vector = (shared + kind + 0.3 * rng.standard_normal(40)).astype(np.float32)
        one = measured(f"r{i}", 0.01 * rng.standard_normal(64) + 0.2 * (np.arange(64) % 2 == i // 4))
        means = np.tile(vector[:8], (8, 8, 1))
        relations.append(replace(one, vector=vector, means=means, answers=frozenset({i // 4, 9})))
    matrices = similarities(relations, HEADS[:3], "mean_delta_p")
    alike = np.equal.outer(np.arange(8) // 4, np.arange(8) // 4)
    for name in ("vectors", "head_outputs", "effects"):
        assert (matrices[name][alike] > 0.5).all()
        assert (matrices[name][~alike] < 0).all()
    assert matrices["answers"][0].tolist() == [1.0] * 4 + [1 / 3] * 4
    assert all(pair["p_value"] < 0.05 for pair in agreement(matrices))
    assert similarities(relations, [HeadId(7, 7)], "mean_delta_p")["head_outputs"].shape == (8, 8)
