"""Every JSON artifact of real runs, odd ones among them, has the form that its schema says."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import relfv
from conftest import ROOT, make_tokenizer
from relfv.cli import main
from relfv.errors import InputError
from relfv.schemas import ARTIFACTS, schema_of
from relfv.settings import STUDIES

jsonschema = pytest.importorskip("jsonschema")
FILES = ROOT / "src/relfv/schemas/json"


def artifact_of(path: Path) -> str:
    return "step6_results.json" if path.name.startswith("step6_results_") else path.name


def test_a_files_schema_is_found_by_its_name_and_what_has_none_is_told() -> None:
    assert schema_of("step6_results_my_model_layer3_n25.json") == schema_of("step6_results.json")
    for name in ("top_heads.csv", "step6_results_my_model_layer3_n25.csv"):
        with pytest.raises(InputError, match=r"no schema; those that have: sampled_trials\.json"):
            schema_of(name)


def documents(root: Path) -> Iterator[tuple[str, Path, Any]]:
    for path in sorted([*root.rglob("*.json"), *root.rglob("*.jsonl")]):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()[:200] if path.suffix == ".jsonl" else [text]
        for line in lines:
            yield artifact_of(path), path, json.loads(line)


def assert_valid(root: Path) -> set[str]:
    seen = set()
    validators = {name: jsonschema.Draft202012Validator(schema_of(name)) for name in ARTIFACTS}
    for name, path, document in documents(root):
        problems = [
            f"{path}: {error.json_path}: {error.message[:200]}" for error in validators[name].iter_errors(document)
        ]
        assert not problems, problems[:3]
        seen.add(name)
    return seen


@pytest.mark.parametrize("name", ARTIFACTS)
def test_the_packaged_schema_is_the_declared_one(name: str, pytestconfig: pytest.Config) -> None:
    path, schema = FILES / f"{name}.schema.json", schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    if pytestconfig.getoption("--write-schemas"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == schema, (
        "write it again: pytest tests/schemas --write-schemas"
    )


def test_no_other_schema_is_packaged() -> None:
    assert {path.name for path in FILES.iterdir()} == {f"{name}.schema.json" for name in ARTIFACTS}


def test_a_whole_run_with_a_skipped_q_id_sweeps_cross_and_aggregate(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    swept = ["--alpha_sweep", "0.5", "--alpha_sweep_relative", "0.1", "--k_sweep", "1,3"]
    swept += ["--extras", ",".join(STUDIES)]
    swept += ["--replicates", "2", "--formats", "arrow", "--plan", str(tmp_path / "mine.json")]
    (tmp_path / "mine.json").write_text('{"layer_rule": 2, "exclusions": {"C3": "too few rows"}, "analyst": "A. B."}')
    command = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    assert main([*command, *swept]) == 0
    assert main(["cross", str(folder)]) == 0
    assert main(["aggregate", str(folder), "--all"]) == 0
    assert assert_valid(folder) == set(ARTIFACTS)


def test_a_single_trial_no_extras_and_a_failed_q_id(csv_path: Path, llama_path: Path, tmp_path: Path) -> None:
    settings = {"q_list": ["A1", "C3"], "out_root": tmp_path, "n_trials_per_q": 1, "topk": 1}
    relfv.run(csv_path, str(llama_path), extras="none", **settings)
    assert "summary.json" not in assert_valid(tmp_path)
    run = relfv.run(csv_path, str(llama_path), extras="ablation,mlp", **settings)
    assert {"summary.json", "ablation.json", "mlp_cie.json"} <= assert_valid(tmp_path)
    trials = run["A1"].artifacts / "sampled_trials.json"
    trials.chmod(0o644)
    trials.write_text(trials.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.warns(relfv.UsageWarning, match="some q_ids failed"):
        relfv.run(csv_path, str(llama_path), **settings)
    assert (run["A1"].status, run["C3"].status) == ("failed", "skipped")
    assert_valid(tmp_path)


def test_a_family_with_norms_after_attention_and_several_trials_of_a_query(csv_path: Path, tmp_path: Path) -> None:
    from zoo import ZOO

    settings = {"n_trials_per_q": 5, "topk": 3, "allow_query_duplicates": True, "target": "distinguishing"}
    torch.manual_seed(0)
    model = next(animal for animal in ZOO.values() if animal.family == "Gemma 2").build()
    run = relfv.run(csv_path, model, make_tokenizer(vocab_size=300), q_list=["A1"], out_root=tmp_path, **settings)
    assert run.summary()["status"].tolist() == ["completed"]
    assert_valid(tmp_path)


def test_a_schema_sees_what_is_missing_or_of_another_kind(finished: Path) -> None:
    for name, _, document in documents(finished / "A1"):
        if not isinstance(document, dict):
            continue
        validator = jsonschema.Draft202012Validator(schema_of(name))
        required = schema_of(name)["required"]
        for key in required:
            damaged = copy.deepcopy(document)
            del damaged[key]
            assert not validator.is_valid(damaged), (name, key)
            assert not validator.is_valid({**document, key: [{"odd": ...}]}), (name, key)
