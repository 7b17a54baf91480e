"""Clean prompts of the CSV's other relations: a head's mean activation there is what it does whatever the relation
(ablation.py).

They are drawn from the CSV alone, so that no q_id depends on which others have been run; and those that were used are
kept beside the results, so that a CSV whose other rows have changed is noticed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from relfv.errors import InputError
from relfv.settings import Settings
from relfv.stages.new_queries import as_snapshot
from relfv.stages.prompts import SPEC_FORMAT, AnswerTokens
from relfv.stages.stage import Work
from relfv.stages.trials import ineligible_reason, sample_trials
from relfv.types import PromptedTrial, Prompts, Relation, Trial

if TYPE_CHECKING:
    import torch

N_PROMPTS = 50


def trials_of_others(relation: Relation, settings: Settings) -> dict[str, list[Trial]]:
    """q_id -> first trials of that other relation, as a run with these settings freezes them: ``N_PROMPTS`` in all,
    spread evenly over the relations; where the CSV has more relations than that, over as many at random. Empty where no
    other can be used."""
    others = list(islice(_usable(relation, settings), N_PROMPTS))
    n_each, n_more = divmod(N_PROMPTS, len(others) or 1)
    return {
        other.q_id: sample_trials(
            other,
            seed=settings.seed,
            n_trials=n_each + (i < n_more),
            n_demos=settings.n_demos,
            corruption=settings.corruption,  # type: ignore[arg-type]
        )
        for i, other in enumerate(others)
    }


def _usable(relation: Relation, settings: Settings) -> Iterator[Relation]:
    """Other relations with rows enough, in a random order; not those that have half of their pairs or more in common
    with this one, which do not count as others."""
    own, q_ids = set(relation.pairs), sorted(relation.csv_pairs.keys() - {relation.q_id})
    for q_id in random.Random(f"relfv:other_relations:{settings.seed}:{relation.q_id}").sample(q_ids, len(q_ids)):
        other = Relation(q_id, relation.csv_pairs[q_id], relation.csv_answers)
        shared = len(own & set(other.pairs))
        if 2 * shared < min(len(own), len(set(other.pairs))) and not ineligible_reason(
            other, settings.n_demos, settings.corruption
        ):
            yield other


def as_recorded(trials: dict[str, list[Trial]]) -> list[dict[str, Any]]:
    """Entries of the prompts for ablation.json, one for each prompt."""
    return [
        {"q_id": q_id, "trial_id": trial.trial_id, "clean_prompt_str": clean_text(trial)}
        for q_id, its in sorted(trials.items())
        for trial in its
    ]


def clean_text(trial: Trial) -> str:
    """The clean prompt in the spec's format."""
    return SPEC_FORMAT.clean(trial.demos_clean, trial.query.input)


@dataclass(frozen=True)
class OtherRelations:
    """Mean activations of heads on prompts of other relations."""

    means: torch.Tensor | None
    """float32 (layer, head, head_dim): z at the last token, mean over the prompts; None where there are none."""
    record: dict[str, Any]
    """Entry for the file: why there are none, how many prompts, of which relations, their text, and by trial_id the
    tokens that are fed after it, as in that relation's own run, where there are any."""


def measure_others(work: Work) -> OtherRelations:
    """Run the other relations' prompts once. A relation whose words or lengths the model does not take is left out."""
    from relfv.engine.clean import run_clean

    assert work.relation is not None  # relfv run gives it, and nothing else runs studies
    drawn = trials_of_others(work.relation, work.settings)
    used: list[Prompts] = []
    fed: dict[str, list[int]] = {}
    left_out: dict[str, str] = {}
    for q_id, trials in sorted(drawn.items()):
        try:
            prompted = _prompted(work, q_id, trials)
            used.append(work.tokenised(as_snapshot(prompted), clean=True))
            fed |= {one.trial.trial_id: list(one.target.fed_ids) for one in prompted if one.target.fed_ids}
        except InputError as problem:
            left_out[q_id] = str(problem)
    reason = None if used else "the CSV has no other relation with rows enough for a query and its demos"
    if left_out and not used:
        reason = "the model takes no other relation's prompts"
    prompts = Prompts([ids for some in used for ids in some.ids], [target for some in used for target in some.targets])
    record = {
        "not_available": reason,
        "n_prompts": len(prompts),
        "n_prompts_of": dict(Counter({q_id: len(its) for q_id, its in sorted(drawn.items()) if q_id not in left_out})),
        "left_out": left_out,
        "fed_ids": fed,
        "prompts": as_recorded(drawn),
    }
    if not used:
        return OtherRelations(None, record)
    return OtherRelations(run_clean(work.model.backbone, prompts).activations.double().mean(0).float(), record)


def _prompted(work: Work, q_id: str, trials: Sequence[Trial]) -> list[PromptedTrial]:
    assert work.relation is not None
    other = Relation(q_id, work.relation.csv_pairs[q_id], work.relation.csv_answers)
    answers = AnswerTokens(other, work.model.tokens, work.settings.target)
    return [answers.prompted(trial) for trial in trials]
