"""The spec's stages alone, what relfv adds to them later, and a log that is never silent for long."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from folders import arguments, contents, status, write_status
from relfv import progress
from relfv.cli import main
from relfv.runs import qid
from relfv.settings import Settings
from relfv.stages.heatmap import STAGE
from relfv.stages.stage import Work
from relfv.store.folder import QidFolder

EXTRAS = {"step6/controls.json", "step6/fv_as_written.pt", "step6/answers.json", "summary.json"}
STEPS = {"step6_controls", "step6_answers", "summary"}


def test_a_q_id_without_extras_is_complete_and_a_later_run_adds_them_to_the_same_bytes(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = contents(finished / "A1/artifacts"), tmp_path / "pairs"
    artifacts = folder / "A1/artifacts"
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")

    def done(*flags: str) -> str:
        assert main([*command, *flags]) == 0
        assert main(["verify", str(folder)]) == 0
        return capsys.readouterr().err

    done("--extras", "none")
    assert contents(artifacts) == {name: data for name, data in whole.items() if name not in EXTRAS}
    assert status(folder, "A1")["status"] == "completed"
    assert not STEPS & status(folder, "A1")["stages"].keys()
    assert "everything is completed" in done("--extras", "none")

    assert main([*command, "--dry_run"]) == 0
    assert "completed, extras to be added" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.suffix and path.name[0] != "q"}
    done()
    assert contents(artifacts) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "everything is completed" in done("--extras", "none")
    assert contents(artifacts) == whole


def test_extras_that_were_begun_are_finished_whatever_is_asked_for_next(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    document = status(folder, "A1")
    document["status"] = "running"
    document["stages"]["step6_answers"] |= {"status": "running", "finished_at": None}
    del document["stages"]["summary"]
    write_status(folder, "A1", document)
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1", "--extras", "none")) == 0
    assert contents(folder / "A1/artifacts") == contents(finished / "A1/artifacts")
    assert main(["verify", str(folder)]) == 0


def test_a_larger_sweep_takes_as_many_prompts_a_pass_as_it_has_room_for(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")
    assert main([*command, "--alpha_sweep", "0.5"]) == 0
    document = status(folder, "A1")
    found = document["trials_per_pass"]["step6_sweeps"]
    assert found > 1
    document["trials_per_pass"]["step6_sweeps"] = 1  # as where memory was short
    write_status(folder, "A1", document)
    (folder / "A1/artifacts/step6/sweeps.json").unlink()
    assert main(command) == 0  # the same sweep is made as it was
    assert status(folder, "A1")["trials_per_pass"]["step6_sweeps"] == 1
    assert main([*command, "--alpha_sweep", "2"]) == 0
    assert status(folder, "A1")["trials_per_pass"]["step6_sweeps"] == found


def test_a_step_that_takes_long_is_spoken_of_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "so far" in record.getMessage():
                heard.set()

    def work_until_heard(_: Work) -> str:
        assert heard.wait(60)
        return "done"

    monkeypatch.setattr(progress, "SILENCE_S", 0.01)
    logger = logging.getLogger("relfv.progress")
    listener = Listener()
    logger.addHandler(listener)
    caplog.set_level(logging.INFO, logger="relfv")
    try:
        step = replace(STAGE, run=work_until_heard).step()
        qid.run_step(Work(QidFolder(tmp_path, "A1"), Settings(), lambda: pytest.fail("no model")), step)
    finally:
        logger.removeHandler(listener)
    assert any(STAGE.about in message and "s so far" in message for message in caplog.messages)


def test_while_a_stage_runs_everything_before_it_is_recorded_on_disk(
    csv_path: Path, llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks are written when the next step begins: what has ended is then there, with its hashes."""
    path, seen = tmp_path / "pairs/A1/artifacts/qid_status.json", {}
    real = qid.Step.run

    def run(step: qid.Step, work: Work) -> str:
        seen[step.name] = json.loads(path.read_text())["stages"]
        return real(step, work)

    monkeypatch.setattr(qid.Step, "run", run)
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")) == 0
    for at, name in enumerate(names := [*seen]):
        if not name.startswith("step6_layer_") or name.endswith("_0"):
            assert [record["status"] for record in seen[name].values()] == [*["completed"] * at, "running"], names
