"""The demo model's training: its parts, reproducibility, and the folder that it leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from relfv.demo import training
from relfv.demo.documents import IGNORED, collate
from relfv.errors import InputError


@pytest.fixture(scope="module")
def train(csv, small):
    """Train a small model into a folder."""

    def train_into(folder, **options):
        options = {"csv_path": csv, "steps": 20, "device": "cpu", "config": small, "log": lambda _: None} | options
        return training.train_demo_model(folder, **options)

    return train_into


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.path).state_dict()


def test_padding_does_not_change_what_is_predicted(sampler, tokenizer, small):
    model = training.build_model(tokenizer, small, seed=0).eval()
    short, long = (sampler.clean(sampler.relations["Q4"][:n]) for n in (3, 10))
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([short.ids])).logits[0]
        ids, labels = collate([short, long], torch.device("cpu"))
        batched = model(input_ids=ids).logits[0, : len(short.ids)]
    assert (labels[0, len(short.ids) :] == IGNORED).all()
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-5)


def test_head_norms_are_those_of_the_slices(tokenizer, small):
    model = training.build_model(tokenizer, small, seed=0)
    weight = model.model.layers[1].self_attn.o_proj.weight
    expected = weight[:, 3 * small.head_dim : 4 * small.head_dim].norm()
    torch.testing.assert_close(training.head_norms(model, small)[1, 3], expected)


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_and_another_seed_others(train, tmp_path):
    first, second, other = (train(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    one, two, three = map(weights_of, (first, second, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert first.log == second.log
    assert [line["step"] for line in first.log] == [10, 20]


@pytest.mark.slow
def test_training_lowers_the_loss_and_spares_the_callers_random_state(train, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    result = train(tmp_path / "m", steps=60)
    assert torch.equal(torch.rand(1), expected)
    assert result.log[-1]["loss"] < result.log[0]["loss"]


def test_a_folder_that_holds_something_is_refused_before_training_and_left_alone(train, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.bin").write_text("kept")
    with pytest.raises(InputError, match="already there and not empty"):
        train(folder, steps=1)
    assert (folder / "mine.bin").read_text() == "kept"


def test_a_finished_folder_appears_whole_with_nothing_beside_it(train, tmp_path):
    train(tmp_path / "model", steps=1)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_csv_with_small_relations_only_is_refused(train, tmp_path):
    path = tmp_path / "small.csv"
    path.write_text("id,ex_A,ex_B\n" + "".join(f"Q1,in{i},out{i}\n" for i in range(9)))
    with pytest.raises(InputError, match="10 pairs or more"):
        train(tmp_path / "m", csv_path=path)


def test_learning_rate_warms_up_and_decays_to_its_final_share(small):
    config = dataclasses.replace(small, steps=1000, warmup=100, final_rate=0.05)
    rates = [training._rate_share(step, config) for step in (1, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 1.0, 0.525, 0.05])
