"""Heads over relations: the AIE of every head with the relation as the unit, and the heads that lead it (Todd et al.
2024, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relfv.stages.ability import Ability
from relfv.stages.scores import COLUMNS, measure_of, rank_heads, select_heads
from relfv.stats import Stability, clustered_mean, false_discovery, sign_flip_p_values, top_k_stability
from relfv.types import HeadId, ScoredHead

AVERAGED = [name for name in COLUMNS if not name.startswith("mean_delta_p_")]
"""Columns of cie_scores.csv whose mean over relations is taken; those left out are a single relation's errors."""


@dataclass(frozen=True, kw_only=True)
class RelationResults(Ability):
    """The numbers of one finished relation, from its files."""

    name: str
    scored: tuple[ScoredHead, ...]
    """The scored heads, by layer, then head; the same heads in every relation."""
    top: tuple[HeadId, ...]
    """The relation's own top heads, best first."""
    n_trials: int
    vector: np.ndarray
    """float32 (resid_dim,)"""
    means: np.ndarray
    """float32 (layer, head, head_dim): clean means."""
    answers: frozenset[int]
    """The tokens that its trials are scored on."""


@dataclass(frozen=True)
class OverRelations:
    """Heads over relations; arrays are (head,) in the order of ``scored``."""

    scored: tuple[ScoredHead, ...]
    """The scored heads, by layer, then head; scores are means over relations, ``n_trials`` the trials of all."""
    se: np.ndarray
    """Standard error of the score key's mean, from the spread over relations. Infinite for one relation, as the
    interval is."""
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    """Two-sided p-value that the mean signed effect is 0, by sign flips of relations."""
    fdr: np.ndarray
    n_positive: np.ndarray
    """int: number of relations in which the signed effect is above 0."""
    n_in_own_top: np.ndarray
    """int: number of relations that have the head among their own top heads."""
    stability: Stability
    """Stability of the top k under resampling of relations."""
    score_key: str
    k: int

    @property
    def ranked(self) -> list[ScoredHead]:
        """The scored heads, best first."""
        return rank_heads(self.scored, self.score_key)

    @property
    def universal(self) -> list[HeadId]:
        """The top k by AIE, best first."""
        return [head.id for head in self.ranked[: self.k]]


def over_relations(relations: Sequence[RelationResults], score_key: str, k: int) -> OverRelations:
    """AIE of every head: the mean of each relation's score, each relation counting once. At least one relation.

    A mean is the correctly rounded sum by the number of relations, so that it does not hang on their order. The
    interval is Student's t over relations. Percentiles of resampled relations would be too short for so few; what
    resampling says is how often a head stays among the top k.
    """
    rows = [one.scored for one in relations]
    scored = tuple(
        ScoredHead(
            of_head[0].id,
            {name: math.fsum(head.scores[name] for head in of_head) / len(of_head) for name in AVERAGED},
            sum(head.n_trials for head in of_head),
        )
        for of_head in zip(*rows, strict=True)
    )
    values = np.array([[head.scores[score_key] for head in row] for row in rows])
    # An absolute effect is above 0 whatever a head does; whether a head does anything is asked of the effect itself.
    effects = np.array([[head.scores[f"mean_delta_{measure_of(score_key)}"] for head in row] for row in rows])
    units = range(len(relations))
    mean, p_value = clustered_mean(values, units), sign_flip_p_values(effects, units)
    k = min(k, len(scored))
    return OverRelations(
        scored=scored,
        se=mean.se,
        low=mean.low,
        high=mean.high,
        p_value=p_value,
        fdr=false_discovery(p_value),
        n_positive=(effects > 0).sum(0),
        n_in_own_top=np.array([sum(head.id in one.top for one in relations) for head in scored]),
        stability=top_k_stability(values, units, k, seed="relfv-aggregate"),
        score_key=score_key,
        k=k,
    )


def heads_of_the_others(relations: Sequence[RelationResults], target: str, score_key: str, k: int) -> list[HeadId]:
    """The top k by AIE over the relations besides ``target``, best first; at least one other."""
    rows = [one.scored for one in relations if one.name != target]
    scored = [
        ScoredHead(of_head[0].id, {score_key: math.fsum(head.scores[score_key] for head in of_head) / len(rows)}, 0)
        for of_head in zip(*rows, strict=True)
    ]
    return [head.id for head in select_heads(rank_heads(scored, score_key), min(k, len(scored)))]
