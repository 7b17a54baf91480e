"""A model with attention in some layers only, through the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import make_tokenizer, scale_up
from every_lm import tiny_model
from relfv.cli import main
from relfv.stages.cie import CIE
from relfv.stages.means import MEANS
from relfv.store.folder import QidFolder


@pytest.fixture(scope="module")
def hybrid_path(save_model: Callable[..., Path]) -> Path:
    return save_model(scale_up(tiny_model("lfm2")), make_tokenizer(vocab_size=290))


def run(model: Path, csv_path: Path, out: Path, *more: str) -> int:
    given = {"model": model, "model_spec": "auto", "relation_csv_path": csv_path, "out_root": out, "topk": 4}
    return main(["run", *(f"--{flag}={value}" for flag, value in given.items()), "--n_trials_per_q=5", *more])


@pytest.mark.slow
def test_heads_are_those_of_the_layers_with_attention_and_vectors_go_into_all(
    hybrid_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    assert run(hybrid_path, csv_path, tmp_path) == 0
    (manifest,) = tmp_path.rglob("run_manifest.json")
    assert json.loads(manifest.read_text())["model"]["layers_with_attention"] == [1, 3]
    status = min(tmp_path.rglob("qid_status.json"))
    folder = QidFolder(status.parent / "artifacts", json.loads(status.read_text())["q_id"])
    assert {head.id.layer for head in folder.read(CIE)} == {1, 3}
    means = folder.read(MEANS).values
    assert [bool(layer.any()) for layer in means] == [False, True, False, True]
    assert json.loads(status.read_text())["expected_layers"] == [0, 1, 2, 3]
    assert len([*status.parent.glob("artifacts/step6/layer_*")]) == 4
    assert main(["verify", str(manifest.parent)]) == 0


@pytest.mark.slow
def test_layers_without_attention_are_not_swept(
    hybrid_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hybrid_path, csv_path, tmp_path, "--layers=0,2") == 2
    assert "has attention in layers 1, 3 alone; expected one of them" in capsys.readouterr().err
