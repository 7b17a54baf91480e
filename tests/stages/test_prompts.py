"""Prompts, and which token tells an answer."""

from __future__ import annotations

import pytest

from conftest import WORDS, make_tokenizer
from relfv.models.tokens import Tokens
from relfv.stages.prompts import AnswerTokens, prompts_to_read
from relfv.stages.trials import sample_trials
from relfv.types import PromptedTrial, Relation, WordPair

TOKENS = Tokens(make_tokenizer(vocab_size=258))
"""Byte by byte: answers share many first tokens, and each begins with a space of its own."""


def years() -> Relation:
    return Relation("when", tuple(WordPair(f"in{i}", str(1901 + i)) for i in range(12)))


def prompted(relation: Relation, *, distinguishing: bool) -> tuple[AnswerTokens, list[PromptedTrial]]:
    answers = AnswerTokens(relation, TOKENS, "distinguishing" if distinguishing else "first")
    trials = sample_trials(relation, seed=0, n_trials=25, n_demos=9)
    return answers, [answers.prompted(trial) for trial in trials]


def read_texts(items: list[PromptedTrial]) -> list[str]:
    """What the model reads of each clean prompt."""
    texts = [item.clean_prompt for item in items]
    prompts = prompts_to_read(texts, [item.target for item in items], TOKENS, ())
    assert [TOKENS.tokenizer.decode([token]) for token in prompts.targets] == [
        item.trial.query.output[item.target.n_fed] for item in items
    ]
    return [TOKENS.tokenizer.decode(ids[1:]) for ids in prompts.ids]  # without BOS


def test_answers_with_one_first_token_collide() -> None:
    answers, items = prompted(years(), distinguishing=False)
    ((token, alike),) = answers.collisions()
    assert TOKENS.text(token) == "1"
    assert len(alike) == 12
    assert {item.target.n_fed for item in items} == {0}
    assert read_texts(items) == [f"{item.clean_prompt} " for item in items]


def test_the_distinguishing_token_is_the_first_that_no_other_answer_shares_after_what_they_share() -> None:
    answers, items = prompted(years(), distinguishing=True)
    assert answers.collisions() == []
    texts = read_texts(items)
    for item, text in zip(items, texts, strict=True):
        year = item.trial.query.output
        assert text == f"{item.clean_prompt} {year[:3]}"
        assert item.target.n_fed == 3


def test_an_answer_that_another_continues_is_scored_on_its_last_token_and_collides() -> None:
    pairs = [WordPair(f"in{i}", f"{i % 10}{'x' * (i > 9)}") for i in range(13)]
    answers, items = prompted(Relation("Q1", tuple(pairs)), distinguishing=True)
    lengths = {item.trial.query.output: item.target.n_fed for item in items}
    assert {(len(answer), n) for answer, n in lengths.items()} == {(1, 0), (2, 1)}
    assert [alike for _, alike in answers.collisions()] == [["0", "0x"], ["1", "1x"], ["2", "2x"]]


@pytest.mark.parametrize("distinguishing", [False, True])
def test_every_right_answer_is_known_by_its_token_after_the_same_prompt(distinguishing: bool) -> None:
    pairs = [WordPair(f"in{i}", f"out{i}") for i in range(12)]
    pairs += [WordPair("in0", other) for other in ("outside", "0", "out")] + [WordPair("in1", "outdoors")]
    _, items = prompted(Relation("Q1", tuple(pairs)), distinguishing=distinguishing)
    (of_in0, *_) = [item for item in items if item.trial.query.input == "in0"]
    others = dict(of_in0.accepted)
    assert {of_in0.trial.query.output, *others} == {"out0", "outside", "0", "out"}
    for answer, token in others.items():
        n = of_in0.target.n_fed
        fits = answer[:n] == of_in0.trial.query.output[:n] and len(answer) > n  # "out" may be all that is fed
        assert (None if token is None else TOKENS.text(token)) == (answer[n] if fits else None)
    assert all(item.accepted == () for item in items if item.trial.query.input not in ("in0", "in1"))


def test_an_answer_that_needs_another_space_fed_is_told_by_no_token() -> None:
    """Words begin with a space, and in front of digits it is a token of its own."""
    tokens = Tokens(make_tokenizer())
    relation = Relation("Q1", tuple(WordPair(*pair) for pair in [*WORDS, ("dog", "0")]))
    answers = AnswerTokens(relation, tokens)
    items = [answers.prompted(trial) for trial in sample_trials(relation, seed=0, n_trials=60, n_demos=9)]
    of_dog = {item.trial.query.output: item for item in items if item.trial.query.input == "dog"}
    assert [bool(of_dog[answer].target.space_ids) for answer in ("puppy", "0")] == [False, True]
    assert [of_dog[answer].accepted for answer in ("puppy", "0")] == [(("0", None),), (("puppy", None),)]
