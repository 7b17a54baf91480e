"""The frozen trials in another prompt format: the same queries, demos and corrupted labels in other words, and the
tokens that answers begin with there, found as for the spec's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from relfv.stages.means import clean_run
from relfv.stages.prompts import SPEC_FORMAT, AnswerTokens, PromptFormat
from relfv.stages.stage import Work
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import evaluated_of
from relfv.store.formats import read_json
from relfv.types import Prompts, Snapshot, Trial, WordPair

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun


@dataclass(frozen=True)
class Shown:
    """The frozen trials in one prompt format."""

    format: PromptFormat
    few_shot: Snapshot
    zero_shot: Snapshot
    """Zero-shot prompts of the queries that Step6 evaluates."""
    zero_shot_prompts: Prompts
    clean: CleanRun
    corrupted_prompts: Prompts


def show(frozen: Snapshot, trials: Sequence[Trial], answers: AnswerTokens, shown: PromptFormat) -> Snapshot:
    """Frozen trials in another format: texts, and the tokens that their answers begin with there."""
    prompted = [answers.prompted(trial) for trial in trials]
    questions = [
        replace(question, target=item.target, accepted=item.accepted)
        for question, item in zip(frozen.questions, prompted, strict=True)
    ]
    return replace(
        frozen,
        questions=tuple(questions),
        prompts=tuple(item.corrupted_prompt for item in prompted),
        clean_prompts=tuple(item.clean_prompt for item in prompted),
        meta={"format": shown.name},
    )


def read_frozen_trials(path: Path) -> list[Trial]:
    """The trials of sampled_trials.json with their demos."""

    def pairs(of: Sequence[Mapping[str, str]]) -> tuple[WordPair, ...]:
        return tuple(WordPair(**pair) for pair in of)

    return [
        Trial(
            **{key: one[key] for key in ("q_id", "trial_id", "trial_idx", "query_source_index")},
            **{key: one[key] for key in ("n_labels_in_place", "n_demos_of_query_input")},
            query=WordPair(**one["query"]),
            demo_source_indices=tuple(one["demo_source_indices"]),
            demos_clean=pairs(one["demos_clean"]),
            demos_corrupted=pairs(one["demos_corrupted"]),
        )
        for one in read_json(path)["trials"]
    ]


def shown_in(work: Work, shown: PromptFormat) -> Shown:
    from relfv.engine.clean import run_clean

    frozen, settings = work.read(TRIALS), work.settings
    assert work.relation
    if shown is SPEC_FORMAT:
        few_shot = frozen
    else:
        answers = AnswerTokens(work.relation, work.model.tokens, settings.target, shown)
        few_shot = show(frozen, read_frozen_trials(work.folder.path(TRIALS)), answers, shown)
    texts = tuple(shown.zero_shot(question.query.input) for question in few_shot.questions)
    zero_shot = evaluated_of(replace(few_shot, prompts=texts, clean_prompts=()), settings)
    prompts = work.tokenised(few_shot, clean=True)
    clean = work.once(clean_run) if shown is SPEC_FORMAT else run_clean(work.model.backbone, prompts)
    return Shown(shown, few_shot, zero_shot, work.tokenised(zero_shot), clean, work.tokenised(few_shot))
