from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from measured_relations import measured
from relfv.stages.ability import majority_accuracy, p_by_majority, why_not
from relfv.types import Question, Snapshot, Target, WordPair


def test_what_the_model_can_do_is_a_matter_of_its_commonest_answer() -> None:
    one = measured("r", np.zeros(64), clean=0.9, majority=0.1)
    assert not why_not(one)
    assert "clean accuracy 0.10 is not above 0.10" in why_not(replace(one, clean_acc=0.1))
    assert "is not above 1.00" in why_not(replace(one, clean_acc=1.0, majority_acc=1.0))
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
