"""Several runs on one folder, as job arrays start them: processes that know nothing of each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import PLACES, ROOT, WORDS
from folders import arguments, contents, status
from relfv.cli import main
from relfv.runs.manifest import MANIFEST, read_manifest
from relfv.store.locks import held_by

N_QIDS = 8
SMALL = ("--n_trials_per_q", "5", "--n_eval", "5", "--n_demos", "3", "--extras", "none")


@pytest.fixture(scope="module")
def many_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("csv") / "many.csv"
    rows = [(f"Q{i}", *pair) for i in range(1, N_QIDS + 1) for pair in (WORDS + PLACES)[i : i + 10]]
    path.write_text("id,ex_A,ex_B\n" + "".join(f"{q},{a},{b}\n" for q, a, b in rows))
    return path


def forked(work: Callable[[], int]) -> int:
    """-> the number of a child process that does ``work`` and ends with its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def at_a_qid(folder: Path, process: int) -> bool:
    locks = [path for path in folder.glob(".locks/*.lock") if not path.name.startswith(".")]
    return any((held_by(path) or "").startswith(f"process {process} ") for path in locks)


def made_by(log: Path) -> list[str]:
    """The q_ids whose last stage but figures was made by the runs of a log."""
    return re.findall(r"(Q\d+) vector_file", log.read_text())


@pytest.mark.slow
def test_four_runs_share_a_folder_one_is_killed_and_one_more_call_has_every_q_id_once(
    llama_path: Path, many_csv: Path, tmp_path: Path
) -> None:
    command, folder = arguments(llama_path, many_csv, tmp_path, *SMALL), tmp_path / "many"
    children = [forked(lambda: main(command)) for _ in range(4)]
    while not at_a_qid(folder, children[0]):
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0)
        time.sleep(0.005)
    os.kill(children[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [-signal.SIGKILL, 0, 0, 0]
    assert main(command) == 0
    q_ids = [f"Q{i}" for i in range(1, N_QIDS + 1)]
    assert [status(folder, q_id)["status"] for q_id in q_ids] == ["completed"] * N_QIDS
    assert sorted(made_by(folder / "run.log")) == q_ids


@pytest.mark.slow
def test_shards_without_locks_have_every_q_id_once_and_leave_what_tells_of_all_to_report(
    llama_path: Path,
    many_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    command, folder = arguments(llama_path, many_csv, tmp_path, *SMALL, "--q_list", "Q1,Q2,Q3,Q4,Q5"), tmp_path / "many"
    whole = tmp_path / "whole"
    assert main([*command, "--out_root", str(whole)]) == 0
    monkeypatch.setattr(fcntl, "flock", unsupported)
    for i in (1, 2):
        assert main([*command, "--shard", f"{i}/2"]) == 0
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        f"{name}.shard_{i}_of_2" for name in ("run.log", MANIFEST) for i in (1, 2)
    }
    assert [made_by(folder / f"run.log.shard_{i}_of_2") for i in (1, 2)] == [["Q1", "Q3", "Q5"], ["Q2", "Q4"]]
    assert not (folder / "report").exists()
    for _ in range(2):  # the second time there is nothing to gather
        assert main(["report", str(folder)]) == 0
        manifest = read_manifest(folder / MANIFEST)
        runs = [manifest, *manifest["earlier_runs"]]
        assert sorted((run["shard"], run["q_list"]) for run in runs) == [
            ("1/2", ["Q1", "Q3", "Q5"]),
            ("2/2", ["Q2", "Q4"]),
        ]
    assert "Q5" in (folder / "report/index.html").read_text()
    assert contents(folder / "tables").keys() == contents(whole / "many/tables").keys()
    for q_id in ("Q1", "Q2"):
        assert contents(folder / q_id / "artifacts") == contents(whole / "many" / q_id / "artifacts")
    capsys.readouterr()
    assert main([*command, "--shard", "6/7"]) == 2
    assert "--shard 6/7: there are fewer than 6 q_ids" in capsys.readouterr().err
    assert main([*command, "--out_root", str(tmp_path / "other")]) == 1
    assert "--shard" in capsys.readouterr().err


FAKE = {
    "sbatch": """#!/bin/bash
# TASKS tasks, each in a process of its own with its number in the environment; one that asks for it runs again.
export SLURM_SUBMIT_DIR=$PWD
for task in $(seq "$TASKS"); do
  (
    export SLURM_JOB_ID=$((7 + task)) SLURM_ARRAY_TASK_ID=$task
    while :; do
      rm -f "$STATE/requeue.$SLURM_JOB_ID"
      code=0; bash "$@" || code=$?
      echo "task $task exit $code" >> "$STATE/said"
      [ -e "$STATE/requeue.$SLURM_JOB_ID" ] || break
    done
  ) &
done
wait
""",
    "srun": """#!/bin/bash
# The step's process; its number, for who sends the signal before the time limit.
echo $BASHPID > "$STATE/step.$SLURM_JOB_ID"
exec "$@"
""",
    "scontrol": """#!/bin/bash
[ "$1" = requeue ] && touch "$STATE/requeue.$2"
""",
}


@pytest.mark.slow
def test_the_slurm_script_is_requeued_when_its_time_is_up_and_goes_on(
    llama_path: Path, many_csv: Path, tmp_path: Path
) -> None:
    commands, state = tmp_path / "bin", tmp_path / "state"
    for folder in (commands, state):
        folder.mkdir()
    flags = shlex.join(arguments(llama_path, many_csv, tmp_path / "out", *SMALL)[1:])
    fake = {**FAKE, "relfv": f'#!/bin/bash\nexec {sys.executable} -m relfv "$@" {flags}\n'}  # the last ones count
    for name, text in fake.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "STATE": str(state), "TASKS": "1"}
    job = subprocess.Popen(["sbatch", str(ROOT / "examples/slurm.sbatch")], cwd=tmp_path, env=environment)
    folder = tmp_path / "out/many"
    while not list(folder.glob("*/artifacts/cie_scores.csv")):
        assert job.poll() is None
        time.sleep(0.02)
    os.kill(int((state / "step.8").read_text()), signal.SIGUSR1)
    assert job.wait() == 0
    assert (state / "said").read_text().splitlines() == ["task 1 exit 138", "task 1 exit 0"]
    assert {json.loads(path.read_text())["status"] for path in folder.glob("*/artifacts/qid_status.json")} == {
        "completed"
    }
    assert len(made_by(folder / "run.log")) == N_QIDS
