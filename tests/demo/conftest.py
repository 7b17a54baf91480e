"""What the tests of the demo model share."""

from __future__ import annotations

import pytest

from conftest import ROOT
from relfv.demo.documents import DocumentSampler, build_tokenizer, read_relations
from relfv.demo.recipe import DemoTrainingConfig


@pytest.fixture(scope="session")
def csv():
    """The relations that the shipped model was trained on."""
    return ROOT / "datasets" / "relation" / "relationA_ex.csv"


@pytest.fixture(scope="session")
def small():
    """A model small enough to train twice in a second; everything but its size is the recipe's."""
    return DemoTrainingConfig(
        layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=32, batch=4, log_every=10
    )


@pytest.fixture(scope="session")
def relations(csv):
    return read_relations(csv)


@pytest.fixture(scope="session")
def tokenizer(relations, small):
    return build_tokenizer(relations, in_pieces=small.in_pieces)


@pytest.fixture(scope="session")
def sampler(relations, tokenizer, small):
    return DocumentSampler(relations, tokenizer, small)
