"""Limits that the trials themselves set to conclusions: tokens that cannot tell answers apart, corruption that corrupts
nothing, labels that stay right. Numbers for summary.json, and the verdict's sentences on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relfv.types import Snapshot

AMBIGUOUS = 0.1
"""Share of the trials: if more of them are scored on a token that other answers share, scores are not read as the
task."""
_STILL_DONE = 0.9
"""Share of the clean accuracy: where corrupted prompts keep so much of it, corruption has not taken the task away."""
_IN_PLACE = 0.1
"""Share of the corrupted demos: if more of them keep a right label, the verdict says so."""
_FEW = 3
"""Number of distinct answers up to which a permutation of labels is close to a relation of its own."""


def caveat_numbers(
    trials: Snapshot, reference: Mapping[str, Mapping[str, float]], answers: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers behind the caveats, from the frozen trials, stepE_eval.json's ``reference`` points and
    answers.json."""
    numbers = trial_numbers(trials)
    reached = {
        f"{measure}_{name}": reference[name][key]
        for name in ("clean", "corrupted")
        for measure, key in (("acc", "acc"), ("p", "mean_p"))
    }
    whole = {
        f"{name}{half}": answers["summary"][f"{measure}_{half}"]
        for name, measure in (("", "exact_match"), ("begun_", "begins_with_answer"))
        for half in ("base", "with")
    }
    token, corruption = numbers.pop("scored_token"), numbers.pop("corruption")
    return {"scored_token": token, "whole_answers": whole, "corruption": {**corruption, **reached}, **numbers}


def trial_numbers(trials: Snapshot) -> dict[str, Any]:
    """The numbers that the frozen trials alone give, before any model has run."""
    meta, questions = trials.meta, trials.questions
    alike = {answer for collision in meta.get("first_token_collisions", ()) for answer in collision["answers"]}
    n_shared = sum(question.answer in alike for question in questions)
    n_ambiguous = max(n_shared, meta.get("n_blank_targets", 0))
    return {
        "scored_token": {
            "target": meta.get("target", "first"),
            "n_trials": len(questions),
            "n_answer_shares_it": n_shared,
            "n_white_space_alone": meta.get("n_blank_targets", 0),
            "n_space_fed": sum(bool(question.target.space_ids) for question in questions),
            "tells_answers_apart": n_ambiguous <= AMBIGUOUS * len(questions),
        },
        "corruption": {
            "how": meta.get("corruption"),
            "n_demos": len(questions) * meta.get("n_demos", 0),
            "n_labels_in_place": meta.get("n_labels_left_in_place", 0),
            "n_distinct_answers": len({question.answer for question in questions}),
        },
        "n_queries_with_several_answers": len({q.query.input for q in questions if q.accepted}),
        "n_demos_of_query_input": meta.get("n_demos_of_query_input", 0),
    }


def tells_apart(numbers: Mapping[str, Any]) -> bool:
    """Whether the scored token tells answers apart, so that P and accuracy may be read as the task."""
    return numbers["scored_token"]["tells_answers_apart"]


def leading_sentence(numbers: Mapping[str, Any]) -> str:
    """Sentence before the heads, in place of any share of a gap, where scored tokens do not tell answers apart; else
    empty."""
    if tells_apart(numbers):
        return ""
    token, whole = numbers["scored_token"], numbers["whole_answers"]
    n, blank = token["n_trials"], token["n_white_space_alone"]
    shared = f"{token['n_answer_shares_it']} of {n} trials are scored on a token that other answers begin with, too"
    words = f"{blank} of {n} trials are scored on white space alone" if blank else shared
    remedy = "" if token["target"] == "distinguishing" else " (--target distinguishing scores one that does)"
    return (
        f"Whole answers: {whole['base']:.0%} right without and {whole['with']:.0%} with the function vector at its "
        f"layer ({whole['begun_base']:.0%} and {whole['begun_with']:.0%} begin with the answer). The scored tokens "
        f"cannot tell answers apart: {words}{remedy}, so that P and accuracy here say little of the relation, and no "
        "share of a gap is claimed."
    )


def trial_sentences(numbers: Mapping[str, Any]) -> str:
    """Sentences of the verdict on the corruption."""
    return " ".join(
        part for part in (_not_corrupted(numbers["corruption"]), labels_in_place(numbers["corruption"])) if part
    )


def _not_corrupted(corruption: Mapping[str, Any]) -> str:
    clean, corrupted = corruption["acc_clean"], corruption["acc_corrupted"]
    if clean <= 0 or corrupted < _STILL_DONE * clean:
        return ""
    return (
        f"Corrupted demos do not take the task away (accuracy {clean:.2f} with clean and {corrupted:.2f} with "
        f"corrupted labels, P {corruption['p_clean']:.2f} and {corruption['p_corrupted']:.2f}): what heads change here "
        "is how sure the model is, not what it answers."
    )


def labels_in_place(corruption: Mapping[str, Any]) -> str:
    """Sentence on labels that corruption leaves right, or that teach another relation; empty where they are few."""
    n, kept, distinct = (corruption[name] for name in ("n_demos", "n_labels_in_place", "n_distinct_answers"))
    few = distinct <= _FEW and corruption["how"] in ("derange", "shuffle")
    if not few and kept <= _IN_PLACE * n:
        return ""
    words = f"{kept} of {n} corrupted demos keep a right label"
    if few and kept < n:
        words += f"; with {distinct} distinct answers the others teach another relation, such as the inverse"
        words += " (--corruption random or other draws labels that teach none)"
    return f"{words}."
