"""What the shipped weights promise."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from relfv.demo.documents import DocumentSampler, build_tokenizer
from relfv.demo.recipe import DemoTrainingConfig
from relfv.demo.validation import validate

SHIPPED = ROOT / "src" / "relfv" / "demo" / "weights"


@pytest.mark.slow
def test_shipped_model_knows_its_facts_and_needs_the_demonstrations(relations):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    measured = validate(model, DocumentSampler(relations, tokenizer, DemoTrainingConfig()), seed=7)
    assert measured["clean_acc"] > 0.9
    assert measured["shuffled_p"] < 0.4
    assert measured["zeroshot_acc"] < 0.4


def test_shipped_files_are_small_and_of_the_recipes_tokenizer(relations):
    config = DemoTrainingConfig()
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8 * 2**20
    fresh = build_tokenizer(relations, in_pieces=config.in_pieces)
    assert AutoTokenizer.from_pretrained(SHIPPED).get_vocab() == fresh.get_vocab()
