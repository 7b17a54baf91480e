from __future__ import annotations

import numpy as np
import pytest

from relfv.stages.head_evidence import evidence_of_head, evidence_of_list
from relfv.stats import FDR, POWER, detectable_mean, sign_flip_p_values
from relfv.types import HeadId, ScoredHead

QUERIES = [*range(16), *range(9)]
"""Of 25 trials."""


def head(mean: float, se: float, base: float = 0.2) -> ScoredHead:
    scores = {"mean_delta_p": mean, "mean_delta_p_se": se, "mean_p_base": base, "mean_delta_p_fdr": 0.01}
    return ScoredHead(HeadId(0, 0), scores, len(QUERIES))


def test_a_heads_effect_is_a_share_of_what_corruption_took() -> None:
    assert evidence_of_head(head(0.3, 0.1), 0.0, None, 0.8)["share_of_clean_minus_corrupted"] == pytest.approx(0.5)
    assert evidence_of_head(head(-0.3, 0.1), 0.0, None, 0.8)["share_of_clean_minus_corrupted"] == pytest.approx(-0.5)
    assert evidence_of_head(head(0.3, 0.1), 0.0, None, 0.22)["share_of_clean_minus_corrupted"] is None


@pytest.mark.parametrize("mean", [0.3, -0.3])
def test_a_head_is_told_from_noise_by_the_size_of_its_effect_and_by_its_false_discovery_rate(mean: float) -> None:
    assert evidence_of_head(head(mean, 0.1), 0.29, None, 0.8)["distinguishable"]
    assert not evidence_of_head(head(mean, 0.1), 0.31, None, 0.8)["distinguishable"]
    uncertain = head(mean, 0.1)
    uncertain.scores["mean_delta_p_fdr"] = 0.06
    assert not evidence_of_head(uncertain, 0.0, None, 0.8)["distinguishable"]


def test_an_effect_of_the_detectable_size_is_found_as_often_as_is_said() -> None:
    rng = np.random.default_rng(0)
    of_query = rng.standard_normal((2000, 16))[:, QUERIES].T  # a head's effect is the same in all trials of a query
    sizes = np.bincount(QUERIES) / len(QUERIES)
    se = float(np.sqrt((sizes**2).sum()))
    effect = detectable_mean(se, QUERIES, FDR)
    found = (sign_flip_p_values(of_query + effect, QUERIES) <= FDR).mean()
    assert found == pytest.approx(POWER, abs=0.06)
    assert detectable_mean(se, [3] * 5, FDR) == np.inf


def test_among_all_heads_more_is_needed_and_nothing_is_promised_that_flips_of_few_queries_cannot_show() -> None:
    top = [head(0.3, se) for se in (0.01, 0.02, 0.03)]
    numbers = evidence_of_list(top, [True, True, False], 1024, QUERIES)["detectable_mean_delta_p"]
    assert numbers["se"] == 0.02
    assert numbers["alone"] == detectable_mean(0.02, QUERIES, FDR) < numbers["among_all"]
    of_three = evidence_of_list(top, [False] * 3, 8, [0, 1, 2])
    assert of_three["n_called_at_once"] > 8
    assert of_three["detectable_mean_delta_p"]["among_all"] is None
    assert "detectable_mean_delta_p" not in evidence_of_list(
        [ScoredHead(HeadId(0, 0), {"mean_delta_p": 0.1}, 25)], [True], 8, QUERIES
    )
