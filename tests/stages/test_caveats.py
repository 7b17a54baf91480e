"""What the trials themselves forbid to conclude."""

from __future__ import annotations

from typing import Any

import pytest

from relfv.stages.caveats import caveat_numbers, leading_sentence, tells_apart, trial_sentences
from relfv.types import Question, Snapshot, Target, WordPair

REFERENCE = {"clean": {"acc": 0.8, "mean_p": 0.7}, "corrupted": {"acc": 0.2, "mean_p": 0.1}}
ANSWERS = {
    "summary": {
        "exact_match_base": 0.0, "exact_match_with": 0.07,
        "begins_with_answer_base": 0.1, "begins_with_answer_with": 0.5,
    }
}  # fmt: skip


def numbers(
    answers: list[str], *, corrupted_acc: float = 0.2, accepted: tuple[tuple[str, int | None], ...] = (), **meta: Any
) -> dict[str, Any]:
    questions = tuple(
        Question("Q1", f"Q1-{i:03d}", i, WordPair(f"in{i}", answer), i, answer, Target((5,), True), accepted)
        for i, answer in enumerate(answers)
    )
    texts = tuple(answers)
    trials = Snapshot(
        {"n_demos": 9, "corruption": "derange", **meta}, questions, texts, texts, tuple(range(len(texts)))
    )
    reference = {**REFERENCE, "corrupted": {"acc": corrupted_acc, "mean_p": 0.1}}
    return caveat_numbers(trials, reference, ANSWERS)


WORDS = [f"word{i}" for i in range(20)]


def test_nothing_is_said_of_trials_that_are_as_they_should_be() -> None:
    found = numbers(WORDS)
    assert tells_apart(found)
    assert leading_sentence(found) == trial_sentences(found) == ""


@pytest.mark.parametrize(("n_alike", "apart"), [(2, True), (3, False), (20, False)])
def test_answers_that_share_the_scored_token_forbid_a_share_beyond_a_tenth(n_alike: int, apart: bool) -> None:
    found = numbers(WORDS, first_token_collisions=[{"token_id": 5, "token": "w", "answers": WORDS[:n_alike]}])
    assert tells_apart(found) is apart
    said = leading_sentence(found)
    if not apart:
        assert said.startswith("Whole answers: 0% right without and 7% with the function vector")
        assert "(10% and 50% begin with the answer)" in said
        assert f"{n_alike} of 20 trials are scored on a token that other answers begin with, too" in said
        assert "--target distinguishing" in said
        assert "no share of a gap is claimed" in said
    found["scored_token"]["target"] = "distinguishing"
    assert "--target" not in leading_sentence(found)


def test_white_space_alone_is_said() -> None:
    said = leading_sentence(numbers(WORDS, n_blank_targets=20))
    assert "20 of 20 trials are scored on white space alone" in said


@pytest.mark.parametrize(("corrupted", "said"), [(0.8, True), (0.73, True), (0.6, False), (0.0, False)])
def test_corruption_that_leaves_the_task_done_is_said(corrupted: float, said: bool) -> None:
    words = trial_sentences(numbers(WORDS, corrupted_acc=corrupted))
    assert ("do not take the task away" in words) is said
    assert (f"0.80 with clean and {corrupted:.2f} with corrupted" in words) is said


def test_few_labels_and_labels_in_place_are_said_with_what_to_choose_instead() -> None:
    words = trial_sentences(numbers(["yes", "no"] * 10, n_labels_left_in_place=60))
    assert words == (
        "60 of 180 corrupted demos keep a right label; with 2 distinct answers the others teach another relation, such "
        "as the inverse (--corruption random or other draws labels that teach none)."
    )
    alike = numbers(["yes"] * 20, n_labels_left_in_place=180)
    assert "180 of 180 corrupted demos keep a right label." in trial_sentences(alike)
    drawn = numbers(["yes", "no"] * 10, n_labels_left_in_place=60, corruption="random")
    assert trial_sentences(drawn) == "60 of 180 corrupted demos keep a right label."
    assert trial_sentences(numbers(WORDS, n_labels_left_in_place=18)) == ""


def test_right_answers_beside_the_trials_own_are_counted() -> None:
    found = numbers(WORDS, accepted=(("another", 7),), n_demos_of_query_input=4)
    assert found["n_queries_with_several_answers"] == 20
    assert found["n_demos_of_query_input"] == 4
