"""The orchestrator: layout, policy, resume, refusal, interrupts."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crashes import Fork
from folders import arguments, contents, status, write_status
from parity import rounding, size_in
from relfv.cli import main
from relfv.report.page import is_up_to_date

CONTRACT = [
    "sampled_trials.json", "sampled_trials_zeroshot.json", "trial_metrics.jsonl", "stepD_cie/noise_floor.json", "cie_scores.csv", "aie_scores.csv",  # noqa: E501
    "stepD_mean_acts/qid_A1_clean_mean.pt", "stepD_mean_acts/global_clean_mean.pt", "top_heads.json",
    "fv_global_resid.pt", "fv_global_resid_meta.json", "fv_by_layer.pt", "stepE_eval.json", "qid_status.json",
    "aie_heatmap_A1.png", "step6/step6_all_layers_summary.json", "step6/injection_curve.png", "head_stability.json",
    "step6/controls.json", "step6/fv_as_written.pt", "step6/answers.json", "summary.json",
    "function_vector.safetensors",
    *(f"step6/layer_{i}/{name}" for i in range(3) for name in ("eval_summary.json", "eval_trials.jsonl", "eval_meta.json")),  # noqa: E501
]  # fmt: skip


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change; ``copied.parent`` is its out_root."""
    shutil.copytree(finished, tmp_path / "pairs")
    return tmp_path / "pairs"


def test_every_file_of_the_contract_is_there_and_nothing_else(finished: Path) -> None:
    artifacts = finished / "A1/artifacts"
    results = [
        f"step6/layer_{i}/{next((artifacts / f'step6/layer_{i}').glob('step6_results_*.json')).name}" for i in range(3)
    ]
    found = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert found == {*CONTRACT, *results}
    assert (finished / "A1/logs/stepD_aie.log").read_text().count("stepD_cie") == 1
    assert {path.name for path in finished.iterdir()} == {
        "A1",
        "B2",
        "C3",
        "report",
        "run.log",
        "run_manifest.json",
        "tables",
        ".locks",
    }


def test_eligible_q_ids_complete_and_short_ones_are_skipped_with_the_reason(finished: Path) -> None:
    assert status(finished, "A1")["status"] == status(finished, "B2")["status"] == "completed"
    assert status(finished, "C3")["status"] == "skipped"
    assert "9 rows, fewer than the 10" in status(finished, "C3")["reason"]


def test_the_status_lists_every_stage_with_hashes_of_its_files(finished: Path) -> None:
    document = status(finished, "A1")
    promised = [name for stage in document["stages"].values() for name in stage["files"]]
    assert sorted([*promised, "qid_status.json"]) == sorted(
        [*CONTRACT, *(n for n in promised if "step6_results_" in n)]
    )
    assert document["expected_layers"] == [0, 1, 2]
    assert document["q_row_count"] == 12
    assert all(stage["status"] == "completed" for stage in document["stages"].values())


def test_the_manifest_says_what_ran(finished: Path) -> None:
    manifest = json.loads((finished / "run_manifest.json").read_text())
    assert manifest["spec_conformant"] is False
    assert [departure.split(" is ")[0] for departure in manifest["departures"]] == ["model", "relation_csv_path"]
    assert manifest["model"]["engine"] == "shared_prefix"
    assert manifest["settings"]["topk"] == 20
    assert manifest["versions"]["torch"]
    assert manifest["outcomes"] == {"C3": "skipped", "A1": "completed", "B2": "completed"}


def test_the_precision_is_said_wherever_numbers_are(finished: Path) -> None:
    manifest = json.loads((finished / "run_manifest.json").read_text())
    assert manifest["settings"]["precision"] == manifest["model"]["precision"] == "exact"
    for name in ("step6/layer_1/eval_meta.json", "fv_global_resid_meta.json", "stepD_cie/noise_floor.json"):
        assert json.loads((finished / "A1/artifacts" / name).read_text())["precision"] == "exact"


def test_the_noise_floor_lies_far_below_the_effects(finished: Path) -> None:
    floor = json.loads((finished / "A1/artifacts/stepD_cie/noise_floor.json").read_text())
    rows = [json.loads(line) for line in (finished / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()]
    limit = rounding(size_in(finished / "A1/artifacts/trial_metrics.jsonl"))
    for m in ("p", "logit", "logprob"):
        assert floor["identity"][m]["max"] <= limit
        assert floor["other_shape"][m]["max"] <= limit
        assert floor["other_shape"][m]["median"] <= floor["other_shape"][m]["max"]
        assert max(abs(row[f"delta_{m}"]) for row in rows) > 100 * floor["other_shape"][m]["max"]
    assert len(floor["heads"]) == 8
    assert floor["engine"] == "shared_prefix"
    assert floor["trials_per_pass"] == 25
    assert floor["heads_per_trial"] == 24
    assert (floor["other_shape"]["trials_per_pass"], floor["other_shape"]["heads_per_trial"]) == (3, 8)
    # Some processors sum every shape in one order; then there is nothing to warn of.
    p = floor["other_shape"]["p"]["max"]
    assert (f"below {p:.1g} in p" if p else "made no difference at all") in floor["meaning"]
    assert f"noise floor {p:.1g} in P" in (finished / "A1/logs/stepD_aie.log").read_text()
    page = " ".join((finished / "report/index.html").read_text().split())
    assert (f"an effect below {p:.1g} in P cannot be told from arithmetic" in page) == (p > 0)


def test_a_second_run_touches_nothing_and_opens_no_model(
    finished: Path, copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name != "run.log"}
    assert main(arguments(llama_path, csv_path, tmp_path)) == 0
    said = capsys.readouterr().err
    assert "everything is completed: 2 q_ids done, 1 skipped" in said
    assert "opened" not in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_of_skipped_q_ids_alone_does_not_say_that_everything_is_completed(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "C3")) == 0
    said = capsys.readouterr().err
    assert "there are no results: 0 q_ids done, 1 skipped" in said
    assert "everything is completed" not in said


@pytest.mark.parametrize(
    ("how", "damage"),
    [
        ("deleted", "trial_metrics.jsonl"),
        ("truncated", "stepD_cie/noise_floor.json"),
        ("truncated", "cie_scores.csv"),
        ("deleted", "fv_global_resid.pt"),
        ("truncated", "aie_heatmap_A1.png"),
        ("deleted", "step6/layer_1/eval_summary.json"),
        ("truncated", "step6/step6_all_layers_summary.json"),
        ("deleted", "stepD_mean_acts/global_clean_mean.pt"),
    ],
)
def test_a_damaged_file_is_noticed_and_made_again_to_the_same_bytes(
    copied: Path, csv_path: Path, llama_path: Path, damage: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = contents(copied / "A1/artifacts"), copied / "A1/artifacts" / damage
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert contents(copied / "A1/artifacts") == whole
    assert status(copied, "A1")["status"] == "completed"
    said = capsys.readouterr().err
    assert "B2 " not in said
    # Only the damaged stage ran again: its bytes are the old ones, so what rests on it still holds.
    assert said.count(" s: ") <= 1


def test_changed_frozen_trials_are_an_error_and_never_overwritten(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "A1/artifacts/sampled_trials.json"
    assert not path.stat().st_mode & 0o222
    path.chmod(0o644)
    path.write_text(path.read_text().replace("puppy", "poodle"))
    changed = path.read_bytes()
    assert main(arguments(llama_path, csv_path, copied.parent)) == 1
    assert "the frozen trials were changed" in capsys.readouterr().err
    assert path.read_bytes() == changed
    assert status(copied, "A1")["status"] == "failed"
    assert status(copied, "B2")["status"] == "completed"


def test_other_settings_are_refused_naming_the_difference(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, copied.parent, "--seed", "1", "--alpha", "2")) == 2
    said = capsys.readouterr().err
    assert "seed was 0, now 1" in said
    assert "alpha was 1.0, now 2.0" in said


def test_other_rows_of_this_q_id_are_refused_and_of_another_are_not(
    copied: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    more = tmp_path / "other" / "pairs.csv"
    more.parent.mkdir()
    more.write_text(csv_path.read_text() + "D4,a,b\n")
    assert main(arguments(llama_path, more, copied.parent)) == 0
    more.write_text(csv_path.read_text() + "A1,mouse,pup\n")
    assert main(arguments(llama_path, more, copied.parent)) == 2


def test_force_moves_the_old_folder_aside_and_starts_afresh(copied: Path, csv_path: Path, llama_path: Path) -> None:
    old = contents(copied / "A1/artifacts")
    assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "A1", "--force")) == 0
    aside = [path for path in copied.iterdir() if path.name.startswith("A1.replaced-")]
    assert len(aside) == 1
    assert contents(aside[0] / "artifacts") == old == contents(copied / "A1/artifacts")


def test_a_q_ids_results_do_not_depend_on_which_others_run(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "B2")) == 0
    assert contents(tmp_path / "pairs/B2/artifacts") == contents(finished / "B2/artifacts")
    assert not (tmp_path / "pairs/A1").exists()


def test_one_failing_q_id_does_not_stop_the_others(copied: Path, csv_path: Path, llama_path: Path) -> None:
    shutil.rmtree(copied / "A1/artifacts/step6/layer_0")
    (copied / "A1/artifacts/step6/layer_0").write_text("a file where a folder must be")
    (copied / "B2/artifacts/fv_global_resid.pt").unlink()
    assert main(arguments(llama_path, csv_path, copied.parent)) == 1
    assert status(copied, "A1")["status"] == "failed"
    assert "layer_0" in status(copied, "A1")["reason"]
    assert status(copied, "B2")["status"] == "completed"
    (copied / "A1/artifacts/step6/layer_0").unlink()
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert status(copied, "A1")["status"] == "completed"


def test_departures_from_the_spec_must_be_given_and_are_written_down(
    csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    more = ("--q_list", "A1", "--topk", "3", "--n_trials_per_q", "4", "--n_demos", "5")
    assert main(arguments(llama_path, csv_path, tmp_path, *more)) == 0
    document = status(tmp_path / "pairs", "A1")
    assert document["spec_conformant"] is False
    assert "topk is 3, the spec fixes 20" in document["departures"]
    assert len(json.loads((tmp_path / "pairs/A1/artifacts/top_heads.json").read_text())["heads"]) == 3


def test_dry_run_writes_nothing(
    csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path / "out", "--dry_run")) == 0
    assert not (tmp_path / "out").exists()
    assert "skip: 9 rows" in capsys.readouterr().out


@pytest.fixture
def running(csv_path: Path, llama_path: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A run in a process of its own, stopped at the first sight of a given file."""

    def start_and_signal(wait_for: str, number: int) -> tuple[int, Path]:
        process = Fork(lambda: main(arguments(llama_path, csv_path, tmp_path)), tmp_path / "said")
        for _ in range(12000):
            if (tmp_path / "pairs" / wait_for).exists() or process.has_ended():
                break
            time.sleep(0.005)
        process.signal(number)
        return process.wait(), tmp_path / "pairs"

    return start_and_signal


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait_for", ["A1/artifacts/stepD_mean_acts", "A1/artifacts/top_heads.json", "B2/artifacts/step6/layer_1"]
)
def test_a_killed_run_resumes_to_the_bytes_of_an_undisturbed_one(
    running, finished: Path, csv_path: Path, llama_path: Path, wait_for: str
) -> None:  # type: ignore[no-untyped-def]
    code, folder = running(wait_for, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert main(arguments(llama_path, csv_path, folder.parent)) == 0
    for q_id in ("A1", "B2"):
        assert contents(folder / q_id / "artifacts") == contents(finished / q_id / "artifacts")
        assert status(folder, q_id)["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_writes_the_status_and_its_exit_code(running, number: int, code: int) -> None:  # type: ignore[no-untyped-def]
    found, folder = running("A1/artifacts/trial_metrics.jsonl", number)
    assert found == code
    states = {q_id: status(folder, q_id)["status"] for q_id in ("A1", "B2", "C3")}
    assert states["C3"] == "skipped"
    assert "pending" in states.values()
    assert "running" not in states.values()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_page_has_what_was_finished_when_a_run_is_stopped(running, finished: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    """The run does B2 first."""
    _, folder = running("A1/artifacts/stepD_mean_acts", number)
    page = (folder / "report/index.html").read_text()
    assert '<h2 id="B2">' in page
    assert '<h2 id="A1">' not in page
    assert "is written again after every" in page
    if number != signal.SIGKILL:  # which leaves no time to say more
        assert is_up_to_date(folder)


@pytest.mark.slow
def test_two_runs_at_once_do_every_q_id_once(csv_path: Path, llama_path: Path, tmp_path: Path, finished: Path) -> None:
    command = arguments(llama_path, csv_path, tmp_path)
    both = [Fork(lambda: main(command), tmp_path / f"said_{i}") for i in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    said = [process.said() for process in both]
    for q_id in ("A1", "B2"):
        assert sum(f"{q_id} stepD_cie" in text for text in said) == 1
        assert contents(tmp_path / "pairs" / q_id / "artifacts") == contents(finished / q_id / "artifacts")


def test_a_refused_command_leaves_nothing_that_refuses_the_right_one(
    csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1", "--model_spec", "gpt2")) == 2
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1", "--topk", "100")) == 2
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")) == 0
    assert status(tmp_path / "pairs", "A1")["config"]["topk"] == 20


def test_a_moved_model_goes_on_under_the_name_the_q_id_began_with(
    copied: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    whole = contents(copied / "A1/artifacts")
    moved = tmp_path / "moved_model"
    shutil.copytree(llama_path, moved)
    (copied / "A1/artifacts/step6/layer_1/eval_summary.json").unlink()
    (copied / "A1/artifacts/top_heads.json").unlink()
    assert main(arguments(moved, csv_path, copied.parent)) == 0
    assert contents(copied / "A1/artifacts") == whole


def test_a_damaged_status_is_reported_and_nothing_moves_before_the_run_is_accepted(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "A1/artifacts/qid_status.json"
    path.write_text("{")
    (copied / "B2/artifacts/top_heads.json").unlink()
    assert main(arguments(llama_path, csv_path, copied.parent, "--dry_run")) == 0
    assert f"{path}: is damaged" in capsys.readouterr().out
    # B2 refuses other settings, so nothing is done to A1 either
    assert main(arguments(llama_path, csv_path, copied.parent, "--seed", "1")) == 2
    assert path.read_text() == "{"
    assert not [*copied.glob("A1.replaced-*")]
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert f"{path}: is damaged" in capsys.readouterr().err
    assert [p.read_text() for p in copied.glob("A1.replaced-*/artifacts/qid_status.json")] == ["{"]
    assert status(copied, "A1")["status"] == status(copied, "B2")["status"] == "completed"


@pytest.mark.slow
def test_a_q_id_that_another_process_holds_is_left_to_it(csv_path: Path, llama_path: Path, tmp_path: Path) -> None:
    holder = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from relfv.store.locks import lock\n"
        "with lock(Path(sys.argv[1])) as other:\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    path = tmp_path / "pairs/.locks/A1.lock"
    process = subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        assert main(arguments(llama_path, csv_path, tmp_path)) == 0
        manifest = json.loads((tmp_path / "pairs/run_manifest.json").read_text())
        assert manifest["outcomes"] == {"C3": "skipped", "A1": "left to another run", "B2": "completed"}
        assert not (tmp_path / "pairs/A1/artifacts/sampled_trials.json").exists()
    finally:
        process.kill()
        process.wait()
    # a lock dies with its process
    assert main(arguments(llama_path, csv_path, tmp_path)) == 0
    assert status(tmp_path / "pairs", "A1")["status"] == "completed"


def test_what_was_made_from_a_file_that_changed_is_made_again_whenever_that_is_noticed(
    copied: Path, csv_path: Path, llama_path: Path
) -> None:
    """The change is on disk and in the hashes, so it does not matter which process made it, or whether it was killed."""  # noqa: E501
    whole = contents(copied / "A1/artifacts")
    artifacts = copied / "A1/artifacts"
    # as if StepD had been made again with other bytes, recorded as done, and the process killed right after
    scores = (artifacts / "cie_scores.csv").read_text().splitlines()
    scores[1:] = reversed(scores[1:])
    (artifacts / "cie_scores.csv").write_text("\n".join(scores) + "\n")
    document = status(copied, "A1")
    document["stages"]["stepD_cie"]["files"]["cie_scores.csv"] = hashlib.sha256(
        (artifacts / "cie_scores.csv").read_bytes()
    ).hexdigest()
    write_status(copied, "A1", document)
    started = {name: record["started_at"] for name, record in document["stages"].items()}
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    again = {name for name, record in status(copied, "A1")["stages"].items() if record["started_at"] != started[name]}
    assert again == {"stepE"}
    # the order of rows does not matter to StepE, so its bytes, and all that rests on them, are what they were
    assert {**contents(artifacts), "cie_scores.csv": b""} == {**whole, "cie_scores.csv": b""}


def test_a_run_that_was_overtaken_by_one_with_other_settings_leaves_the_q_id_alone(
    copied: Path, csv_path: Path, llama_path: Path
) -> None:
    from relfv.runs.plan import RunRequest, make_plan
    from relfv.runs.qid import open_for
    from relfv.runs.worker import Worker
    from relfv.settings import Settings

    settings = Settings(model=str(llama_path), relation_csv_path=str(csv_path), seed=1)
    plan = make_plan(RunRequest(settings, ("A1",), copied.parent))
    before = status(copied, "A1")
    assert Worker(plan, open_for(settings)).run("A1") == "failed"
    assert status(copied, "A1") == before


def test_garbage_is_not_looked_for_in_the_model_while_a_worker_has_it(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    from relfv.runs.plan import RunRequest, make_plan
    from relfv.runs.worker import Worker
    from relfv.settings import Settings

    settings = Settings(model=str(llama_path), relation_csv_path=str(csv_path), seed=1)
    worker = Worker.opened(make_plan(RunRequest(settings, ("A1",), tmp_path)))
    frozen = gc.get_freeze_count()
    worker.close()
    assert frozen > 100_000 > gc.get_freeze_count()


def test_what_waits_for_a_pause_is_done_at_once_on_a_cpu_and_while_a_gpu_computes_the_next_sweep(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    from relfv.runs.plan import RunRequest, make_plan
    from relfv.runs.qid import open_for
    from relfv.runs.worker import Worker
    from relfv.settings import Settings

    settings = Settings(model=str(llama_path), relation_csv_path=str(csv_path), seed=1, device="cpu")
    model, seen = open_for(settings), list[set[str]]()
    worker = Worker(make_plan(RunRequest(settings, ("A1",), tmp_path)), model)
    artifacts = worker.plan.folder / "A1/artifacts"

    def look() -> None:
        seen.append({path.name for path in artifacts.rglob("*")})
        raise ValueError("no trouble of the q_id's")

    worker.in_a_pause(look)
    assert seen == [set()]
    worker.model = replace(model, backbone=replace(model.backbone, device=torch.device("meta")))
    worker.in_a_pause(look)
    assert len(seen) == 1
    worker.in_a_pause(look)  # no sweep has come since
    assert len(seen) == 2
    worker.model = model
    assert worker.run("A1") == "completed"
    assert len(seen) == 3
    assert "qid_A1_clean_mean.pt" in seen[2]
    assert "trial_metrics.jsonl" not in seen[2]


def test_a_damaged_manifest_is_put_aside_and_does_not_stop_a_run(
    copied: Path, csv_path: Path, llama_path: Path
) -> None:
    (copied / "run_manifest.json").write_text("")
    (copied / "A1/artifacts/top_heads.json").unlink()
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert json.loads((copied / "run_manifest.json").read_text())["outcomes"] == {"C3": "skipped", "A1": "completed"}
    assert len([*copied.glob("run_manifest.json.replaced-*")]) == 1


def test_sweeps_asked_for_later_leave_every_other_file_and_earlier_sweeps_as_they_are(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_with(*flags: str) -> dict[str, bytes]:
        assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "A1", *flags)) == 0
        assert main(["verify", str(copied)]) == 0
        return contents(copied / "A1/artifacts")

    before = contents(copied / "A1/artifacts")
    first = run_with("--alpha_sweep", "2,0.5,2", "--k_sweep", "1,4,20")
    assert {name for name in first if first[name] != before.get(name)} == {"step6/sweeps.json"}
    document = json.loads(first["step6/sweeps.json"])
    assert [entry["value"] for entry in document["alpha"]] == [0.5, 2.0]
    assert [entry["value"] for entry in document["k"]] == [1, 4, 20]
    own = json.loads(before["step6/controls.json"])
    k = status(copied, "A1")["config"]["topk"]
    limit = rounding(size_in(copied / "A1/artifacts/trial_metrics.jsonl"))
    same = next(entry for entry in document["k"] if entry["value"] == k)
    for layer, numbers in same["per_layer"].items():
        assert numbers["mean_p"] == pytest.approx(own["per_layer"][layer]["fv"]["mean_p"], rel=limit)

    second = run_with("--alpha_sweep", "4", "--alpha_sweep_relative", "0.1")
    grown = json.loads(second["step6/sweeps.json"])
    assert [entry["value"] for entry in grown["alpha"]] == [0.5, 2.0, 4.0]
    (relative,) = grown["alpha_relative"]
    for numbers in relative["per_layer"].values():
        assert numbers["share_of_hidden"] == pytest.approx(0.1)
        assert numbers["norm_added"] == pytest.approx(numbers["alpha"] * own["mean_norm_added"]["fv"])
    for before_k, after_k in zip(document["k"], grown["k"], strict=True):
        assert (after_k["value"], after_k["mean_p"]) == (
            before_k["value"],
            pytest.approx(before_k["mean_p"], rel=limit),
        )
    capsys.readouterr()
    assert run_with() == run_with("--alpha_sweep", "0.5", "--k_sweep", "20") == second
    assert "opened" not in capsys.readouterr().err
    (copied / "A1/artifacts/step6/sweeps.json").unlink()
    assert run_with() == second


def test_sweeps_that_fail_leave_the_q_id_completed(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = copied / "A1/artifacts/step6/sweeps.json"
    in_the_way.mkdir()
    command = arguments(llama_path, csv_path, copied.parent, "--q_list", "A1")
    before = status(copied, "A1")
    assert main([*command, "--dry_run", "--k_sweep", "3"]) == 0
    assert "completed, sweeps to be added" in capsys.readouterr().out
    assert main([*command, "--k_sweep", "3"]) == 1
    assert "A1: only sweeps, studies or figures are missing" in capsys.readouterr().err
    found = status(copied, "A1")
    assert (found["status"], found["config"]["k_sweep"]) == ("completed", [])
    assert "step6_sweeps" not in found["stages"]
    assert {key for key in found if found[key] != before[key]} <= {"updated_at", "sha256_of_the_rest"}
    assert main(command) == 0
    assert "everything is completed" in capsys.readouterr().err
    in_the_way.rmdir()
    assert main([*command, "--k_sweep", "3"]) == 0
    assert main(["verify", str(copied)]) == 0


def test_sweeps_killed_on_the_way_are_made_by_whichever_run_comes_next(
    copied: Path, csv_path: Path, llama_path: Path
) -> None:
    command = arguments(llama_path, csv_path, copied.parent, "--q_list", "A1")
    assert main([*command, "--alpha_sweep", "0.5"]) == 0
    path = copied / "A1/artifacts/qid_status.json"
    killed = json.loads(path.read_text())
    killed["config"]["alpha_sweep"] = [0.5, 2.0]  # as it is written when the stage begins
    killed["stages"]["step6_sweeps"] |= {"status": "running", "finished_at": None}
    write_status(copied, "A1", killed)
    assert main(["verify", str(copied)]) == 1
    assert main(command) == 0
    swept = json.loads((copied / "A1/artifacts/step6/sweeps.json").read_text())
    assert [entry["value"] for entry in swept["alpha"]] == [0.5, 2.0]
    assert main(["verify", str(copied)]) == 0
    document = json.loads(path.read_text())
    document["config"]["alpha_sweep"].append(4.0)
    write_status(copied, "A1", document)
    assert main(["verify", str(copied)]) == 1
