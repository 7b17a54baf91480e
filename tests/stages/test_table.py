"""What follows from the list of stages: order, what runs again, which settings may still be chosen."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from conftest import ROOT
from folders import arguments, contents, status, write_status
from relfv.cli import main
from relfv.settings import FLAGS, IDENTITY
from relfv.stages.stage import Stage
from relfv.stages.table import (
    STAGES,
    STEP_D,
    file_named,
    free_settings,
    is_complete,
    makers,
    not_done,
    settings_of,
    step_named,
    steps,
)
from relfv.store.status import QidStatus, StageRecord, read_status

NAMES = [stage.name for stage in STAGES]
BY_NAME = {stage.name: stage for stage in STAGES}


def test_the_order_is_the_specs() -> None:
    """StepD (trials, means, CIE), heatmap, StepE, the zero-shot snapshot, Step6 at every layer, their summary; what
    relfv adds to the spec comes after."""
    assert [step.name for step in steps(range(3))] == [
        "stepD_trials", "stepD_means", "stepD_cie", "heatmap", "stepE", "zeroshot",
        "step6_layer_0", "step6_layer_1", "step6_layer_2", "step6_summary",
        "vector_file", "injection_curve", "step6_controls", "step6_answers", "summary",
    ]  # fmt: skip
    asked = [stage.name for stage in STAGES if stage.asked]
    studies = ["stepE_ablation", "stepD_mlp", "stepD_positions", "new_queries", "replicates", "formats", "attribution"]
    assert asked == ["step6_sweeps", *studies]
    assert [stage.name for stage in STEP_D] == NAMES[:3]


def test_a_run_takes_the_steps_in_that_order(finished: Path) -> None:
    document = status(finished, "A1")
    assert [*document["stages"]] == [step.name for step in steps(document["expected_layers"])]
    times = [record[key] for record in document["stages"].values() for key in ("started_at", "finished_at")]
    assert times == sorted(times)


def test_every_step_comes_after_those_whose_files_it_reads_and_every_file_is_made_once() -> None:
    files = [file for stage in STAGES for file in stage.writes]
    assert len(files) == len({file.name for file in files}) == len(makers())
    for i, stage in enumerate(STAGES):
        for file in stage.reads:
            assert NAMES.index(makers()[file].name) < i, (stage.name, file.name)


def test_what_a_step_has_read_and_written_is_what_it_declares(finished: Path) -> None:
    for name, record in status(finished, "A1")["stages"].items():
        step = step_named(name)
        assert step is not None
        assert {file_named(path, "A1") for path in record["files"]} == {*step.stage.writes}, name
        assert {file_named(path, "A1") for path in record["inputs"]} == {*step.stage.reads}, name


def test_names_in_a_status_lead_back_to_steps() -> None:
    for step in [*steps(range(12)), BY_NAME["step6_sweeps"].step()]:
        assert step_named(step.name) == step
    for name in ("step6_layer_", "step6_layer_x", "step6_layer_1x", "step6_layer_-1", "of_the_future", ""):
        assert step_named(name) is None


def test_every_setting_that_counts_is_used_by_some_stage_and_every_one_used_counts() -> None:
    used = {name for stage in STAGES for name in stage.settings}
    assert used == set(IDENTITY)
    assert set(IDENTITY) <= FLAGS.keys()
    for stage in STAGES:
        assert len(set(stage.settings)) == len(stage.settings), stage.name


def test_the_settings_of_a_stage_are_those_of_all_it_rests_on() -> None:
    model = {"model_spec", "dtype", "quant", "precision"}
    of_trials = {"seed", "n_trials_per_q", "n_demos", "corruption", "target", "model_spec"}
    of_step_e = {*model, *of_trials, "layers", "heads", "score_key", "topk", "alpha"}
    expected = {
        "stepD_trials": of_trials,
        "stepD_means": {*of_trials, *model},
        "stepD_cie": {*of_trials, *model, "layers", "heads", "score_key"},
        "heatmap": {*of_trials, *model, "layers", "heads", "score_key", "topk"},
        "stepE": of_step_e,
        "zeroshot": of_trials,
        "step6_layer_": {*of_step_e, "n_eval", "allow_query_duplicates"},
        "summary": set(IDENTITY),
    }
    for name, settings in expected.items():
        assert settings_of(BY_NAME[name]) == settings, name


def begun(finished: Path, *names: str) -> QidStatus:
    found = read_status(finished / "A1/artifacts")
    assert found is not None
    found.stages = {name: record for name, record in found.stages.items() if name in names}
    return found


@pytest.mark.parametrize(
    ("names", "chosen_by", "free"),
    [
        ((), [], set(IDENTITY)),
        (
            ("stepD_trials",),
            [],
            set(IDENTITY) - {"seed", "n_trials_per_q", "n_demos", "corruption", "target", "model_spec"},
        ),
        (NAMES[:3], ["stepE"], {"topk", "alpha", "n_eval", "allow_query_duplicates"}),
        ([*NAMES[:3], "heatmap"], ["stepE"], {"alpha", "n_eval", "allow_query_duplicates"}),
        ([*NAMES[:3], "heatmap", "stepE"], ["stepE"], {"alpha", "n_eval", "allow_query_duplicates"}),
        ([*NAMES[:3], "stepE"], ["stepE"], {"topk", "alpha", "n_eval", "allow_query_duplicates"}),
        ([*NAMES[:3], "stepE", "zeroshot", "step6_layer_0"], ["step6_layer_"], {"n_eval", "allow_query_duplicates"}),
        ([*NAMES[:3], "stepE", "zeroshot", "step6_layer_0", "step6_controls"], ["step6_layer_"], set()),
    ],
)
def test_a_setting_is_free_until_a_step_that_depends_on_it_has_begun(
    finished: Path, names: list[str], chosen_by: list[str], free: set[str]
) -> None:
    assert free_settings(begun(finished, *names), [BY_NAME[name] for name in chosen_by]) == free


def test_a_finished_q_id_is_complete_and_any_step_can_be_missing(finished: Path) -> None:
    found = read_status(finished / "A1/artifacts")
    assert found is not None
    assert is_complete(found)
    for name, record in list(found.stages.items()):
        del found.stages[name]
        assert [step.name for step in not_done(found)] == [name]
        found.stages[name] = StageRecord("running", record.started_at, files=record.files)
        assert [step.name for step in not_done(found)] == [name]
        found.stages[name] = record
    found.expected_layers.append(3)
    assert [step.name for step in not_done(found)] == ["step6_layer_3"]
    found.expected_layers = []
    assert not is_complete(found)


def test_a_step_is_done_no_more_once_a_file_that_it_read_has_changed(finished: Path) -> None:
    found = read_status(finished / "A1/artifacts")
    assert found is not None
    n_inputs = 0
    for name, record in found.stages.items():
        for path, digest in list(record.inputs.items()):
            record.inputs[path] = "0" * 64
            assert [step.name for step in not_done(found)] == [name], path
            record.inputs[path] = digest
            n_inputs += 1
    assert n_inputs > 20
    assert is_complete(found)


@pytest.mark.parametrize(
    "stage", [one for one in STAGES if len(one.writes) > 1 and not one.asked], ids=lambda stage: stage.name
)
def test_a_record_without_a_file_that_its_stage_writes_today_makes_that_stage_alone_run_again(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, stage: Stage
) -> None:
    """As after an update of relfv that lets a stage write one file more."""
    whole = contents(finished / "A1/artifacts")
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    artifacts, document = relation / "A1/artifacts", status(relation, "A1")
    step = stage.step(1) if stage.per_layer else stage.step()
    record = document["stages"][step.name]
    readers = {file for later in STAGES for file in later.reads}
    for name in [name for name in record["files"] if file_named(name, "A1") not in readers][:1] or [*record["files"]][
        -1:
    ]:
        (artifacts / name).unlink()
        del record["files"][name]
        for other in document["stages"].values():
            other["inputs"].pop(name, None)
    write_status(relation, "A1", document)
    started = {name: record["started_at"] for name, record in document["stages"].items()}
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")) == 0
    now = status(relation, "A1")["stages"]
    assert [name for name in now if now[name]["started_at"] != started[name]] == [step.name]
    assert contents(artifacts) == whole
    assert now[step.name]["files"] == {
        name: hashlib.sha256(whole[name]).hexdigest() for name in status(finished, "A1")["stages"][step.name]["files"]
    }


def test_a_step_that_a_later_version_recorded_does_not_count(finished: Path, tmp_path: Path) -> None:
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    document = status(relation, "A1")
    document["stages"]["of_the_future"] = document["stages"]["summary"]
    path = relation / "A1/artifacts/qid_status.json"
    write_status(relation, "A1", document)
    found = read_status(path.parent)
    assert found is not None
    assert is_complete(found)
    assert main(["verify", str(relation / "A1")]) == 0


def test_the_documentation_lists_every_file() -> None:
    page = (ROOT / "docs/artifacts.md").read_text()
    for file in makers():
        assert Path(file.name).name.split("{")[0].split("*")[0] in page, file.name
