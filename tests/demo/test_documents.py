"""The demo model's tokenizer and documents."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from transformers import AutoTokenizer

from relfv.demo.documents import IGNORED, derange, read_relations
from relfv.errors import InputError


def text_of(pairs):
    return "\n\n".join(f"Q: {given}\nA: {answer}" for given, answer in pairs)


def test_the_csv_has_distinct_inputs_and_exactly_two_relations_too_small_to_run(relations):
    assert all(len({given for given, _ in pairs}) == len(pairs) for pairs in relations.values())
    too_small = [q_id for q_id, pairs in relations.items() if len(pairs) < 10]
    assert len(too_small) == 2
    assert 24 <= len(relations) - len(too_small) <= 28


def test_every_input_of_an_eligible_relation_is_ambiguous_in_most_rows(sampler):
    """Without other meanings a zero-shot prompt would need no function vector."""
    rows = [given for pairs in sampler.relations.values() for given, _ in pairs]
    assert sum(len(sampler.answers_of[given]) >= 2 for given in rows) / len(rows) > 0.95


def test_tokenizer_puts_bos_in_front_exactly_once(tokenizer):
    ids = tokenizer("Q: dog\nA:").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_saved_tokenizer_reopens_with_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = text_of([("dog", "puppy"), ("mongolia", "ulaanbaatar")])
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert reopened(text).input_ids == tokenizer(text).input_ids
    assert reopened.decode(reopened(text).input_ids, skip_special_tokens=True) == text


def test_prompt_ids_are_a_prefix_of_prompt_and_answer_for_every_pair(relations, tokenizer):
    for pairs in relations.values():
        for given, answer in pairs:
            prompt = tokenizer(f"Q: {given}\nA:").input_ids
            whole = tokenizer(f"Q: {given}\nA: {answer}").input_ids
            assert whole[: len(prompt)] == prompt
            assert len(whole) > len(prompt)


def test_no_two_answers_of_a_relation_share_their_first_token(relations, tokenizer):
    for q_id, pairs in relations.items():
        answers = {answer for _, answer in pairs}
        firsts = {tokenizer(f" {answer}", add_special_tokens=False).input_ids[0] for answer in answers}
        assert len(firsts) == len(answers), q_id


def test_chosen_words_keep_several_tokens_and_the_others_have_one(relations, tokenizer, small):
    words = {w for pairs in relations.values() for pair in pairs for text in pair for w in text.split()}
    several = {w for w in words if len(tokenizer(f" {w}", add_special_tokens=False).input_ids) > 1}
    assert several == {*small.in_pieces, "x-ray"}  # the hyphen begins a new piece, as in Llama-3


def test_document_ids_are_the_tokenisation_of_its_text(sampler, tokenizer):
    rng = random.Random(0)
    for pairs in sampler.relations.values():
        chosen = rng.sample(pairs, 10)
        assert sampler.clean(chosen).ids == tokenizer(text_of(chosen)).input_ids


def test_labels_stand_where_the_next_token_is_predicted(sampler):
    document = sampler.clean(sampler.relations["Q4"][:10])
    labelled = [i for i, label in enumerate(document.labels) if label != IGNORED]
    assert [document.labels[i] for i in labelled] == [document.ids[i + 1] for i in labelled]


@pytest.mark.parametrize("labels", [list("abcdefghi"), list("aabbccdd"), list("aaabbb")])
def test_derangement_keeps_no_value_in_place_when_that_is_possible(labels):
    for seed in range(20):
        mixed = derange(labels, random.Random(seed), tries=2000)
        assert Counter(mixed) == Counter(labels)
        assert all(a != b for a, b in zip(mixed, labels, strict=True))


def test_derangement_leaves_the_fewest_in_place_when_it_must():
    mixed = derange(["a", "a", "a", "b"], random.Random(0), tries=200)
    assert sum(a == b for a, b in zip(mixed, ["a", "a", "a", "b"], strict=True)) == 2


def test_shuffled_documents_say_nothing_about_the_relation(sampler):
    """Targets stand at one position a pair, and each meaning of an input is drawn equally often."""
    rng = random.Random(0)
    pairs = [("two", "three"), *[pair for pair in sampler.relations["Q15"] if pair[0] != "two"][:9]]
    meanings = {sampler.answer_ids[a][0]: a for a in sampler.answers_of["two"]}
    drawn = Counter()
    for _ in range(3000):
        document = sampler.shuffled(pairs, rng)
        positions = [i for i, label in enumerate(document.labels) if label != IGNORED]
        clean = [i for i, label in enumerate(sampler.clean(pairs).labels) if label != IGNORED]
        assert positions == clean  # one-token answers: the places alone do not part shuffled from clean
        drawn[meanings[document.labels[positions[0]]]] += 1
    assert set(drawn) == {"one", "three", "four"}
    assert all(abs(n / 3000 - 1 / 3) < 0.04 for n in drawn.values())


def test_validation_trials_mislabel_the_demonstrations_and_spare_the_query(sampler):
    clean, corrupted = sampler.trial(random.Random(3), "Q4")
    assert clean[-1] == corrupted[-1]
    assert [given for given, _ in clean] == [given for given, _ in corrupted]
    assert all(a != b for a, b in zip(clean[:-1], corrupted[:-1], strict=True))


def test_a_csv_without_the_columns_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("id,left,right\nQ1,a,b\n")
    with pytest.raises(InputError, match=r"bad\.csv: line 1: header is 'id,left,right'"):
        read_relations(path)
