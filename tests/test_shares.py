"""Shares of a gap and their intervals on simulated data whose truth is known. bench/statistics_grid.py has the whole
grid."""

from __future__ import annotations

import numpy as np
import pytest

from relfv.shares import Gap, Share, at_most, mean_difference

N_RUNS = 60
N_LAYERS = 32


def one_layer(low: np.ndarray, high: np.ndarray, effect: np.ndarray) -> Share | None:
    return Gap(low, high, range(len(low))).share(effect[:, None], 0)


def probabilities(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.beta(0.5, 10, n), 0.4 + 0.6 * rng.beta(8, 1, n)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.9, 0.95])
@pytest.mark.parametrize("n", [10, 14, 25])
def test_a_share_is_covered_where_rare_queries_are_of_another_kind(n: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    low, high = probabilities(rng, 100_000)
    effect = (high - low) * np.where(rng.random(100_000) < rate, 0, rng.beta(60, 1.2, 100_000))
    truth = effect.mean() / (high - low).mean()
    covered = []
    for _ in range(N_RUNS):
        i = rng.integers(0, 100_000, n)
        found = one_layer(low[i], high[i], effect[i])
        assert found
        assert found.value == pytest.approx(effect[i].mean() / (high - low)[i].mean())
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) > 0.93


@pytest.mark.parametrize("n", [5, 10, 25])
def test_a_share_of_graded_effects_is_covered(n: int) -> None:
    rng = np.random.default_rng(5)
    low, high = rng.beta(1, 4, 100_000), rng.beta(6, 1.5, 100_000)
    effect = np.clip((high - low) * 0.9 * rng.beta(3, 1.2, 100_000), -low, 1 - low)
    truth = effect.mean() / (high - low).mean()
    found = [one_layer(low[i], high[i], effect[i]) for i in rng.integers(0, 100_000, (N_RUNS, n))]
    shares = [share for share in found if share]
    assert len(shares) > 0.85 * N_RUNS
    assert np.mean([share.low <= truth <= share.high for share in shares]) > 0.93


def test_no_band_is_narrower_than_the_number_of_queries_allows() -> None:
    same = np.full(14, 0.1)
    found = one_layer(same, same + 0.8, same * 0 + 0.784)
    assert found
    assert (found.n_closing_half, found.n_queries) == (14, 14)
    assert found.others_up_to == pytest.approx(1 - 0.05 ** (1 / 14))  # 19 %
    assert found.low == pytest.approx(0.98 * 0.025 ** (1 / 14), abs=0.01)
    assert 0.98 < found.high < 0.99
    nothing = one_layer(same, same + 0.8, same * 0 + 0.0008)
    assert nothing
    assert 0.15 < nothing.high < 0.3
    assert nothing.high_of_mean < 0.01
    assert (nothing.n_closing_half, nothing.others_up_to) == (0, found.others_up_to)


def test_bounds_of_a_proportion_are_exact() -> None:
    assert at_most(0, 14) == pytest.approx(0.1926, abs=1e-4)
    assert at_most(1, 20) == pytest.approx(0.2161, abs=1e-4)
    assert at_most(3, 3) == 1


def nothing_at_any_layer(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """(prompt, layer), mean 0; ``rows`` of one prompt are alike where layers are neighbours."""
    z = rng.standard_normal((n, N_LAYERS))
    if kind == "alike":
        for layer in range(1, N_LAYERS):
            z[:, layer] = 0.9 * z[:, layer - 1] + 0.19**0.5 * z[:, layer]
    return 0.1 * (rng.standard_exponential(z.shape) - 1 if kind == "skewed" else z)


@pytest.mark.parametrize("kind", ["independent", "alike", "skewed"])
def test_the_best_of_many_layers_is_not_above_zero_where_there_is_nothing(kind: str) -> None:
    rng = np.random.default_rng(6)
    best_above, held_out_above, held_out_covers, values = [], [], [], []
    for _ in range(N_RUNS):
        low, high = probabilities(rng, 14)
        gap, effect = Gap(low, high, range(14)), nothing_at_any_layer(rng, 14, kind)
        best, held_out = gap.share(effect, int(effect.mean(0).argmax())), None
        held_out = gap.share_with_layer_chosen_by_others(effect, effect)
        assert best
        assert held_out
        best_above.append(best.low > 0)
        held_out_above.append(held_out.low > 0)
        held_out_covers.append(held_out.low <= 0 <= held_out.high)
        values.append(held_out.value)
    assert np.mean(best_above) < 0.07
    assert np.mean(held_out_above) < 0.05
    assert np.mean(held_out_covers) > 0.95
    assert abs(np.mean(values)) < 0.03  # the luck of the best layer is taken out


def test_an_effect_at_some_layers_is_found() -> None:
    rng = np.random.default_rng(7)
    share = 0.3 * np.exp(-0.5 * ((np.arange(N_LAYERS) - 10) / 4) ** 2)
    found, held_out = [], []
    for _ in range(60):
        low, high = probabilities(rng, 14)
        gap = Gap(low, high, range(14))
        effect = share * (high - low)[:, None] + nothing_at_any_layer(rng, 14, "alike")
        best, out = (
            gap.share(effect, int(effect.mean(0).argmax())),
            gap.share_with_layer_chosen_by_others(effect, effect),
        )
        assert best
        assert out
        found.append(best.low > 0)
        held_out.append(out.low > 0)
    assert np.mean(found) > 0.9
    assert np.mean(held_out) > 0.9


def test_layers_that_do_harm_do_not_hide_one_that_works() -> None:
    rng = np.random.default_rng(8)
    low, high = np.full(14, 0.3), np.full(14, 0.9)
    effect = np.full((14, N_LAYERS), -0.3) + 0.02 * rng.standard_normal((14, N_LAYERS))
    effect[:, 3] = 0.55 + 0.02 * rng.standard_normal(14)
    found = Gap(low, high, range(14)).share(effect, 3)
    alone = Gap(low, high, range(14)).share(effect[:, [3]], 0)
    assert found
    assert alone
    assert found.low == pytest.approx(alone.low, abs=0.02)


def test_the_layer_may_be_chosen_by_another_score() -> None:
    effect = np.array([[0.1, 0.5]] * 10)
    gap = Gap(np.zeros(10), np.full(10, 0.8), range(10))
    by_score, by_p = (gap.share_with_layer_chosen_by_others(effect, score) for score in (-effect, effect))
    assert by_score
    assert by_p
    assert (by_score.value, by_p.value) == pytest.approx((0.125, 0.625))


def test_an_interval_knows_that_other_queries_may_choose_another_layer() -> None:
    """Each half of the queries is closed at a layer of its own, and the others choose the wrong one for each query."""
    effect = np.zeros((14, 2))
    effect[:7, 0] = effect[7:, 1] = 0.8
    gap = Gap(np.zeros(14), np.full(14, 0.8), range(14))
    found = gap.share_with_layer_chosen_by_others(effect, effect)
    assert found
    assert found.value == 0
    assert found.high > gap.ends(np.zeros(14))[1] + 0.1


def test_a_layer_that_overflows_is_left_out() -> None:
    effect = np.full((10, 3), 0.4)
    effect[2, 0] = np.nan
    gap = Gap(np.zeros(10), np.full(10, 0.8), range(10))
    assert gap.share(effect, 0) is None
    for found in (gap.share(effect, 2), gap.share_with_layer_chosen_by_others(effect, effect)):
        assert found
        assert found.value == pytest.approx(0.5)
    assert gap.share_with_layer_chosen_by_others(effect[:, :1], effect[:, :1]) is None


def test_prompts_of_one_query_count_once() -> None:
    rng = np.random.default_rng(9)
    low, high = probabilities(rng, 10)
    effect = (high - low) * rng.beta(3, 1.2, 10)
    once, thrice = (
        Gap(low.repeat(times), high.repeat(times), np.arange(10).repeat(times)).share(effect.repeat(times)[:, None], 0)
        for times in (1, 3)
    )
    assert once
    assert thrice
    assert (thrice.low, thrice.value, thrice.high) == pytest.approx((once.low, once.value, once.high))
    assert thrice.n_queries == once.n_queries == 10


def test_a_single_query_gives_no_share() -> None:
    assert Gap(np.zeros(3), np.ones(3), [1, 1, 1]).share(np.full((3, 1), 0.9), 0) is None


def test_no_share_is_given_of_a_gap_that_is_not_there() -> None:
    rng = np.random.default_rng(6)
    low = rng.uniform(0, 1, 10)
    assert one_layer(low, low + 0.01, low * 0) is None
    assert one_layer(low, rng.uniform(0, 1, 10) * 0.5, low * 0) is None
    unsure = np.array([0.0] * 9 + [0.8])
    assert one_layer(np.zeros(10), unsure, unsure) is None


def test_the_difference_of_two_shares_of_the_same_queries_covers_the_truth() -> None:
    """Queries that are closed by one vector and not by the other in a fifth of cases: the interval knows of them, also
    where few were seen."""
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(300):
        one = (rng.random(14) < 0.9).astype(float)
        other = np.where(rng.random(14) < 0.2, 1 - one, one)
        _, low, high = mean_difference(one, other)
        n_covered += low <= 0.8 * 0.9 + 0.2 * 0.1 - 0.9 <= high
    assert n_covered >= 0.95 * 300


def test_what_each_query_closes_has_the_share_as_its_mean() -> None:
    rng = np.random.default_rng(1)
    clusters = [0, 0, 1, 2, 3, 4, 5, 6, 7]
    low, high = np.full(9, 0.1), np.full(9, 0.8)
    effect = 0.5 * (high - low)[:, None] + 0.1 * rng.standard_normal((9, 4))
    gap = Gap(low, high, clusters)
    share, closed = gap.share_with_layer_chosen_by_others(effect, effect), gap.closed_by_query(effect, effect)
    assert share is not None
    assert closed is not None
    assert closed.mean() == pytest.approx(share.value)
    assert Gap(low, low, clusters).closed_by_query(effect, effect) is None
