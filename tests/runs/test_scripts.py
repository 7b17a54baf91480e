"""The spec's own command lines, word for word, in a real shell, and that they give what ``relfv run`` gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from folders import contents, status
from relfv.cli import main
from relfv.store.artifacts import QidPaths
from relfv.store.status import AFTER_STEP6

VARIABLES = """
MODEL={model}
MODEL_SPEC=llama3
SEED=0
REL=pairs
RELATION_CSV={csv}
N_TRIALS_PER_Q=25
N_DEMOS=9
SCORE_KEY=mean_delta_p
TOPK=20
ALPHA=1.0
N_EVAL=50
Q={q_id}
RUN_BASE={base}
"""

# TECH_SPEC_RELATION_QWISE, sections 5, 6, 7 and 9
STEP_D = r"""
python scripts/run_stepD_aie_head_sweep.py \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --device ${DEVICE} \
  --dtype ${DTYPE} \
  --quant ${QUANT} \
  --layers all \
  --heads all \
  --relation_csv_path ${RELATION_CSV} \
  --relation_q_list ${Q} \
  --relation_n_trials_per_q ${N_TRIALS_PER_Q} \
  --relation_n_demos ${N_DEMOS} \
  --seed ${SEED} \
  --score_key ${SCORE_KEY} \
  --out_base_dir ${RUN_BASE}
"""
HEATMAP = r"""
python scripts/plot_stepD_aie_heatmap.py \
  --in_dir ${RUN_BASE}/artifacts \
  --metric ${SCORE_KEY} \
  --topk ${TOPK} \
  --out_name aie_heatmap_${Q}.png
"""
STEP_E = r"""
python scripts/run_stepE_topk_fv_and_eval.py \
  --stepd_artifacts_dir ${RUN_BASE}/artifacts \
  --sampled_trials_path ${RUN_BASE}/artifacts/sampled_trials.json \
  --k ${TOPK} \
  --score_key ${SCORE_KEY} \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --device ${DEVICE} \
  --dtype ${DTYPE} \
  --quant ${QUANT} \
  --alpha ${ALPHA} \
  --out_dir ${RUN_BASE}/artifacts
"""
STEP_6 = r"""
for LAYER in 0 1 2; do
python scripts/run_step6_fv_injection_eval.py \
  --model ${MODEL} \
  --model_spec ${MODEL_SPEC} \
  --fv_global_path ${RUN_BASE}/artifacts/fv_global_resid.pt \
  --sampled_trials_path ${RUN_BASE}/artifacts/sampled_trials_zeroshot.json \
  --edit_layer ${LAYER} \
  --alpha ${ALPHA} \
  --n_eval ${N_EVAL} \
  --out_dir ${RUN_BASE}/artifacts/step6/layer_${LAYER}
done
"""


def shell(script: str, model: Path, csv: Path, base: Path, q_id: str = "B2", environment: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    """Run with ``python`` being this interpreter."""
    variables = VARIABLES.format(model=model, csv=csv, base=base, q_id=q_id)
    text = "set -e\n" + variables + re.sub(r"^python ", f"{sys.executable} ", script, flags=re.MULTILINE)
    return subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_the_specs_commands_give_the_bytes_of_the_pipeline_and_complete_the_q_id(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    base = tmp_path / "pairs" / "B2"
    done = shell(STEP_D + HEATMAP + STEP_E + STEP_6, llama_path, csv_path, base)
    assert done.returncode == 0, done.stderr
    assert contents(base / "artifacts") == contents(finished / "B2/artifacts")
    assert status(tmp_path / "pairs", "B2")["status"] == "completed"
    # and the orchestrator has nothing left to do
    arguments = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    assert main([*arguments, "--q_list", "B2"]) == 0
    assert json.loads((tmp_path / "pairs/run_manifest.json").read_text())["outcomes"] == {}


@pytest.mark.slow
def test_device_dtype_and_quant_come_from_the_environment(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    environment = {"DEVICE": "cpu", "DTYPE": "bf16", "QUANT": "none"}
    done = shell(STEP_D, llama_path, csv_path, tmp_path / "B2", environment=environment)
    assert done.returncode == 0, done.stderr
    config = status(tmp_path, "B2")["config"]
    assert (config["device"], config["dtype"], config["quant"]) == ("cpu", "bfloat16", "none")


@pytest.mark.slow
def test_a_folder_made_in_another_dtype_is_continued_in_it_by_commands_that_do_not_say(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    """Section 9 gives Step6 no --dtype, so it must be what StepD was told."""
    base = tmp_path / "B2"
    done = shell("DTYPE=bf16\n" + STEP_D + STEP_E + STEP_6.replace("0 1 2", "1"), llama_path, csv_path, base)
    assert done.returncode == 0, done.stderr
    assert json.loads((base / "artifacts/step6/layer_1/eval_meta.json").read_text())["dtype"] == "bfloat16"


def in_process(name: str, *arguments: str | Path) -> int:
    return main([name, *map(str, arguments)])


def step_d(model: Path, csv: Path, base: Path, *more: str, q_id: str = "A1") -> int:
    return in_process(
        "stepd", "--model", model, "--relation_csv_path", csv, "--relation_q_list", q_id, "--out_base_dir", base, *more
    )


def test_a_short_q_id_is_marked_skipped_and_is_no_failure(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "C3", q_id="C3") == 0
    assert status(tmp_path, "C3")["status"] == "skipped"


def test_layers_and_heads_may_be_ranges(llama_path: Path, csv_path: Path, tmp_path: Path, finished: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1", "--layers", "0-1,2", "--heads", "0-3,7") == 0
    rows = [json.loads(line) for line in (tmp_path / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()]
    assert {row["head"] for row in rows} == {0, 1, 2, 3, 7}
    whole = [json.loads(line) for line in (finished / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()]
    same = {(row["trial_idx"], row["layer"], row["head"]): row["delta_logprob"] for row in whole}
    for row in rows:
        assert row["delta_logprob"] == pytest.approx(same[row["trial_idx"], row["layer"], row["head"]], abs=1e-4)
    assert "heads is 0-3,7, the spec fixes all" in status(tmp_path, "A1")["departures"]


@pytest.mark.parametrize("text", ["3", "0-9", "2-1", "x", "0,,1", "-1"])
def test_ranges_that_make_no_sense_are_bad_input(
    llama_path: Path, csv_path: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1", f"--layers={text}") == 2
    assert "--layers" in capsys.readouterr().err


def test_step_e_with_other_settings_than_the_finished_folder_is_refused(
    finished: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "A1", tmp_path / "A1")
    artifacts = tmp_path / "A1/artifacts"
    before = contents(artifacts)
    flags = (
        "--stepd_artifacts_dir",
        artifacts,
        "--sampled_trials_path",
        artifacts / "sampled_trials.json",
        "--out_dir",
        artifacts,
        "--model",
        llama_path,
    )
    assert in_process("stepe", *flags, "--k", "5") == 2
    assert "topk is 20 there, 5 here" in capsys.readouterr().err
    assert contents(artifacts) == before


def test_step_e_and_step6_into_other_folders_leave_the_q_ids_folder_alone(
    finished: Path, llama_path: Path, tmp_path: Path
) -> None:
    artifacts, out = finished / "A1/artifacts", tmp_path / "mine"
    before = contents(artifacts)
    trials = artifacts / "sampled_trials.json"
    flags = (
        "--stepd_artifacts_dir",
        artifacts,
        "--sampled_trials_path",
        trials,
        "--out_dir",
        out,
        "--model",
        llama_path,
    )
    assert in_process("stepe", *flags, "--k", "5") == 0
    assert len(json.loads((out / "top_heads.json").read_text())["heads"]) == 5
    flags = (
        "--fv_global_path",
        out / "fv_global_resid.pt",
        "--sampled_trials_path",
        out / "sampled_trials_zeroshot.json",
        "--model",
        llama_path,
    )
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", out / "at1") == 0
    assert json.loads((out / "at1/eval_meta.json").read_text())["edit_layer"] == 1
    assert contents(artifacts) == before


@pytest.mark.parametrize("layer", ["-1", "3"])
def test_a_layer_outside_the_model_is_bad_input(finished: Path, llama_path: Path, tmp_path: Path, layer: str) -> None:
    paths = QidPaths(finished / "A1/artifacts", "A1")
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    assert in_process("step6", *flags, f"--edit_layer={layer}", "--out_dir", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()


def test_edit_layer_takes_an_integer_only(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    paths = QidPaths(finished / "A1/artifacts", "A1")
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    with pytest.raises(SystemExit) as caught:
        in_process("step6", *flags, "--edit_layer", "all", "--out_dir", tmp_path / "x")
    assert caught.value.code == 2


def test_duplicate_queries_are_evaluated_when_asked_for(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    paths = QidPaths(finished / "A1/artifacts", "A1")
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", tmp_path, "--allow_query_duplicates") == 0
    summary = json.loads((tmp_path / "eval_summary.json").read_text())
    assert summary["n_eval"] == summary["n_trials"] == 25
    assert json.loads((tmp_path / "eval_meta.json").read_text())["sampling"] == "all trials"


def test_a_slip_in_a_flag_leaves_a_completed_q_id_as_it_is(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "A1", tmp_path / "A1")
    paths = QidPaths(tmp_path / "A1/artifacts", "A1")
    before = status(tmp_path, "A1")
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    assert in_process("step6", *flags, "--edit_layer", "3", "--out_dir", paths.step6_layer(3)) == 2
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", paths.step6_layer(2)) == 2
    assert status(tmp_path, "A1") == before


def test_every_command_in_the_folder_notices_changed_trials(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "A1", tmp_path / "A1")
    paths = QidPaths(tmp_path / "A1/artifacts", "A1")
    paths.trials.chmod(0o644)
    paths.trials.write_text(paths.trials.read_text().replace("puppy", "poodle"))
    folder = ("--stepd_artifacts_dir", paths.artifacts, "--out_dir", paths.artifacts, "--model", llama_path)
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.trials) == 1
    assert in_process("zeroshot", "--sampled_trials_path", paths.trials) == 1


@pytest.mark.slow
def test_a_skipped_q_id_stays_skipped_through_the_specs_whole_loop(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    done = shell(STEP_D + HEATMAP + STEP_E + STEP_6.replace("0 1 2", "0"), llama_path, csv_path, tmp_path / "C3", "C3")
    assert done.returncode == 0, done.stderr
    assert status(tmp_path, "C3")["status"] == "skipped"
    assert "9 rows" in status(tmp_path, "C3")["reason"]


@pytest.mark.slow
def test_later_settings_may_be_chosen_until_a_stage_has_used_them(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1") == 0
    paths = QidPaths(tmp_path / "A1/artifacts", "A1")
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "3") == 0
    folder = ("--stepd_artifacts_dir", paths.artifacts, "--out_dir", paths.artifacts, "--model", llama_path)
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.trials, "--k", "5") == 2
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.trials, "--k", "3", "--alpha", "2") == 0
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    for layer in range(3):
        out = paths.step6_layer(layer)
        assert in_process("step6", *flags, "--edit_layer", str(layer), "--n_eval", "4", "--out_dir", out) == 0
    document = status(tmp_path, "A1")
    assert document["status"] == "completed"
    assert (document["config"]["topk"], document["config"]["alpha"], document["config"]["n_eval"]) == (3, 2.0, 4)
    # a figure of other settings may not take the place of the recorded one, but may lie beside it
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "9") == 2
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "9", "--out_name", "mine.png") == 0
    assert status(tmp_path, "A1") == document


@pytest.mark.parametrize("missing", ["fv_global_resid.pt", "sampled_trials_zeroshot.json"])
def test_a_missing_input_is_bad_input_before_the_model_is_opened(
    finished: Path, llama_path: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = QidPaths(tmp_path / "A1/artifacts", "A1")
    shutil.copytree(finished / "A1", tmp_path / "A1")
    (paths.artifacts / missing).unlink()
    flags = ("--fv_global_path", paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", llama_path)
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", paths.step6_layer(1)) == 2
    said = capsys.readouterr().err
    assert missing in said
    assert "opened" not in said


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> QidPaths:
    """A finished q_id that a test may change."""
    shutil.copytree(finished, tmp_path / "pairs")
    return QidPaths(tmp_path / "pairs/A1/artifacts", "A1")


def step6(paths: QidPaths, model: Path, layer: int, *more: str | Path, fv: Path | None = None) -> int:
    return in_process(
        "step6", "--fv_global_path", fv or paths.fv, "--sampled_trials_path", paths.zero_shot_trials, "--model", model,
        "--edit_layer", str(layer), "--out_dir", paths.step6_layer(layer), *more,
    )  # fmt: skip


def test_an_input_that_was_changed_or_comes_from_elsewhere_does_not_get_into_a_q_ids_folder(
    folder: QidPaths, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder.artifacts)
    foreign = tmp_path / "foreign.pt"
    shutil.copy(folder.artifacts.parents[1] / "B2/artifacts/fv_global_resid.pt", foreign)
    assert step6(folder, llama_path, 1, fv=foreign) == 2
    assert "is not a file of" in capsys.readouterr().err
    shutil.copy(foreign, folder.fv)
    assert step6(folder, llama_path, 1) == 2
    assert "has been changed since stepE wrote it" in capsys.readouterr().err
    assert {**contents(folder.artifacts), "fv_global_resid.pt": b""} == {**before, "fv_global_resid.pt": b""}


def test_a_layer_evaluated_again_with_other_settings_has_one_result(folder: QidPaths, llama_path: Path) -> None:
    for layer in range(3):
        shutil.rmtree(folder.step6_layer(layer))
    document = json.loads((folder.artifacts / "qid_status.json").read_text())
    document["stages"] = {
        name: record for name, record in document["stages"].items() if "step6" not in name and name not in AFTER_STEP6
    }
    (folder.artifacts / "qid_status.json").write_text(json.dumps(document))
    assert step6(folder, llama_path, 0, "--n_eval", "4") == 0
    assert step6(folder, llama_path, 0, "--n_eval", "6") == 0
    results = list(folder.step6_layer(0).glob("step6_results_*.json"))
    assert [path.name.endswith("_n6.json") for path in results] == [True]


def test_dtype_may_be_spelled_either_way(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1", "--dtype", "fp32") == 0
    paths = QidPaths(tmp_path / "A1/artifacts", "A1")
    flags = (
        "--stepd_artifacts_dir",
        paths.artifacts,
        "--out_dir",
        paths.artifacts,
        "--sampled_trials_path",
        paths.trials,
    )
    assert in_process("stepe", *flags, "--model", llama_path, "--dtype", "float32") == 0


@pytest.mark.slow
def test_two_layers_at_once_are_both_recorded(folder: QidPaths, llama_path: Path) -> None:
    commands = [
        [sys.executable, "-m", "relfv", "step6", "--fv_global_path", folder.fv, "--sampled_trials_path",
         folder.zero_shot_trials, "--model", llama_path, "--edit_layer", str(layer), "--out_dir", folder.step6_layer(layer)]
        for layer in (0, 2)
    ]  # fmt: skip
    for layer in (0, 2):
        shutil.rmtree(folder.step6_layer(layer))
    processes = [
        subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for command in commands
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert status(folder.artifacts.parents[1], "A1")["status"] == "completed"
