"""``relfv verify``: each kind of finding, on finished runs that were tampered with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import arguments, contents, rewrite, sealed, status, write_status
from relfv.cli import main
from relfv.stages.measured import measured_bytes, read_measured


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "pairs"))


def in_json(*keys: Any, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        document = json.loads(path.read_text())
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(document))

    return change


def without_the_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def without_the_last_head(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"layer": 2, "head": 7,' not in line))
    assert len(path.read_text().splitlines()) == len(lines) - 25


def nudge_one_part(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    next(iter(content["fv_by_layer"].values()))[0] += 0.5
    torch.save(content, path)


def nudge_as_written(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    next(iter(content["by_layer"].values()))[0] += 0.5
    torch.save(content, path)


def in_another_layer(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["fv_by_layer"][7] = content["fv_by_layer"].pop(max(content["fv_by_layer"]))
    torch.save(content, path)


def with_a_layer_more(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["clean_mean"] = torch.cat([content["clean_mean"], content["clean_mean"][:1]])
    torch.save(content, path)
    shutil.copy(path, path.with_name("global_clean_mean.pt"))  # of one q_id the same, to the hash


def of_one_trial_less(path: Path) -> None:
    path.write_text(path.read_text().replace(",25,", ",24,", 1))


def test_a_finished_run_holds_wherever_one_asks_and_nothing_is_written(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert main(["verify", str(finished)]) == 0
    said = capsys.readouterr().out
    assert [line.split("  ")[0] for line in said.splitlines()[:4]] == [
        "pairs/A1", "pairs/B2", "pairs/C3", "pairs/run_manifest.json",
    ]  # fmt: skip
    assert "completed and intact (35 files)" in said
    assert "pairs/C3  skipped and intact (1 files)" in said
    assert said.endswith("all 4 hold\n")
    assert main(["verify", str(finished.parent)]) == 0
    assert capsys.readouterr().out == said
    assert main(["verify", str(finished / "A1")]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_results_is_bad_usage(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "change", "kind", "words"),
    [
        ("top_heads.json", lambda path: path.write_text("{"), "unparsable", "cannot be read as JSON"),
        ("trial_metrics.jsonl", lambda path: path.write_text("{}\n[\n"), "unparsable", "line 2 is not a JSON object"),
        ("fv_by_layer.pt", lambda path: torch.save({}, path), "unparsable", "no vectors by layer"),
        ("cie_scores.csv", lambda path: path.write_text("a,b\n1,2\n"), "unparsable", "not the score of a head"),
        ("sampled_trials.json", in_json("trials", value=[]), "unparsable", "holds no trials"),
        ("trial_metrics.jsonl", without_the_last_line, "unparsable", "rows are missing or there twice"),
        ("trial_metrics.jsonl", without_the_last_head, "inconsistent", "one row a trial and head"),
        ("cie_scores.csv", without_the_last_line, "inconsistent", "heads and scores of cie_scores.csv"),
        ("top_heads.json", in_json("heads", 0, "head", value=77), "inconsistent", "20 heads with their"),
        ("fv_by_layer.pt", nudge_one_part, "inconsistent", "sum to fv_global_resid.pt"),
        ("fv_by_layer.pt", in_another_layer, "inconsistent", "the layers of top_heads.json"),
        ("fv_global_resid_meta.json", in_json("heads", 0, value=[0, 77]), "inconsistent", "the heads of top_heads.json"),  # noqa: E501
        ("stepD_mean_acts/qid_A1_clean_mean.pt", with_a_layer_more, "inconsistent", "as many layers"),
        ("cie_scores.csv", of_one_trial_less, "inconsistent", "n_trials as in sampled_trials.json"),
        ("sampled_trials.json", in_json("trials", 3, "q_id", value="B2"), "inconsistent", "25 trials of A1"),
        ("sampled_trials_zeroshot.json", in_json("trials", 3, "query", "input", value="x"), "inconsistent", "same queries"),  # noqa: E501
        ("step6/layer_1/eval_summary.json", in_json("acc_with", value=2.0), "inconsistent", "numbers of layer 1"),
        ("step6/layer_1/eval_trials.jsonl", without_the_last_line, "inconsistent", "n_eval rows"),
        ("step6/layer_1/eval_meta.json", in_json("edit_layer", value=2), "inconsistent", "edit_layer 1"),
        ("step6/layer_1/step6_results_*.json", in_json("summary", "n_eval", value=3), "inconsistent", "own summary and rows"),  # noqa: E501
        ("step6/step6_all_layers_summary.json", in_json("completed_layers", value=[0, 2]), "inconsistent", "every layer"),  # noqa: E501
        ("step6/fv_as_written.pt", nudge_as_written, "inconsistent", "parts that sum to its vector"),
        ("stepD_cie/noise_floor.json", in_json("trials_per_pass", value=7), "inconsistent", "trials_per_pass"),
        ("step6/step6_all_layers_summary.json", in_json("per_layer", value={}), "inconsistent", "do not fit"),
    ],
)  # fmt: skip
def test_files_that_match_their_hash_and_are_wrong_all_the_same(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[Path], None], kind: str, words: str
) -> None:
    artifacts = copied / "A1/artifacts"
    (path,) = artifacts.glob(name)
    rewrite(artifacts, str(path.relative_to(artifacts)), change)
    assert main(["verify", str(copied / "A1"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False
    (item,) = found["checked"]
    assert {problem["kind"] for problem in item["problems"]} == {kind}
    assert words in " ".join(problem["detail"] for problem in item["problems"])


@pytest.fixture(scope="module")
def studied(llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small q_id with everything that may be asked for beyond what completes it."""
    out = tmp_path_factory.mktemp("studied")
    few = [text for name in ("n_trials_per_q", "n_demos", "topk") for text in (f"--{name}", "3")]
    asked = ["--alpha_sweep", "0.5", "--replicates", "2", "--formats", "arrow"]
    studies = ["--extras", "ablation,mlp,positions,attribution"]
    assert main(arguments(llama_path, csv_path, out, "--q_list", "A1", *few, *asked, *studies)) == 0
    return out / "pairs"


def with_another_vector(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        several, made_from = read_measured(path)
        several[name] = replace(several[name], vector=2 * several[name].vector)
        path.write_bytes(measured_bytes(several, made_from))

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("stepE/ablation.json", in_json("heads", "top", "heads", 0, "head", value=77), "the heads of top_heads.json"),
        ("stepE/ablation.json", in_json("by_prompt", "query_source_index", 0, value=77), "the queries of"),
        ("stepD_mlp/mlp_cie.json", in_json("by_trial", "query_source_index", 0, value=77), "the queries of"),
        ("stepD_positions/positions.json", in_json("heads", 0, "head", value=77), "the heads of top_heads.json"),
        ("stepD_positions/positions.json", in_json("by_trial", "query_source_index", 0, value=77), "the queries of"),
        ("attribution.json", in_json("heads", 0, "head", value=77), "the heads of trial_metrics.jsonl"),
        ("step6/sweeps.json", in_json("alpha", 0, "value", value=0.75), "the alphas and k of qid_status.json"),
        ("replicates/replicates.json", in_json("draws", 1, "seed", value=7), "the draws of qid_status.json"),
        ("replicates/replicates.json", in_json("cosine", 0, 1, value=0.5), "the cosines of draws.safetensors"),
        ("replicates/draws.safetensors", with_another_vector("3.0"), "own heads and vector as draw 0"),
        ("formats/formats.json", in_json("left_out", value={"arrow": "why"}), "the formats of qid_status.json"),
        ("formats/formats.json", in_json("cosine", 0, 1, "value", value=0.5), "the cosines of vectors.safetensors"),
        ("formats/vectors.safetensors", with_another_vector("spec"), "own heads and vector as those of spec"),
    ],
)
def test_what_was_asked_for_beside_agrees_with_the_rest(
    studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[Path], None],
    words: str,
) -> None:  # fmt: skip
    assert main(["verify", str(studied)]) == 0
    copied = Path(shutil.copytree(studied, tmp_path / "pairs"))
    rewrite(copied / "A1/artifacts", name, change)
    capsys.readouterr()
    assert main(["verify", str(copied / "A1"), "--json"]) == 1
    (item,) = json.loads(capsys.readouterr().out)["checked"]
    assert {problem["kind"] for problem in item["problems"]} == {"inconsistent"}
    assert words in " ".join(problem["detail"] for problem in item["problems"])


def test_each_other_finding_is_named_in_the_q_ids_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts = copied / "A1/artifacts"
    (artifacts / "step6/notes.txt").write_text("mine")
    (artifacts / "top_heads.json").unlink()
    (artifacts / "cie_scores.csv").write_text("x")
    document = status(copied, "B2")
    document["stages"]["stepE"]["inputs"]["cie_scores.csv"] = "0" * 64
    write_status(copied, "B2", {**document, "status": "failed", "reason": "why"})
    shutil.rmtree(copied / "C3")
    assert main(["verify", str(copied)]) == 1
    a1, b2, c3, manifest, _, last = capsys.readouterr().out.splitlines()
    assert a1 == "pairs/A1  damaged: cie_scores.csv; missing: top_heads.json; unexpected: step6/notes.txt"
    assert "unfinished: qid_status.json (failed; why)" in b2
    assert "out of date: head_stability.json (stepE was made from another cie_scores.csv)" in b2
    assert c3 == "pairs/C3  missing: artifacts"
    assert manifest.endswith("intact")
    assert last == "3 of 4 do not hold"


def test_settings_that_no_run_of_the_manifest_had_are_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "run_manifest.json"
    document = json.loads(path.read_text())
    document["settings"]["seed"] = 5
    document.pop("sha256_of_the_rest")
    path.write_text(json.dumps(sealed(document)))
    assert main(["verify", str(copied)]) == 1
    assert capsys.readouterr().out.count("its settings are those of a run in the manifest") == 2


@pytest.mark.slow
def test_no_model_code_is_loaded_and_no_network_is_used(finished: Path) -> None:
    """``transformers`` opens models; verify does not even import it."""
    script = (
        "import socket, sys\n"
        "socket.socket.connect = None\n"
        "from relfv.cli import main\n"
        "code = main(['verify', sys.argv[1]])\n"
        "print('transformers' in sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", script, str(finished)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stderr == "False\n"
