from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from relfv.stages.answered_right import answered_right, stratum_sentence
from relfv.types import HeadId

HEADS = [HeadId(0, 0), HeadId(1, 3)]


def row(delta: float, base: float = 0.1) -> dict[str, float]:
    return {
        "delta_p": delta,
        "p_base": base,
        "p_with": base + delta,
        "accuracy_base": 0,
        "accuracy_with": int(delta > 0.4),
    }


def simulated(rng: np.random.Generator) -> tuple[dict[str, Any], float]:
    """Ten of sixteen queries are known: a head raises P there by 0.3 on average, elsewhere by 0. -> what is found, and
    the mean over all trials that the draw has."""
    queries = np.concatenate([np.arange(16), rng.integers(0, 16, 14)])
    typical = np.where(np.arange(16) < 10, 0.3, 0.0) + 0.05 * rng.standard_normal(16)
    effects = np.stack([typical[queries], 0 * queries], axis=1) + 0.05 * rng.standard_normal((30, 2))
    right = (queries < 10).astype(int)
    rows = [row(float(typical[query])) for query in range(16)]
    share = right.mean()
    return answered_right(right.tolist(), queries.tolist(), effects, HEADS, rows, range(16)), 0.3 * share


def test_the_stratum_has_the_effect_of_what_is_known_and_all_trials_the_mixture() -> None:
    rng, covered = np.random.default_rng(0), []
    for _ in range(100):
        found, of_all = simulated(rng)
        own, step6 = found["heads"][0]["answered_right"], found["step6"]["answered_right"]
        covered.append((own["ci_low"] <= 0.3 <= own["ci_high"], step6["ci_low"] <= 0.3 <= step6["ci_high"]))
        assert found["top_heads"]["all"]["mean_delta_p"] == pytest.approx(of_all / 2, abs=0.05)
        assert found["top_heads"]["all"]["mean_delta_p"] < found["top_heads"]["answered_right"]["mean_delta_p"]
    assert (np.mean(covered, axis=0) >= 0.92).all()


def test_a_query_belongs_to_the_stratum_if_half_of_its_clean_prompts_are_answered_right() -> None:
    clusters = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
    right = [1, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    rows = [row(query / 10) for query in range(8)]  # no trial asks the last, as where StepD had other rows
    found = answered_right(right, clusters, np.ones((10, 2)), HEADS, rows, range(8))
    assert (found["n_trials"], found["n_queries"]) == (7, 6)
    step6 = found["step6"]
    assert (step6["all"]["n_eval"], step6["answered_right"]["n_eval"]) == (8, 6)
    assert step6["answered_right"]["mean_delta_p"] == pytest.approx((0 + 2 + 3 + 4 + 5 + 6) / 60)
    assert step6["answered_right"]["acc_with"] == pytest.approx(2 / 6)


def said(n_right: int, n_queries: int = 14) -> str:
    right = [int(i < n_right) for i in range(n_queries)]
    rows = [row(0.5)] * n_queries
    found = answered_right(right, range(n_queries), np.full((n_queries, 2), 0.2), HEADS, rows, range(n_queries))
    return stratum_sentence({"answered_right": found, "ability": {"n_trials": n_queries, "n_queries": n_queries}})


def test_fewer_than_six_queries_have_no_numbers_of_their_own() -> None:
    assert said(5) == "Of 14 clean prompts 5 are answered right (5 of 14 queries): too few for numbers of their own."
    assert said(6) == (
        "Of 14 clean prompts 6 are answered right (6 of 14 queries): over those the top heads' mean CIE is +0.200 "
        "(95% CI +0.200 to +0.200), over all +0.200; the vector changes P of the 6 zero-shot prompts of queries "
        "answered right by +0.500 (95% CI +0.500 to +0.500), over all +0.500."
    )


def test_nothing_is_said_where_all_or_none_are_answered_right() -> None:
    assert said(14) == said(0) == ""
