"""A model with attention in some layers only, through the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import make_tokenizer, scale_up
from every_lm import tiny_model
from relfv.cli import main
from relfv.errors import InputError
from relfv.language_model import open_model
from relfv.settings import Settings
from relfv.stages.cie import CIE, heads_to_sweep
from relfv.stages.means import MEANS
from relfv.store.folder import QidFolder
from relfv.types import HeadId

FEW = ("--n_trials_per_q=5", "--n_demos=2", "--topk=4")
"""The tiny model has positions for 64 tokens."""


@pytest.fixture(scope="module")
def hybrid_path(save_model: Callable[..., Path]) -> Path:
    return save_model(scale_up(tiny_model("lfm2")), make_tokenizer(vocab_size=290))


@pytest.mark.slow
def test_heads_are_those_of_the_layers_with_attention_and_vectors_go_into_all(
    hybrid_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    given = {"model": hybrid_path, "model_spec": "auto", "relation_csv_path": csv_path, "out_root": tmp_path}
    assert main(["run", *(f"--{flag}={value}" for flag, value in given.items()), *FEW]) == 0
    (manifest,) = tmp_path.rglob("run_manifest.json")
    assert json.loads(manifest.read_text())["model"]["layers_with_attention"] == [1, 3]
    status = min(tmp_path.rglob("qid_status.json"))
    folder = QidFolder(status.parent, json.loads(status.read_text())["q_id"])
    assert {head.id.layer for head in folder.read(CIE)} == {1, 3}
    means = folder.read(MEANS).values
    assert [bool(layer.any()) for layer in means] == [False, True, False, True]
    assert json.loads(status.read_text())["expected_layers"] == [0, 1, 2, 3]
    assert len([*status.parent.glob("step6/layer_*")]) == 4
    assert main(["verify", str(manifest.parent)]) == 0


def test_a_choice_of_layers_is_swept_where_they_have_attention(hybrid_path: Path) -> None:
    model = open_model(str(hybrid_path), device="cpu")
    assert heads_to_sweep(model, Settings(layers="0-1", heads="0,2")) == [HeadId(1, 0), HeadId(1, 2)]
    with pytest.raises(InputError, match=r"--layers 0,2: .* has attention in layers 1, 3 alone; expected one of them"):
        heads_to_sweep(model, Settings(layers="0,2"))
