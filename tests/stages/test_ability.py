from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from measured_relations import measured
from relfv.cli import main
from relfv.stages.ability import (
    ability_numbers,
    ability_sentence,
    in_short,
    majority_accuracy,
    majority_share,
    p_by_majority,
    why_not,
)
from relfv.types import Question, Snapshot, Target, WordPair


def test_what_the_model_can_do_is_a_matter_of_its_commonest_answer() -> None:
    one = measured("r", np.zeros(64), clean=0.9, majority=0.1)
    assert not why_not(one)
    assert "clean accuracy 0.10 is not above 0.10" in why_not(replace(one, clean_acc=0.1))
    assert "one answer is right in every trial" in why_not(replace(one, clean_acc=1.0, majority_acc=1.0))
    few = replace(one, clean_acc=0.6, majority_acc=0.5, n_queries=10)
    assert p_by_majority(few) == pytest.approx(386 / 1024)  # six or more heads of ten tosses
    assert "over 10 queries is not shown to be above 0.50" in why_not(few)


def test_the_commonest_answer_counts_every_answer_that_is_right() -> None:
    def asked(*tokens: int) -> Question:
        pair = WordPair("a", "b")
        others = tuple((str(token), token) for token in tokens[1:])
        return Question("r", "r-000", 0, pair, 0, "b", Target((tokens[0],), True), others)

    questions = (asked(1), asked(2, 1), asked(3), asked(3, 1))
    assert majority_accuracy(Snapshot({}, questions, (), (), (0, 1, 2, 3))) == 0.75


def simulated(rng: np.random.Generator, right: Callable[[int], float]) -> dict[str, Any]:
    """25 trials of 14 queries, the answer of each fifth row being the commonest; P(clean prompt right) is ``right`` of
    the query, and trials of one query are right together."""
    queries = rng.integers(0, 14, 25)
    answers = [[0] if query % 5 == 0 else [int(query)] for query in queries]
    of_query = [rng.random() < right(query) for query in range(14)]
    found = [int(of_query[query]) for query in queries]
    return ability_numbers(found, queries.tolist(), majority_share(answers), "scored_token")


def does_nothing(_: int) -> float:
    return 0.02


def says_the_commonest_answer(query: int) -> float:
    return float(query % 5 == 0)


def does_it(_: int) -> float:
    return 0.9


@pytest.mark.parametrize(
    ("truth", "acc", "least", "most"),
    [(does_nothing, 0.02, 0, 0), (says_the_commonest_answer, 3 / 14, 0, 0), (does_it, 0.9, 0.98, 1)],
)
def test_of_relations_whose_truth_is_known_those_that_the_model_does_are_called(
    truth: Callable[[int], float], acc: float, least: float, most: float
) -> None:
    rng = np.random.default_rng(3)
    found = [simulated(rng, truth) for _ in range(200)]
    assert least <= np.mean([one["can_do"] for one in found]) <= most
    covered = [one["clean_acc"]["low"] - 1e-9 <= acc <= one["clean_acc"]["high"] + 1e-9 for one in found]
    assert np.mean(covered) >= 0.94
    assert all(0 <= one["clean_acc"]["low"] <= one["clean_acc"]["high"] <= 1 for one in found)


def test_a_model_that_is_right_as_often_as_the_commonest_answer_is_rarely_called_able() -> None:
    rng = np.random.default_rng(4)
    found = [simulated(rng, lambda _: 0.25) for _ in range(200)]
    assert np.mean([one["can_do"] for one in found]) <= 0.06


def test_where_one_answer_is_always_right_nothing_can_be_told() -> None:
    numbers = {"ability": ability_numbers([1] * 12, range(12), 1.0, "scored_tokens")}
    assert in_short(numbers["ability"]) == "is not shown to do"
    assert "one answer is right in every trial" in ability_sentence(numbers)


def test_all_of_25_trials_right_is_not_certainty() -> None:
    found = ability_numbers([1] * 25, [i % 14 for i in range(25)], 0.1, "scored_token")
    assert found["clean_acc"]["value"] == 1
    assert found["clean_acc"]["low"] < 0.8
    assert ability_sentence({"ability": found}) == ""


def test_what_it_cannot_do_and_what_is_not_shown_are_told_apart() -> None:
    none = ability_numbers([0] * 14, range(14), 0.1, "scored_token")
    said = ability_sentence({"ability": none})
    assert said.startswith("The model cannot do this relation: clean accuracy 0.00 is not above 0.10, that of its")
    assert "the accuracy's 95% CI is 0.00 to 0.2" in said
    few = ability_numbers([1, 1, 1] + [0] * 11, range(14), 0.1, "whole_answers")
    assert few["p_by_majority"] > 0.05
    said = ability_sentence({"ability": few})
    assert said.startswith("The model is not shown to do this relation: clean accuracy 0.21 over 14 queries")
    assert ", by whole answers. What follows says how the right answer's P moves" in said


def test_a_finished_relation_that_the_model_cannot_do_says_so_first_as_aggregate_does(finished: Path) -> None:
    artifacts = finished / "A1/artifacts"
    found, eval_ = (json.loads((artifacts / name).read_text()) for name in ("summary.json", "stepE_eval.json"))
    assert found["verdict"].startswith("The model cannot do this relation: clean accuracy 0.")
    right = eval_["reference"]["clean"]["right"]
    assert np.mean(right) == eval_["reference"]["clean"]["acc"] == found["ability"]["clean_acc"]["value"]
    assert found["ability"]["judged_by"] == "scored_token"
    assert found["answered_right"]["n_trials"] == sum(right)


def test_where_scored_tokens_are_shared_whole_answers_judge(llama_path: Path, tmp_path: Path) -> None:
    rows = [
        f"S,{word},mexico {word}" for word in ("dog", "cat", "cow", "kid", "cub", "owl", "eel", "hare", "frog", "foal")
    ]
    path = tmp_path / "shared.csv"
    path.write_text("\n".join(["id,ex_A,ex_B", *rows]))
    arguments = ["run", "--model", str(llama_path), "--relation_csv_path", str(path), "--out_root", str(tmp_path)]
    assert main([*arguments, "--n_trials_per_q", "12"]) == 0
    artifacts = tmp_path / "shared/S/artifacts"
    found, answers = (json.loads((artifacts / name).read_text()) for name in ("summary.json", "step6/answers.json"))
    assert not found["scored_token"]["tells_answers_apart"]
    assert found["ability"]["judged_by"] == "whole_answers"
    assert len(answers["clean_prompts"]) == 12
    # Of the shared token the commonest answer would always be right; of whole answers it is not.
    assert found["ability"]["majority_acc"] < 0.5
    assert "by whole answers. What follows" in found["verdict"].split("Whole answers:")[0]
