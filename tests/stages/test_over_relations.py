from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from measured_relations import HEADS, KEY, measured
from relfv.stages.over_relations import RelationResults, heads_of_the_others, over_relations
from relfv.types import HeadId


def relations(n: int, rng: np.random.Generator, planted: dict[int, float]) -> list[RelationResults]:
    """``n`` relations with an effect of each ``planted`` head, and noise and heads of their own."""
    found = []
    for i in range(n):
        scores = 0.01 * rng.standard_normal(len(HEADS))
        scores[rng.choice(np.arange(20, 64), 3, replace=False)] += 0.3
        for head, effect in planted.items():
            scores[head] += effect * rng.uniform(0.7, 1.3)
        found.append(measured(f"r{i}", scores))
    return found


def test_a_mean_is_right_to_the_last_digit_whatever_the_order() -> None:
    some = relations(7, np.random.default_rng(0), {3: 0.2})
    found = over_relations(some, KEY, 5)
    for i, head in enumerate(found.scored):
        exact = sum(Fraction(one.scored[i].scores[KEY]) for one in some)
        assert head.scores[KEY] == float(exact) / 7
    assert found.scored == over_relations(some[::-1], KEY, 5).scored
    assert [head.id for head in found.scored] == HEADS
    assert found.scored[0].n_trials == 7 * 25


def test_two_relations_by_hand() -> None:
    values = np.zeros((2, 64))
    values[:, 0], values[:, 1] = [0.25, 0.75], [0.5, -0.5]
    found = over_relations([measured("a", values[0]), measured("b", values[1])], KEY, 1)
    assert found.universal == [HeadId(0, 0)]
    assert found.scored[0].scores[KEY] == 0.5
    assert found.se[0] == pytest.approx(0.25)
    assert found.high[0] - 0.5 == pytest.approx(12.706 * 0.25, rel=1e-4)  # Student's t of one degree of freedom
    assert found.n_positive[:3].tolist() == [2, 1, 0]
    assert found.p_value[0] == 0.5  # of four flips two are as far from 0


def test_shared_heads_are_found_and_a_relations_own_are_not() -> None:
    planted = {1: 0.25, 5: 0.35, 9: 0.3}
    some = relations(10, np.random.default_rng(1), planted)
    found = over_relations(some, KEY, 3)
    assert set(found.universal) == {HEADS[i] for i in planted}
    assert (found.fdr[list(planted)] <= 0.05).all()
    assert (found.stability.in_top_k[list(planted)] > 0.95).all()
    for one in some:
        assert set(heads_of_the_others(some, one.name, KEY, 3)) == {HEADS[i] for i in planted}


def test_absolute_effects_are_no_evidence_of_an_effect() -> None:
    """They are above 0 in every relation, whatever a head does."""
    rng = np.random.default_rng(5)
    some = [with_absolute(one) for one in relations(8, rng, {1: 0.4})]
    found = over_relations(some, "mean_abs_delta_p", 3)
    assert found.universal[0] == HEADS[1]
    assert found.fdr[1] == min(found.fdr)
    assert (found.p_value <= 0.05).mean() < 0.2
    assert found.n_positive.min() < 8


def with_absolute(one: RelationResults) -> RelationResults:
    """The same relation, with absolute scores in their column."""
    heads = (
        replace(head, scores={**head.scores, "mean_abs_delta_p": abs(head.scores["mean_delta_p"])})
        for head in one.scored
    )
    return replace(one, scored=tuple(heads))


def test_without_shared_heads_few_are_called_and_intervals_cover_zero() -> None:
    rng, called, covered = np.random.default_rng(2), 0, []
    for _ in range(40):
        some = [measured(f"r{i}", 0.01 * rng.standard_normal(64)) for i in range(8)]
        found = over_relations(some, KEY, 5)
        called += bool((found.fdr <= 0.05).any())
        covered.append(((found.low <= 0) & (found.high >= 0)).mean())
    assert called <= 6
    assert 0.93 < np.mean(covered) < 0.97


def test_the_relation_left_out_has_no_part_in_the_choice() -> None:
    some = relations(4, np.random.default_rng(3), {2: 0.2})
    loud = np.zeros(64)
    loud[15] = 100.0
    some[0] = measured("r0", loud)
    assert HEADS[15] not in heads_of_the_others(some, "r0", KEY, 5)
    assert heads_of_the_others(some, "r1", KEY, 1) == [HEADS[15]]
