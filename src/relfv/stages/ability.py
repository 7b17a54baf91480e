"""Test of whether the model can do the relation at all: clean prompts that it answers right, beside what its commonest
answer given always would get; and the sentence, first in the verdict, on a relation that it cannot do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relfv.shares import mean_between
from relfv.stats import LEVEL
from relfv.types import Snapshot

CHANCE = 0.05
"""Largest probability that the majority answer alone reaches a relation's clean accuracy, for the relation to count as
one that the model can do."""
RULE = (
    "the accuracy of its clean prompts is above that of its commonest answer given always, and that answer alone would "
    f"be right as often with a probability of at most {CHANCE} (binomial, queries as the unit)"
)
"""The rule, in words, for a relation that the model can do."""


@dataclass(frozen=True, kw_only=True)
class Ability:
    """The numbers that the rule looks at."""

    clean_acc: float
    """Accuracy on the trials' clean prompts."""
    majority_acc: float
    """Accuracy of the one answer that is right most often, given to every trial."""
    n_queries: int


def majority_share(right: Iterable[Iterable[Hashable]]) -> float:
    """Share of the trials in which the answer that is right most often is right; ``right`` has each trial's right
    answers."""
    of_trials = [set(its) for its in right]
    return max(Counter(one for its in of_trials for one in its).values()) / len(of_trials)


def majority_accuracy(trials: Snapshot) -> float:
    """``majority_share`` of the scored tokens."""
    return majority_share(question.right_ids for question in trials.questions)


def p_by_majority(one: Ability) -> float:
    """Probability that the majority answer alone is right for at least as many of as many new queries: binomial, with
    the query as the unit, since trials that share one are no independent observations."""
    from scipy import stats

    right = math.floor(one.clean_acc * one.n_queries + 1e-9)
    return float(stats.binom.sf(right - 1, one.n_queries, one.majority_acc))


def why_not(one: Ability) -> str:
    """Why the relation is not one that the model can do; empty if it is."""
    if one.majority_acc == 1:
        return (
            "one answer is right in every trial, so no accuracy tells a model that does it from one that always says it"
        )
    if one.clean_acc <= one.majority_acc:
        return (
            f"clean accuracy {one.clean_acc:.2f} is not above {one.majority_acc:.2f}, that of its commonest answer "
            "given always"
        )
    if (p := p_by_majority(one)) > CHANCE:
        return (
            f"clean accuracy {one.clean_acc:.2f} over {one.n_queries} queries is not shown to be above "
            f"{one.majority_acc:.2f}, that of its commonest answer given always (p {p:.2f})"
        )
    return ""


def ability_numbers(
    right: Sequence[int], clusters: Sequence[int], majority_acc: float, judged_by: str
) -> dict[str, Any]:
    """The numbers on ability for summary.json. ``right`` (trial,): 1 where the clean prompt is answered right, by
    ``judged_by``, as ``majority_acc`` is."""
    value, low, high = mean_between(np.asarray(right), clusters)
    one = Ability(clean_acc=value, majority_acc=majority_acc, n_queries=len(set(clusters)))
    why = why_not(one)
    return {
        "can_do": not why,
        "why_not": why,
        "judged_by": judged_by,
        "clean_acc": {"value": value, "low": low, "high": high},
        "majority_acc": majority_acc,
        "p_by_majority": p_by_majority(one),
        "n_trials": len(right),
        "n_queries": one.n_queries,
    }


def in_short(able: Mapping[str, Any]) -> str:
    """A verb for "the model ... it", from ``ability_numbers``: what the model does of the relation; empty if it can do
    it."""
    if able["can_do"]:
        return ""
    # Where one answer is always right, no accuracy can tell a model that does it from one that says that word.
    is_below = able["clean_acc"]["value"] <= able["majority_acc"] < 1
    return "cannot do" if is_below else "is not shown to do"


def ability_sentence(numbers: Mapping[str, Any]) -> str:
    """Sentence on a relation that the model cannot do, or is not shown to do; empty if it can."""
    able = numbers["ability"]
    if able["can_do"]:
        return ""
    acc, how = able["clean_acc"], ", by whole answers" if able["judged_by"] == "whole_answers" else ""
    interval = f"the accuracy's {LEVEL:.0%} CI is {acc['low']:.2f} to {acc['high']:.2f}{how}"
    return (
        f"The model {in_short(able)} this relation: {able['why_not']}; {interval}. What follows says how the right "
        "answer's P moves, not how the model does the task."
    )
