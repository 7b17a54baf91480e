"""The statistics on simulated data whose truth is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from relfv.stats import (
    FDR,
    N_FLIPS,
    best_column_p_value,
    called_at_once,
    clustered_mean,
    false_discovery,
    overlap_by_chance,
    queries_behind_half,
    sign_flip_p_values,
    top_k_stability,
)


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


def test_clusters_of_one_size_give_the_t_interval_of_their_means() -> None:
    values = np.random.default_rng(2).standard_normal((24, 5))
    clusters = np.repeat(np.arange(8), 3)
    found = clustered_mean(values, clusters)
    means = values.reshape(8, 3, 5).mean(1)
    assert found.df == pytest.approx(7)
    of_means = stats.ttest_1samp(means, 0).confidence_interval()
    assert np.allclose(found.low, of_means.low)
    assert np.allclose(found.high, of_means.high)


def test_degrees_of_freedom_are_the_fewer_of_trials_by_themselves_and_in_step() -> None:
    """Those of a variance are twice its squared mean by its own variance."""
    rng, clusters = np.random.default_rng(3), np.repeat(np.arange(9), [10, 5, 3, 2, 1, 1, 1, 1, 1])
    by_themselves, in_step = rng.standard_normal((25, 100_000)), rng.standard_normal((9, 100_000))[clusters]
    df = []
    for values in (by_themselves, in_step):
        found = clustered_mean(values, clusters)
        df.append(2 * np.mean(found.se**2) ** 2 / np.var(found.se**2))
    assert max(df) > 1.5 * min(df)
    assert found.df == pytest.approx(min(df), rel=0.05)


def test_a_single_query_is_no_evidence() -> None:
    alone = clustered_mean(np.random.default_rng(0).standard_normal((5, 2)), [3] * 5)
    assert np.isinf(alone.low).all()


def test_every_flip_of_few_queries_is_made_and_many_at_random() -> None:
    rng = np.random.default_rng(1)
    values, clusters = rng.standard_normal((12, 6)), [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 1]
    totals = np.stack([values[np.equal(clusters, query)].sum(0) for query in range(7)])
    means = np.array([np.array(flips) @ totals for flips in product((1, -1), repeat=7)])
    exact = (np.abs(means) >= np.abs(totals.sum(0)) - 1e-9).mean(0)
    assert sign_flip_p_values(values, clusters) == pytest.approx(exact)
    assert sign_flip_p_values(np.abs(values), clusters) == pytest.approx(2 / 2**7)
    many = rng.standard_normal((18, 1)) + 0.4
    as_ranks = stats.permutation_test((many[:, 0],), np.mean, permutation_type="samples", n_resamples=20_000, rng=0)
    assert sign_flip_p_values(many, range(18))[0] == pytest.approx(as_ranks.pvalue, abs=0.01)
    assert sign_flip_p_values(np.ones((18, 1)), range(18))[0] == pytest.approx(1 / N_FLIPS)
    assert sign_flip_p_values(np.zeros((25, 2)), [0, 1] * 12 + [0]).tolist() == [1, 1]


def test_columns_that_do_harm_do_not_hide_the_best() -> None:
    values = np.tile([1.0, -5.0], (12, 1)) + 0.1 * np.random.default_rng(0).standard_normal((12, 2))
    assert best_column_p_value(values, range(12), 0) < 0.01
    assert best_column_p_value(-values[:, :1], range(12), 0) > 0.9
    noise = np.random.default_rng(1).standard_normal((200, 12, 20))  # the best of twenty is no evidence
    p_values = [best_column_p_value(some, range(12), int(some.mean(0).argmax())) for some in noise]
    assert np.mean(np.array(p_values) <= 0.1) < 0.15


@pytest.mark.parametrize("shape", ["normal", "heavy", "rare"])
@pytest.mark.parametrize("rows", [8, 18])
def test_flips_reject_no_more_often_than_they_say(rows: int, shape: str) -> None:
    rng = np.random.default_rng(2)
    clusters = [*range(rows), *rng.integers(0, rows, 25 - rows)]
    of_query = {"normal": rng.standard_normal, "heavy": lambda size: rng.standard_t(2, size)}.get(
        shape, lambda size: np.where(rng.random(size) < 0.8, 0, rng.standard_normal(size))
    )((rows, 3000))
    p_values = sign_flip_p_values(of_query[clusters], clusters)
    for level in (0.01, 0.05, 0.2):
        assert np.mean(p_values <= level) < level * 1.15 + 0.004


def test_an_effect_on_every_query_is_called_however_unequal_it_is() -> None:
    """18 queries, an effect on all of them that is large on a few: Student's t sees scatter, flips see one sign."""
    rng = np.random.default_rng(3)
    queries = [*range(18), *rng.integers(0, 18, 7)]
    values = (rng.lognormal(0, 0.7, (18, 1)) * rng.standard_normal((18, 1000)))[queries]
    values[:, :20] = (rng.lognormal(0, 1.3, (18, 20)))[queries]
    called = false_discovery(sign_flip_p_values(values, queries)) <= FDR
    assert called[:20].mean() > 0.9
    assert called[20:].mean() < 0.005
    mean = clustered_mean(values, queries)
    by_t = false_discovery(2 * stats.t.sf(np.abs(mean.mean / mean.se), mean.df)) <= FDR
    assert by_t[:20].mean() < 0.3


def test_an_effect_of_few_queries_is_known() -> None:
    values = np.zeros((12, 5))
    values[3, 0] = 1
    values[:, 1] = 1
    values[:, 2] = [-5, -4, *[-1] * 10]
    values[:, 3] = [9, -3, *[0.1] * 10]
    assert queries_behind_half(values, range(12)).tolist() == [1, 6, 3, 1, 0]
    assert queries_behind_half(values, [0, 0, *range(1, 11)])[2] == 2


def test_with_few_queries_many_heads_are_called_or_none() -> None:
    assert called_at_once(1024, 10) == 40
    assert called_at_once(1024, 14) == 3
    assert called_at_once(128, 18) == 1
    queries, values = range(10), np.zeros((10, 1024))
    values[:, :39] = 1
    assert not (false_discovery(sign_flip_p_values(values, queries)) <= FDR).any()
    values[:, 39] = 1
    assert (false_discovery(sign_flip_p_values(values, queries)) <= FDR).sum() == 40


def test_called_heads_are_real_ones_and_a_planted_one_is_found() -> None:
    rng = np.random.default_rng(3)
    wrong, found, called_in_null = [], [], 0
    for _ in range(60):
        values, clusters = trials(rng, 15, 500, 0.5)
        called_in_null += bool((false_discovery(sign_flip_p_values(values, clusters)) <= FDR).any())
        values[:, :40] += rng.uniform(1.5, 4, 40)
        called = false_discovery(sign_flip_p_values(values, clusters)) <= FDR
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


def test_a_list_that_ends_in_a_tie_is_filled_in_the_order_of_heads_and_no_overlap_is_claimed() -> None:
    values = np.zeros((12, 40))
    values[:, [5, 30]] = 1.0
    found = top_k_stability(values, range(12), 4, seed="a")
    assert found.in_top_k[[0, 1, 5, 30]].tolist() == [1] * 4
    assert found.in_top_k.sum() == pytest.approx(4)
    assert np.isnan(found.half_overlap)
    assert top_k_stability(values, range(12), 2, seed="a").half_overlap == 1


def test_halves_of_the_queries_are_halves() -> None:
    """Of four queries there are three ways; queries count by their trials."""
    clusters, k = [0, 0, 0, 1, 2, 2, 3], 10
    values = np.random.default_rng(5).standard_normal((7, 40))

    def shared(*halves: list[int]) -> float:
        first, second = (np.argsort(-values[np.isin(clusters, half)].mean(0))[:k] for half in halves)
        return len({*first} & {*second}) / k

    ways = [shared([0, 1], [2, 3]), shared([0, 2], [1, 3]), shared([0, 3], [1, 2])]
    one_by_three = [shared([i], [j for j in range(4) if j != i]) for i in range(4)]
    found = top_k_stability(values, clusters, k, seed="a").half_overlap
    assert found == pytest.approx(np.mean(ways), abs=0.02)
    assert abs(found - np.mean(one_by_three)) > 0.05


def test_overlap_by_chance_is_that_of_random_draws() -> None:
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.permutation(30)[:6]) & set(range(8))) for _ in range(20_000)]
    expected, p_value = overlap_by_chance(3, 6, 8, 30)
    assert expected == pytest.approx(np.mean(drawn), abs=0.03)
    assert p_value == pytest.approx(np.mean(np.array(drawn) >= 3), abs=0.01)
    assert overlap_by_chance(0, 6, 8, 30)[1] == 1.0
