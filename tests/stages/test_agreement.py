from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from relfv.stages.agreement import agreement, by_chance, cosines, mean_of_pairs, rank_correlations, shared_heads
from relfv.types import HeadId

HEADS = [HeadId(i // 8, i % 8) for i in range(64)]


def test_the_interval_leaves_out_a_draw_with_all_its_pairs_and_stays_below_one() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 30)) + 4
    found = mean_of_pairs(cosines(vectors))
    assert found
    by_hand = [vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
               for i, j in combinations(range(5), 2)]  # fmt: skip
    assert (found.mean, found.lowest) == (pytest.approx(np.mean(by_hand)), pytest.approx(min(by_hand)))
    without = [np.arctanh(np.mean([by_hand[n] for n, pair in enumerate(combinations(range(5), 2)) if out not in pair]))
               for out in range(5)]  # fmt: skip
    half = stats.t.ppf(0.975, 4) * np.sqrt(4 / 5 * np.sum((without - np.mean(without)) ** 2))
    assert (found.low, found.high) == (
        pytest.approx(np.tanh(np.arctanh(found.mean) - half)),
        pytest.approx(np.tanh(np.arctanh(found.mean) + half)),
    )
    same = mean_of_pairs(cosines(vectors[[0, 0, 0]]))
    assert same
    assert same.low == pytest.approx(1)
    assert same.mean <= 1


def test_two_draws_have_no_interval_one_no_mean_and_a_vector_of_zeros_no_cosine() -> None:
    vectors = np.eye(3)
    two = mean_of_pairs(cosines(vectors[:2]))
    assert two
    assert (two.mean, two.low, two.high) == (0, None, None)
    assert mean_of_pairs(cosines(vectors[:1])) is None
    assert mean_of_pairs(cosines(np.array([[1.0, 0], [0, 0]]))) is None


def test_intervals_of_draws_around_one_vector_hold_the_true_mean_cosine_as_often_as_they_say() -> None:
    """Truth known: truth + noise in 200 dimensions, so that two draws have a cosine of 1 / (1 + noise**2)."""
    rng, covered, n = np.random.default_rng(0), {3: 0, 5: 0, 10: 0}, 400
    for n_draws in covered:
        for _ in range(n):
            sizes = rng.gamma(4, 1 / 4, (n_draws, 1))  # some draws are worse than others
            vectors = np.ones(200) + 0.4 * sizes * rng.standard_normal((n_draws, 200))
            found = mean_of_pairs(cosines(vectors))
            assert found
            covered[n_draws] += (found.low or 0) <= TRUTH <= (found.high or 0)
    assert all(0.90 <= count / n <= 0.995 for count in covered.values()), covered


def _truth() -> float:
    rng = np.random.default_rng(1)
    one, two = rng.gamma(4, 1 / 4, (2, 100_000))
    return float(np.mean(1 / np.sqrt((1 + (0.4 * one) ** 2) * (1 + (0.4 * two) ** 2))))


TRUTH = _truth()


def test_random_lists_are_called_alike_no_more_often_than_chance_allows_and_like_ones_always() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(300):
        scores = rng.standard_normal((4, 64))
        lists = [[HEADS[i] for i in np.argsort(-row)[:10]] for row in scores]
        found = agreement(rng.standard_normal((4, 64)), lists, scores)
        p_values.append(found["heads_by_chance"]["p_value"])
        assert abs(found["spearman"]["mean"]) < 0.3
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05
    alike = agreement(np.ones((3, 4)), [HEADS[:10]] * 3, np.arange(192.0).reshape(3, 64))
    assert alike["heads_shared"] | {"n_draws": 3} == dict.fromkeys(("mean", "low", "high", "lowest", "highest"), 10) | {
        "n_draws": 3
    }
    assert alike["heads_by_chance"] == {
        "mean": pytest.approx(100 / 64),
        "p_value": pytest.approx(2 * 6.6e-12, rel=0.01),
    }
    assert by_chance(np.array([[10, 3], [3, 10]]), 10, 64)[1] == pytest.approx(stats.hypergeom.sf(2, 64, 10, 10))


def test_lists_that_equal_scores_leave_open_are_not_called_alike() -> None:
    lists, nothing = [HEADS[:10]] * 3, np.zeros((3, 64))
    assert by_chance(shared_heads(lists), 10, 64)[1] < 1e-9
    for scores in (nothing, nothing + (np.arange(64) < 9)):  # nine heads lead, and the tenth is one of 55
        found = agreement(np.ones((3, 4)), lists, scores)
        assert found["heads_shared"] is None
        assert found["heads_by_chance"] == {"mean": pytest.approx(100 / 64), "p_value": None}
    decided = agreement(np.ones((3, 4)), lists, nothing + (np.arange(64) < 10))
    assert decided["heads_shared"]["mean"] == 10


def test_rank_correlations_are_spearmans_with_ties() -> None:
    scores = np.array([[3.0, 1, 1, 0], [2.0, 2, 1, 0], [0, 0, 0, 0]])
    found = rank_correlations(scores)
    assert found[0, 1] == pytest.approx(stats.spearmanr(scores[0], scores[1]).statistic)
    assert np.isnan(found[0, 2])
