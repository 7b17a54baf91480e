"""The zero-shot snapshot: the frozen trials' queries without demos, and which of them Step6 evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relfv.settings import Settings
from relfv.stages.prompts import ZERO_SHOT_FORMAT, zero_shot_prompt
from relfv.stages.snapshot import read_snapshot, target_keys
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes
from relfv.store.status import QidStatus
from relfv.types import Prompts, Question, Snapshot


def trials_to_evaluate(zero_shot: Snapshot, n_eval: int, *, allow_duplicates: bool) -> Snapshot:
    """The first ``n_eval`` trials in order, each distinct query once.

    A query drawn in five trials gives one and the same zero-shot prompt five times; counting it five times would
    make the sample look larger than it is.
    """
    first: dict[Any, int] = {}
    for index, question in enumerate(zero_shot.questions):
        first.setdefault(index if allow_duplicates else question.query, index)
    return zero_shot.only(list(first.values())[:n_eval])


# --- files ---------------------------------------------------------------------------------------------------------


def read_zero_shot_trials(path: Path) -> Snapshot:
    """Read sampled_trials_zeroshot.json. Raises InputError if it is missing, RunError if it is not one."""
    return read_snapshot(path, with_demos=False)


ZERO_SHOT_TRIALS = File("sampled_trials_zeroshot.json", read_zero_shot_trials)


def _document(trials: Snapshot) -> dict[str, Any]:
    return {
        "meta": {**trials.meta, "zero_shot": True, "prompt_format": ZERO_SHOT_FORMAT},
        "trials": [_trial(question) for question in trials.questions],
    }


def _trial(question: Question) -> dict[str, Any]:
    row = question.query_source_index
    return {
        "q_id": question.q_id,
        "trial_id": question.trial_id,
        "trial_idx": question.trial_idx,
        "query": vars(question.query),
        **({} if row is None else {"query_source_index": row}),
        "target_str": question.answer,
        "corrupted_prompt_str": zero_shot_prompt(question.query.input),  # the contract's name for the prompt
        **target_keys(question.target, question.accepted),
        "target_id": question.target.token_id,  # the spec's name for it
    }


# --- the stage -----------------------------------------------------------------------------------------------------


def evaluated(work: Work) -> Snapshot:
    """The zero-shot trials that Step6 evaluates (``work.once(evaluated)``)."""
    return evaluated_of(work.read(ZERO_SHOT_TRIALS), work.settings)


def evaluated_of(zero_shot: Snapshot, settings: Settings) -> Snapshot:
    """The trials of any zero-shot snapshot that Step6 evaluates under ``settings``."""
    return trials_to_evaluate(zero_shot, settings.n_eval, allow_duplicates=settings.allow_query_duplicates)


def evaluated_prompts(work: Work) -> Prompts:
    """The prompts of the evaluated trials as token ids (``work.once(evaluated_prompts)``)."""
    return work.tokenised(work.once(evaluated))


def _take(work: Work) -> str:
    trials = work.read(TRIALS)
    work.write(ZERO_SHOT_TRIALS, json_bytes(_document(trials)))
    return f"{len(trials.questions)} prompts"


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    asked = [
        [(question.trial_id, question.query, question.target) for question in folder.read(file).questions]
        for file in (TRIALS, ZERO_SHOT_TRIALS)
    ]
    yield Check(folder.path(ZERO_SHOT_TRIALS), "the same queries as sampled_trials.json", asked[0] == asked[1])


STAGE = Stage(
    "zeroshot",
    "The frozen trials' queries without demos.",
    _take,
    reads=(TRIALS,),
    writes=(ZERO_SHOT_TRIALS,),
    agrees=_agrees,
    share=0.01,
)
