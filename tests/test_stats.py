"""The statistics on simulated data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from relfv.stats import FDR, clustered_mean, false_discovery, layer_chosen_by_others, share_of_gap, top_k_stability


def trials(rng: np.random.Generator, rows: int, columns: int, together: float) -> tuple[np.ndarray, np.ndarray]:
    """25 trials over ``rows`` queries, mean 0, variance 1; ``together`` is the correlation within a query."""
    clusters = rng.integers(0, rows, 25)
    of_query, own = rng.standard_normal((rows, columns)), rng.standard_normal((25, columns))
    return np.sqrt(together) * of_query[clusters] + np.sqrt(1 - together) * own, clusters


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [10, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(rows: int, together: float) -> None:
    rng = np.random.default_rng(0)
    covered, naive = [], []
    for _ in range(150):
        values, clusters = trials(rng, rows, 60, together)
        found = clustered_mean(values, clusters)
        covered.append((found.low <= 0) & (found.high >= 0))
        naive.append(np.abs(values.mean(0)) <= 1.96 * values.std(0) / 5)
    assert 0.945 < np.mean(covered) < 0.985
    if together == 1 and rows == 10:
        assert np.mean(naive) < 0.85  # what taking trials for independent would claim


def test_p_values_and_intervals_say_the_same() -> None:
    values, clusters = trials(np.random.default_rng(1), 12, 400, 0.5)
    found = clustered_mean(values + 0.4, clusters)
    outside = (found.low > 0) | (found.high < 0)
    assert np.array_equal(outside, found.p_value < 0.05)
    assert 0.1 < outside.mean() < 0.9
    assert found.df <= found.n_clusters - 1


def test_clusters_of_one_size_give_the_t_test_of_their_means() -> None:
    from scipy import stats

    values = np.random.default_rng(2).standard_normal((24, 5))
    clusters = np.repeat(np.arange(8), 3)
    found = clustered_mean(values, clusters)
    means = values.reshape(8, 3, 5).mean(1)
    assert found.df == pytest.approx(7)
    assert np.allclose(found.p_value, stats.ttest_1samp(means, 0).pvalue)


def test_no_effect_at_all_and_a_single_query_are_no_evidence() -> None:
    assert clustered_mean(np.zeros((25, 2)), [0, 1] * 12 + [0]).p_value.tolist() == [1, 1]
    alone = clustered_mean(np.random.default_rng(0).standard_normal((5, 2)), [3] * 5)
    assert alone.p_value.tolist() == [1, 1]
    assert np.isinf(alone.low).all()


def test_called_heads_are_real_ones_and_a_planted_one_is_found() -> None:
    rng = np.random.default_rng(3)
    wrong, found, called_in_null = [], [], 0
    for _ in range(60):
        values, clusters = trials(rng, 15, 500, 0.5)
        called_in_null += bool((false_discovery(clustered_mean(values, clusters).p_value) <= FDR).any())
        values[:, :40] += rng.uniform(1.5, 4, 40)
        called = false_discovery(clustered_mean(values, clusters).p_value) <= FDR
        wrong.append(called[40:].sum() / max(1, called.sum()))
        found.append(called[:40].mean())
    assert np.mean(wrong) < FDR + 0.02
    assert np.mean(found) > 0.5
    assert called_in_null / 60 < 0.12


def test_a_list_of_real_heads_is_stable_and_one_of_noise_is_not() -> None:
    rng = np.random.default_rng(4)
    noise, clusters = trials(rng, 12, 100, 0.5)
    found = top_k_stability(noise, clusters, 20, seed="a")
    assert found.half_overlap < 0.45
    assert found.chance_overlap == 0.2
    assert found.in_top_k.sum() == pytest.approx(20)
    planted = noise.copy()
    planted[:, :20] += 5
    found = top_k_stability(planted, clusters, 20, seed="a")
    assert found.half_overlap > 0.98
    assert found.in_top_k[:20].min() > 0.95
    again = top_k_stability(planted, clusters, 20, seed="a")
    assert np.array_equal(found.in_top_k, again.in_top_k)
    assert not np.array_equal(found.in_top_k, top_k_stability(noise, clusters, 20, seed="b").in_top_k)


@pytest.mark.parametrize("n", [5, 10, 25])
def test_the_interval_of_a_share_covers_it_with_skewed_probabilities_of_few_queries(n: int) -> None:
    rng = np.random.default_rng(5)
    low, high = rng.beta(1, 4, 100_000), rng.beta(6, 1.5, 100_000)
    reached = np.clip(low + (high - low) * 0.9 * rng.beta(3, 1.2, 100_000), 0, 1)
    truth = (reached - low).mean() / (high - low).mean()
    covered = []
    for _ in range(400):
        i = rng.integers(0, 100_000, n)
        found = share_of_gap(low[i], high[i], reached[i], range(n))
        if found:
            assert found.value == pytest.approx((reached - low)[i].mean() / (high - low)[i].mean())
            covered.append(found.low <= truth <= found.high)
    assert len(covered) > 350
    assert 0.87 < np.mean(covered) < 0.98


def test_a_single_query_gives_no_share() -> None:
    assert share_of_gap(np.zeros(3), np.ones(3), np.full(3, 0.9), [1, 1, 1]) is None


def test_no_share_is_given_of_a_gap_that_is_not_there() -> None:
    rng = np.random.default_rng(6)
    low = rng.uniform(0, 1, 10)
    assert share_of_gap(low, low + 0.01, low, range(10)) is None
    assert share_of_gap(low, rng.uniform(0, 1, 10) * 0.5, low, range(10)) is None
    unsure = np.array([0.0] * 9 + [0.8])
    assert share_of_gap(np.zeros(10), unsure, unsure, range(10)) is None


def test_the_luck_of_the_best_layer_is_taken_out() -> None:
    rng = np.random.default_rng(7)
    best, chosen = [], []
    for _ in range(200):
        values = rng.standard_normal((10, 32))
        best.append(values.mean(0).max())
        chosen.append(layer_chosen_by_others(values, range(10)).mean())
    assert np.mean(best) > 0.5
    assert abs(np.mean(chosen)) < 0.1
    assert np.isnan(layer_chosen_by_others(np.ones((3, 2)), [1, 1, 1])).all()
