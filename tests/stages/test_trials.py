from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from relfv.stages.trials import corrupt_labels, ineligible_reason, sample_trials
from relfv.types import Relation, WordPair


def relation(n: int, q_id: str = "Q1") -> Relation:
    return Relation(q_id, tuple(WordPair(f"in{i}", f"out{i}") for i in range(n)))


def test_each_trial_has_a_query_and_nine_other_demos() -> None:
    trials = sample_trials(relation(14), seed=0, n_trials=25, n_demos=9)
    assert [trial.trial_idx for trial in trials] == list(range(25))
    for trial in trials:
        assert len(set(trial.demo_source_indices)) == 9
        assert trial.query_source_index not in trial.demo_source_indices
        assert trial.query == relation(14).pairs[trial.query_source_index]
        assert trial.demos_clean == tuple(relation(14).pairs[i] for i in trial.demo_source_indices)


def test_queries_are_random_rows_and_not_all_the_same() -> None:
    trials = sample_trials(relation(14), seed=0, n_trials=25, n_demos=9)
    assert len({trial.query_source_index for trial in trials}) > 8


def test_the_same_seed_gives_the_same_trials_and_another_gives_others() -> None:
    first = sample_trials(relation(14), seed=0, n_trials=25, n_demos=9)
    assert first == sample_trials(relation(14), seed=0, n_trials=25, n_demos=9)
    assert first != sample_trials(relation(14), seed=1, n_trials=25, n_demos=9)


def test_trials_are_these_and_will_stay_these() -> None:
    """Frozen on purpose: another machine, Python or release must draw the same trials."""
    trials = sample_trials(relation(12), seed=0, n_trials=3, n_demos=9)
    assert [(t.query_source_index, t.demo_source_indices[:3]) for t in trials] == [
        (8, (4, 1, 10)),
        (0, (6, 1, 11)),
        (6, (5, 11, 4)),
    ]


def test_two_relations_with_the_same_rows_get_different_trials() -> None:
    one = sample_trials(relation(14, "Q1"), seed=0, n_trials=25, n_demos=9)
    other = sample_trials(relation(14, "Q2"), seed=0, n_trials=25, n_demos=9)
    assert [t.query_source_index for t in one] != [t.query_source_index for t in other]


def test_a_pair_equal_to_the_query_is_never_a_demo_and_no_demo_comes_twice() -> None:
    pairs = (*relation(11).pairs, *relation(5).pairs)
    for trial in sample_trials(Relation("Q1", pairs), seed=3, n_trials=200, n_demos=9):
        assert trial.query not in trial.demos_clean
        assert len(set(trial.demos_clean)) == 9
        assert max(trial.demo_source_indices) < 11  # of equal rows the first


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (relation(9).pairs, "9 rows, fewer than the 10"),
        ((*relation(9).pairs, *relation(4).pairs), "13 rows but only 9 distinct pairs"),
    ],
)
def test_too_few_rows_or_distinct_pairs_are_a_reason_to_skip(pairs: tuple[WordPair, ...], words: str) -> None:
    assert words in (ineligible_reason(Relation("Q1", pairs), 9) or "")
    with pytest.raises(ValueError, match="Q1"):
        sample_trials(Relation("Q1", pairs), seed=0, n_trials=1, n_demos=9)


def test_ten_rows_are_enough() -> None:
    assert ineligible_reason(relation(10), 9) is None
    assert len(sample_trials(relation(10), seed=0, n_trials=25, n_demos=9)) == 25


@st.composite
def labels_and_right_answers(draw: st.DrawFn) -> tuple[list[str], list[set[str]]]:
    labels = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7))
    others = draw(st.lists(st.sets(st.sampled_from("abcd"), max_size=2), min_size=len(labels), max_size=len(labels)))
    return labels, [{label, *other} for label, other in zip(labels, others, strict=True)]


@given(labels_and_right_answers(), st.integers(0, 10**6))
@settings(max_examples=150)
def test_corrupted_labels_are_a_permutation_with_as_few_right_answers_as_any(
    given: tuple[list[str], list[set[str]]], seed: int
) -> None:
    labels, right = given
    out = corrupt_labels(labels, right, random.Random(seed), "derange")
    assert sorted(out) == sorted(labels)

    def in_place(order: Sequence[str]) -> int:
        return sum(label in answers for label, answers in zip(order, right, strict=True))

    assert in_place(out) == min(map(in_place, set(itertools.permutations(labels))))


def test_a_label_that_is_another_right_answer_of_its_input_counts_as_in_place() -> None:
    pairs = (WordPair("bank", "rive"), WordPair("bank", "banque"), *relation(12).pairs)
    for trial in sample_trials(Relation("Q1", pairs), seed=0, n_trials=200, n_demos=9):
        for demo in trial.demos_corrupted:
            assert demo.input != "bank" or demo.output not in ("rive", "banque")
        assert trial.n_labels_in_place == 0


def test_labels_left_in_place_are_counted() -> None:
    pairs = tuple(WordPair(f"in{i}", "same" if i < 9 else f"out{i}") for i in range(12))
    trials = sample_trials(Relation("Q1", pairs), seed=0, n_trials=25, n_demos=9)
    for trial in trials:
        right = [demo.output for demo in trial.demos_clean]
        kept = sum(c.output == r for c, r in zip(trial.demos_corrupted, right, strict=True))
        assert trial.n_labels_in_place == kept
    assert any(trial.n_labels_in_place for trial in trials)


def test_shuffle_is_the_plain_permutation_that_may_leave_labels_in_place() -> None:
    given = list("abcdefghi")
    rng = random.Random(0)
    outs = [corrupt_labels(given, [{label} for label in given], rng, "shuffle") for _ in range(200)]
    assert all(sorted(out) == given for out in outs)
    in_place = [sum(a == b for a, b in zip(given, out, strict=True)) for out in outs]
    assert 0.7 < sum(in_place) / len(in_place) < 1.3


@st.composite
def relations(draw: st.DrawFn) -> tuple[Relation, int]:
    """A relation that is eligible, with few enough words that inputs, answers and whole rows come again."""
    words = st.sampled_from([f"w{i}" for i in range(draw(st.integers(3, 9)))])
    pairs = draw(st.lists(st.builds(WordPair, words, words), min_size=3, max_size=16))
    assume(len(set(pairs)) >= 3)
    return Relation(draw(st.sampled_from(["Q1", "q.2", "_x"])), tuple(pairs)), draw(st.integers(2, len(set(pairs)) - 1))


@pytest.mark.slow
@given(relations(), st.integers(0, 2**63 - 1))
@settings(max_examples=150)
def test_the_policy_holds_for_any_relation_and_seed(given: tuple[Relation, int], seed: int) -> None:
    relation, n_demos = given
    n_trials = 6
    trials = sample_trials(relation, seed=seed, n_trials=n_trials, n_demos=n_demos)
    assert trials == sample_trials(relation, seed=seed, n_trials=n_trials, n_demos=n_demos)
    # a longer run begins with the same trials: none depends on how many come after it
    assert trials == sample_trials(relation, seed=seed, n_trials=n_trials + 2, n_demos=n_demos)[:n_trials]
    answers = {pair.input: {p.output for p in relation.pairs if p.input == pair.input} for pair in relation.pairs}
    for number, trial in enumerate(trials):
        assert (trial.q_id, trial.trial_idx) == (relation.q_id, number)
        assert trial.query == relation.pairs[trial.query_source_index]
        assert trial.query_source_index not in trial.demo_source_indices
        assert trial.query not in trial.demos_clean
        assert len(set(trial.demos_clean)) == len(trial.demos_clean) == n_demos
        assert trial.demos_clean == tuple(relation.pairs[i] for i in trial.demo_source_indices)
        assert [demo.input for demo in trial.demos_corrupted] == [demo.input for demo in trial.demos_clean]
        labels = [demo.output for demo in trial.demos_clean]
        assert sorted(demo.output for demo in trial.demos_corrupted) == sorted(labels)
        right = [answers[demo.input] for demo in trial.demos_clean]

        def kept(order: Sequence[str], right: list[set[str]] = right) -> int:
            return sum(label in those for label, those in zip(order, right, strict=True))

        assert trial.n_labels_in_place == kept([demo.output for demo in trial.demos_corrupted])
        if n_demos <= 6:  # every order can be tried
            assert trial.n_labels_in_place == min(map(kept, set(itertools.permutations(labels))))


def opposites() -> Relation:
    """Twelve inputs, three of them with two right answers."""
    pairs = [WordPair(f"in{i}", f"out{i}") for i in range(12)] + [WordPair(f"in{i}", f"other{i}") for i in range(3)]
    return Relation("Q1", tuple(pairs), ("of", "others", *(pair.output for pair in pairs)))


def test_a_demo_with_the_querys_input_is_left_out_where_enough_others_remain_and_else_counted() -> None:
    for trial in sample_trials(opposites(), seed=0, n_trials=200, n_demos=9):
        assert trial.query.input not in {demo.input for demo in trial.demos_clean}
        assert trial.n_demos_of_query_input == 0
    few = Relation("Q1", (*relation(9).pairs, WordPair("in0", "another")))
    counted = [
        (trial.n_demos_of_query_input, sum(demo.input == trial.query.input for demo in trial.demos_clean))
        for trial in sample_trials(few, seed=0, n_trials=200, n_demos=9)
    ]
    assert all(said == there for said, there in counted)
    assert {said for said, _ in counted} == {0, 1}


def test_random_labels_are_drawn_from_the_relations_answers_and_teach_no_inverse() -> None:
    two = Relation("Q1", tuple(WordPair(f"in{i}", "yes" if i % 2 else "no") for i in range(20)))
    trials = sample_trials(two, seed=0, n_trials=200, n_demos=9, corruption="random")
    assert {label.output for trial in trials for label in trial.demos_corrupted} == {"yes", "no"}
    assert 0.45 < sum(trial.n_labels_in_place for trial in trials) / (9 * 200) < 0.55
    # a derangement of two labels is their exchange, as far as they go
    deranged = sample_trials(two, seed=0, n_trials=200, n_demos=9)
    assert sum(trial.n_labels_in_place for trial in deranged) / (9 * 200) < 0.3


def test_labels_of_other_relations_are_none_of_this_one() -> None:
    for trial in sample_trials(opposites(), seed=0, n_trials=50, n_demos=9, corruption="other"):
        assert {demo.output for demo in trial.demos_corrupted} <= {"of", "others"}
        assert trial.n_labels_in_place == 0
    assert "no other relation's answers" in (ineligible_reason(relation(12), 9, "other") or "")


@pytest.mark.parametrize("corruption", ["shuffle", "random", "other"])
def test_another_corruption_changes_labels_alone(corruption: str) -> None:
    def asked(how: str) -> list[tuple[int, tuple[int, ...]]]:
        (trial,) = sample_trials(opposites(), seed=3, n_trials=1, n_demos=9, corruption=how)  # type: ignore[arg-type]
        return [(trial.query_source_index, trial.demo_source_indices)]

    assert asked(corruption) == asked("derange")


def test_the_longest_prompt_is_counted_with_its_answer(finished: Path, llama_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_path)
    for q_id in ("A1", "B2"):
        document = json.loads((finished / q_id / "artifacts/sampled_trials.json").read_text())
        lengths = [
            len(tokenizer(f"{trial[key].rstrip()} {trial['target_str']}").input_ids)
            for trial in document["trials"]
            for key in ("clean_prompt_str", "corrupted_prompt_str")
        ]
        assert document["meta"]["longest_prompt_tokens"] == max(lengths)
