"""One command at a time: inside a q_id's folder it keeps the record and the settings, elsewhere it just writes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from crashes import Fork
from folders import contents, status, write_status
from parity import rounding, size_in
from relfv.cli import main
from relfv.stages import step6
from relfv.stages.function_vector import FV
from relfv.stages.table import STAGES
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.store.folder import QidFolder
from relfv.store.formats import tensor_bytes


def in_process(name: str, *arguments: str | Path) -> int:
    return main([name, *map(str, arguments)])


def step_d(model: Path, csv: Path, base: Path, *more: str, q_id: str = "A1") -> int:
    return in_process(
        "stepd", "--model", model, "--relation_csv_path", csv, "--relation_q_list", q_id, "--out_base_dir", base, *more
    )


def step6_inputs(folder: QidFolder, model: Path) -> tuple[str | Path, ...]:
    vector, trials = folder.path(FV), folder.path(ZERO_SHOT_TRIALS)
    return "--fv_global_path", vector, "--sampled_trials_path", trials, "--model", model


def test_a_short_q_id_is_marked_skipped_and_is_no_failure(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "C3", q_id="C3") == 0
    assert status(tmp_path, "C3")["status"] == "skipped"


def test_layers_and_heads_may_be_ranges(llama_path: Path, csv_path: Path, tmp_path: Path, finished: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1", "--layers", "0-1,2", "--heads", "0-3,7") == 0
    rows = [json.loads(line) for line in (tmp_path / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()]
    assert {row["head"] for row in rows} == {0, 1, 2, 3, 7}
    whole = [json.loads(line) for line in (finished / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()]
    same = {(row["trial_idx"], row["layer"], row["head"]): row["delta_logprob"] for row in whole}
    limit = rounding(size_in(finished / "A1/artifacts/trial_metrics.jsonl"))
    for row in rows:
        assert row["delta_logprob"] == pytest.approx(same[row["trial_idx"], row["layer"], row["head"]], abs=limit)
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
    assert "topk was 20, now 5" in capsys.readouterr().err
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
    paths = QidFolder(finished / "A1/artifacts", "A1")
    flags = step6_inputs(paths, llama_path)
    assert in_process("step6", *flags, f"--edit_layer={layer}", "--out_dir", tmp_path / "x") == 2
    assert not (tmp_path / "x").exists()


def test_a_negative_layer_is_refused_before_the_model_is_opened(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = step6_inputs(QidFolder(finished / "A1/artifacts", "A1"), tmp_path / "no model here")
    assert in_process("step6", *flags, "--edit_layer=-1", "--out_dir", tmp_path / "x") == 2
    assert "--edit_layer -1: layers are counted from 0" in capsys.readouterr().err


def test_edit_layer_takes_an_integer_only(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    paths = QidFolder(finished / "A1/artifacts", "A1")
    flags = step6_inputs(paths, llama_path)
    with pytest.raises(SystemExit) as caught:
        in_process("step6", *flags, "--edit_layer", "all", "--out_dir", tmp_path / "x")
    assert caught.value.code == 2


def test_duplicate_queries_are_evaluated_when_asked_for(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    paths = QidFolder(finished / "A1/artifacts", "A1")
    flags = step6_inputs(paths, llama_path)
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", tmp_path, "--allow_query_duplicates") == 0
    summary = json.loads((tmp_path / "eval_summary.json").read_text())
    assert summary["n_eval"] == summary["n_trials"] == 25
    assert json.loads((tmp_path / "eval_meta.json").read_text())["sampling"] == "all trials"


def test_a_vector_that_is_subtracted_has_the_same_length(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    flags = step6_inputs(QidFolder(finished / "A1/artifacts", "A1"), llama_path)
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", tmp_path, "--alpha=-2") == 0
    meta = json.loads((tmp_path / "eval_meta.json").read_text())
    assert meta["alpha"] == -2
    assert meta["share_of_hidden"] == pytest.approx(2 * meta["fv_norm"] / meta["mean_norm_hidden"])


def test_a_slip_in_a_flag_leaves_a_completed_q_id_as_it_is(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "A1", tmp_path / "A1")
    paths = QidFolder(tmp_path / "A1/artifacts", "A1")
    before = status(tmp_path, "A1")
    flags = step6_inputs(paths, llama_path)
    assert in_process("step6", *flags, "--edit_layer", "3", "--out_dir", paths.artifacts / "step6/layer_3") == 2
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", paths.artifacts / "step6/layer_2") == 2
    assert status(tmp_path, "A1") == before


def test_every_command_in_the_folder_notices_changed_trials(finished: Path, llama_path: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "A1", tmp_path / "A1")
    paths = QidFolder(tmp_path / "A1/artifacts", "A1")
    paths.path(TRIALS).chmod(0o644)
    paths.path(TRIALS).write_text(paths.path(TRIALS).read_text().replace("puppy", "poodle"))
    folder = ("--stepd_artifacts_dir", paths.artifacts, "--out_dir", paths.artifacts, "--model", llama_path)
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.path(TRIALS)) == 1
    assert in_process("zeroshot", "--sampled_trials_path", paths.path(TRIALS)) == 1


@pytest.mark.slow
def test_later_settings_may_be_chosen_until_a_stage_has_used_them(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1") == 0
    paths = QidFolder(tmp_path / "A1/artifacts", "A1")
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "3") == 0
    folder = ("--stepd_artifacts_dir", paths.artifacts, "--out_dir", paths.artifacts, "--model", llama_path)
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.path(TRIALS), "--k", "5") == 2
    assert in_process("stepe", *folder, "--sampled_trials_path", paths.path(TRIALS), "--k", "3", "--alpha", "2") == 0
    flags = step6_inputs(paths, llama_path)
    for layer in range(3):
        out = paths.artifacts / f"step6/layer_{layer}"
        assert in_process("step6", *flags, "--edit_layer", str(layer), "--n_eval", "4", "--out_dir", out) == 0
    document = status(tmp_path, "A1")
    assert document["status"] == "completed"
    assert (document["config"]["topk"], document["config"]["alpha"], document["config"]["n_eval"]) == (3, 2.0, 4)
    # a figure of other settings may not take the place of the recorded one, but may lie beside it
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "9") == 2
    assert in_process("heatmap", "--in_dir", paths.artifacts, "--topk", "9", "--out_name", "mine.png") == 0
    now = status(tmp_path, "A1")
    assert {key for key in now if now[key] != document[key]} == {"updated_at", "other_files", "sha256_of_the_rest"}
    assert [*now["other_files"]] == ["mine.png"]


@pytest.mark.parametrize("missing", ["fv_global_resid.pt", "sampled_trials_zeroshot.json"])
def test_a_missing_input_is_bad_input_before_the_model_is_opened(
    finished: Path, llama_path: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = QidFolder(tmp_path / "A1/artifacts", "A1")
    shutil.copytree(finished / "A1", tmp_path / "A1")
    (paths.artifacts / missing).unlink()
    flags = step6_inputs(paths, llama_path)
    assert in_process("step6", *flags, "--edit_layer", "1", "--out_dir", paths.artifacts / "step6/layer_1") == 2
    said = capsys.readouterr().err
    assert missing in said
    assert "opened" not in said


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> QidFolder:
    """A finished q_id that a test may change."""
    shutil.copytree(finished, tmp_path / "pairs")
    return QidFolder(tmp_path / "pairs/A1/artifacts", "A1")


def run_step6(paths: QidFolder, model: Path, layer: int, *more: str | Path, fv: Path | None = None) -> int:
    return in_process(
        "step6", "--fv_global_path", fv or paths.path(FV), "--sampled_trials_path", paths.path(ZERO_SHOT_TRIALS), "--model", model,  # noqa: E501
        "--edit_layer", str(layer), "--out_dir", paths.artifacts / f"step6/layer_{layer}", *more,
    )  # fmt: skip


def test_an_input_that_was_changed_or_comes_from_elsewhere_does_not_get_into_a_q_ids_folder(
    folder: QidFolder, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder.artifacts)
    foreign = tmp_path / "foreign.pt"
    shutil.copy(folder.artifacts.parents[1] / "B2/artifacts/fv_global_resid.pt", foreign)
    assert run_step6(folder, llama_path, 1, fv=foreign) == 2
    assert f"{foreign} is not fv_global_resid.pt of {folder.artifacts}" in capsys.readouterr().err
    shutil.copy(foreign, folder.path(FV))
    assert run_step6(folder, llama_path, 1) == 2
    assert "has been changed since stepE wrote it" in capsys.readouterr().err
    assert {**contents(folder.artifacts), "fv_global_resid.pt": b""} == {**before, "fv_global_resid.pt": b""}


def test_a_layer_evaluated_again_with_other_settings_has_one_result(folder: QidFolder, llama_path: Path) -> None:
    for layer in range(3):
        shutil.rmtree(folder.artifacts / f"step6/layer_{layer}")
    document = json.loads((folder.artifacts / "qid_status.json").read_text())
    from_step6_on = tuple(stage.name for stage in STAGES[STAGES.index(step6.STAGE) :])
    document["stages"] = {
        name: record for name, record in document["stages"].items() if not name.startswith(from_step6_on)
    }
    write_status(folder.artifacts.parents[1], folder.artifacts.parent.name, document)
    assert run_step6(folder, llama_path, 0, "--n_eval", "4") == 0
    assert run_step6(folder, llama_path, 0, "--n_eval", "6") == 0
    results = list((folder.artifacts / "step6/layer_0").glob("step6_results_*.json"))
    assert [path.name.endswith("_n6.json") for path in results] == [True]


def test_a_layer_evaluated_again_leaves_results_alone_that_it_has_not_recorded(
    folder: QidFolder, llama_path: Path
) -> None:
    """Such as one put there by hand, or by Step6 of another model before the folder had a status."""
    mine = folder.artifacts / "step6/layer_0/step6_results_mine_layer0_n25.json"
    mine.write_text("precious")
    before = contents(folder.artifacts)
    assert run_step6(folder, llama_path, 0) == 0
    assert contents(folder.artifacts) == before


FIGURE_NAMES = ["top_heads.json", "aie_scores.csv", "fv_global_resid.pt", "qid_status.json", "stepE_eval.json"]


@pytest.mark.parametrize("name", FIGURE_NAMES)
@pytest.mark.parametrize("there", [True, False], ids=["there", "not yet"])
def test_a_heatmap_takes_no_other_results_name(
    folder: QidFolder, name: str, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not there and name not in ("aie_scores.csv", "qid_status.json"):
        (folder.artifacts / name).unlink()
    before, record = contents(folder.artifacts.parent), (folder.artifacts / "qid_status.json").read_bytes()
    assert in_process("heatmap", "--in_dir", folder.artifacts, "--out_name", name) == 2
    assert f"--out_name {name}: is the name of another result" in capsys.readouterr().err
    assert contents(folder.artifacts.parent) == before
    assert (folder.artifacts / "qid_status.json").read_bytes() == record


def test_a_heatmap_replaces_a_picture_and_nothing_else(folder: QidFolder, capsys: pytest.CaptureFixture[str]) -> None:
    heatmap = ("heatmap", "--in_dir", folder.artifacts, "--topk", "3", "--out_name")
    (folder.artifacts / "notes.txt").write_text("precious")
    (folder.artifacts / "more").mkdir()
    for name in ("notes.txt", "more"):
        assert in_process(*heatmap, name) == 2
        assert "it is not replaced, so choose another name" in capsys.readouterr().err
    assert (folder.artifacts / "notes.txt").read_text() == "precious"
    for _ in range(2):
        assert in_process(*heatmap, "mine.png") == 0
    for name in ("a/b.png", "../b.png", "/b.png"):
        assert in_process(*heatmap, name) == 2
        assert "expected a file name without a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["top_heads.json", "sampled_trials.json", "qid_status.json", "summary.json"])
def test_a_zero_shot_snapshot_takes_no_other_results_name(
    folder: QidFolder, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, record = contents(folder.artifacts.parent), (folder.artifacts / "qid_status.json").read_bytes()
    flags = ("--sampled_trials_path", folder.path(TRIALS), "--out_path")
    assert in_process("zeroshot", *flags, folder.artifacts / name) == 2
    assert f"--out_path {'' if name != 'sampled_trials.json' else folder.artifacts}" in capsys.readouterr().err
    assert contents(folder.artifacts.parent) == before
    assert (folder.artifacts / "qid_status.json").read_bytes() == record


def test_a_zero_shot_snapshot_may_go_elsewhere_and_replaces_its_kind_alone(folder: QidFolder, tmp_path: Path) -> None:
    before = contents(folder.artifacts.parent)
    flags = ("--sampled_trials_path", folder.path(TRIALS), "--out_path", tmp_path / "mine.json")
    for _ in range(2):
        assert in_process("zeroshot", *flags) == 0
    assert (tmp_path / "mine.json").read_bytes() == before["artifacts/sampled_trials_zeroshot.json"]
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    assert in_process("zeroshot", *flags) == 1
    assert (tmp_path / "mine.json").read_text() == '{"precious": 1}'
    after = contents(folder.artifacts.parent)
    after.pop("logs/stepD_aie.log")
    before.pop("logs/stepD_aie.log")
    assert after == before


def test_dtype_may_be_spelled_either_way(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    assert step_d(llama_path, csv_path, tmp_path / "A1", "--dtype", "fp32") == 0
    paths = QidFolder(tmp_path / "A1/artifacts", "A1")
    flags = (
        "--stepd_artifacts_dir",
        paths.artifacts,
        "--out_dir",
        paths.artifacts,
        "--sampled_trials_path",
        paths.path(TRIALS),
    )
    assert in_process("stepe", *flags, "--model", llama_path, "--dtype", "float32") == 0


@pytest.mark.slow
def test_two_layers_at_once_are_both_recorded(folder: QidFolder, llama_path: Path, tmp_path: Path) -> None:
    trials = ("--sampled_trials_path", folder.path(ZERO_SHOT_TRIALS), "--model", llama_path)
    for layer in (0, 2):
        shutil.rmtree(folder.artifacts / f"step6/layer_{layer}")

    def inject(layer: int) -> int:
        out = folder.artifacts / f"step6/layer_{layer}"
        return in_process(
            "step6", "--fv_global_path", folder.path(FV), *trials, "--edit_layer", str(layer), "--out_dir", out
        )

    processes = [Fork(partial(inject, layer), tmp_path / f"said_{layer}") for layer in (0, 2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert status(folder.artifacts.parents[1], "A1")["status"] == "completed"


@pytest.mark.parametrize(("factor", "says"), [(0.0, "holds zeros alone"), (1e30, "is too long for float32")])
def test_a_vector_that_adds_nothing_or_overflows_is_refused_before_the_model_is_opened(
    factor: float, says: str, folder: QidFolder, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd.pt"
    odd.write_bytes(tensor_bytes({"fv_global_resid": np.full(48, factor, np.float32)}))
    trials = ("--sampled_trials_path", folder.path(ZERO_SHOT_TRIALS), "--model", llama_path)
    out = tmp_path / "out"
    assert in_process("step6", "--fv_global_path", odd, *trials, "--edit_layer", "1", "--out_dir", out) == 2
    said = capsys.readouterr().err
    assert f"{odd}: its vector {says}; expected a function vector as StepE writes it" in said
    assert "opened" not in said
    assert not out.exists()
