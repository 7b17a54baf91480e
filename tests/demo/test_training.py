"""The demo model's training: tokenizer, documents, reproducibility, and what the shipped weights promise."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relfv.demo import training as demo
from relfv.errors import InputError

ROOT = Path(__file__).parents[2]
CSV = ROOT / "datasets" / "relation" / "relationA_ex.csv"
SHIPPED = Path(demo.__file__).parent / "weights"
# A model small enough to train twice in a second; everything but its size is the recipe's.
SMALL = demo.DemoTrainingConfig(
    layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=32, batch=4, log_every=10
)


@pytest.fixture(scope="module")
def relations():
    return demo.read_relations(CSV)


@pytest.fixture(scope="module")
def tokenizer(relations):
    return demo.build_tokenizer(relations, in_pieces=SMALL.in_pieces)


@pytest.fixture(scope="module")
def sampler(relations, tokenizer):
    return demo.DocumentSampler(relations, tokenizer, SMALL)


def text_of(pairs):
    return "\n\n".join(f"Q: {given}\nA: {answer}" for given, answer in pairs)


def train(folder, **options):
    options = {"csv_path": CSV, "steps": 20, "device": "cpu", "config": SMALL, "log": lambda _: None} | options
    return demo.train_demo_model(folder, **options)


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.path).state_dict()


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


def test_chosen_words_keep_several_tokens_and_the_others_have_one(relations, tokenizer):
    words = {w for pairs in relations.values() for pair in pairs for text in pair for w in text.split()}
    several = {w for w in words if len(tokenizer(f" {w}", add_special_tokens=False).input_ids) > 1}
    assert several == {*SMALL.in_pieces, "x-ray"}  # the hyphen begins a new piece, as in Llama-3


def test_document_ids_are_the_tokenisation_of_its_text(sampler, tokenizer):
    rng = random.Random(0)
    for pairs in sampler.relations.values():
        chosen = rng.sample(pairs, 10)
        assert sampler.clean(chosen).ids == tokenizer(text_of(chosen)).input_ids


def test_labels_stand_where_the_next_token_is_predicted(sampler):
    document = sampler.clean(sampler.relations["Q4"][:10])
    labelled = [i for i, label in enumerate(document.labels) if label != demo.IGNORED]
    assert [document.labels[i] for i in labelled] == [document.ids[i + 1] for i in labelled]


@pytest.mark.parametrize("labels", [list("abcdefghi"), list("aabbccdd"), list("aaabbb")])
def test_derangement_keeps_no_value_in_place_when_that_is_possible(labels):
    for seed in range(20):
        mixed = demo.derange(labels, random.Random(seed), tries=2000)
        assert Counter(mixed) == Counter(labels)
        assert all(a != b for a, b in zip(mixed, labels, strict=True))


def test_derangement_leaves_the_fewest_in_place_when_it_must():
    mixed = demo.derange(["a", "a", "a", "b"], random.Random(0), tries=200)
    assert sum(a == b for a, b in zip(mixed, ["a", "a", "a", "b"], strict=True)) == 2


def test_shuffled_documents_say_nothing_about_the_relation(sampler):
    """Targets stand at one position a pair, and each meaning of an input is drawn equally often."""
    rng = random.Random(0)
    pairs = [("two", "three"), *[pair for pair in sampler.relations["Q15"] if pair[0] != "two"][:9]]
    meanings = {sampler.answer_ids[a][0]: a for a in sampler.answers_of["two"]}
    drawn = Counter()
    for _ in range(3000):
        document = sampler.shuffled(pairs, rng)
        positions = [i for i, label in enumerate(document.labels) if label != demo.IGNORED]
        clean = [i for i, label in enumerate(sampler.clean(pairs).labels) if label != demo.IGNORED]
        assert positions == clean  # one-token answers: the places alone do not part shuffled from clean
        drawn[meanings[document.labels[positions[0]]]] += 1
    assert set(drawn) == {"one", "three", "four"}
    assert all(abs(n / 3000 - 1 / 3) < 0.04 for n in drawn.values())


def test_validation_trials_mislabel_the_demonstrations_and_spare_the_query(sampler):
    clean, corrupted = sampler.trial(random.Random(3), "Q4")
    assert clean[-1] == corrupted[-1]
    assert [given for given, _ in clean] == [given for given, _ in corrupted]
    assert all(a != b for a, b in zip(clean[:-1], corrupted[:-1], strict=True))


def test_padding_does_not_change_what_is_predicted(sampler, tokenizer):
    model = demo.build_model(tokenizer, SMALL, seed=0).eval()
    short, long = (sampler.clean(sampler.relations["Q4"][:n]) for n in (3, 10))
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([short.ids])).logits[0]
        ids, labels = demo.collate([short, long], torch.device("cpu"))
        batched = model(input_ids=ids).logits[0, : len(short.ids)]
    assert (labels[0, len(short.ids) :] == demo.IGNORED).all()
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-5)


def test_head_norms_are_those_of_the_slices(tokenizer):
    model = demo.build_model(tokenizer, SMALL, seed=0)
    weight = model.model.layers[1].self_attn.o_proj.weight
    expected = weight[:, 3 * SMALL.head_dim : 4 * SMALL.head_dim].norm()
    torch.testing.assert_close(demo.head_norms(model, SMALL)[1, 3], expected)


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, second, other = (train(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    one, two, three = map(weights_of, (first, second, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert first.log == second.log
    assert [line["step"] for line in first.log] == [10, 20]


@pytest.mark.slow
def test_training_lowers_the_loss_and_spares_the_callers_random_state(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    result = train(tmp_path / "m", steps=60)
    assert torch.equal(torch.rand(1), expected)
    assert result.log[-1]["loss"] < result.log[0]["loss"]


def test_a_folder_that_holds_something_is_refused_before_training_and_left_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.bin").write_text("kept")
    with pytest.raises(InputError, match="already there and not empty"):
        train(folder, steps=1)
    assert (folder / "mine.bin").read_text() == "kept"


def test_a_finished_folder_appears_whole_with_nothing_beside_it(tmp_path):
    train(tmp_path / "model", steps=1)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_csv_without_the_columns_is_refused_by_name(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("id,left,right\nQ1,a,b\n")
    with pytest.raises(InputError, match=r"bad\.csv: line 1: header is 'id,left,right'"):
        demo.read_relations(path)


def test_a_csv_with_small_relations_only_is_refused(tmp_path):
    path = tmp_path / "small.csv"
    path.write_text("id,ex_A,ex_B\n" + "".join(f"Q1,in{i},out{i}\n" for i in range(9)))
    with pytest.raises(ValueError, match="10 pairs or more"):
        train(tmp_path / "m", csv_path=path)


def test_learning_rate_warms_up_and_decays_to_its_final_share():
    config = dataclasses.replace(SMALL, steps=1000, warmup=100, final_rate=0.05)
    rates = [demo._rate(step, config) for step in (1, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 0.525, 0.05])


@pytest.mark.slow
def test_shipped_model_knows_its_facts_and_needs_the_demonstrations(relations):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    measured = demo.validate(model, demo.DocumentSampler(relations, tokenizer, demo.DemoTrainingConfig()), seed=7)
    assert measured["clean_acc"] > 0.9
    assert measured["shuffled_p"] < 0.4
    assert measured["zeroshot_acc"] < 0.4


def test_shipped_files_are_small_and_of_the_recipes_tokenizer(relations):
    config = demo.DemoTrainingConfig()
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8 * 2**20
    fresh = demo.build_tokenizer(relations, in_pieces=config.in_pieces)
    assert AutoTokenizer.from_pretrained(SHIPPED).get_vocab() == fresh.get_vocab()
