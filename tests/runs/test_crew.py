"""``--devices``: real processes, each with the model, that share the q_ids of one run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crashes import Fork, with_forked_members
from folders import arguments, contents, status
from relfv.cli import main
from relfv.runs.crew import on_devices
from relfv.runs.plan import OnRay, RunRequest
from relfv.runs.rehearsal import more_on_a_card, outline_for
from relfv.settings import Settings

TWO = ("--device", "cpu", "--per_card", "2")


@pytest.fixture
def started(csv_path: Path, llama_path: Path, tmp_path: Path) -> Callable[..., Fork]:
    """A run by two processes, in a process of its own, of which they are forks; ``first`` is called in the first."""

    def start(*flags: str, first: Callable[[], None] = lambda: None) -> Fork:
        command = arguments(llama_path, csv_path, tmp_path, *TWO, *flags)
        return Fork(lambda: with_forked_members(lambda: main(command), first), tmp_path / "said")

    return start


def refusing(why: str) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(why)

    return refuse


@pytest.fixture(scope="module")
def by_one(finished: Path, llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes on a CPU: a GPU's bits are others."""
    if not torch.cuda.is_available():
        return finished
    out = tmp_path_factory.mktemp("by_one")
    assert main(arguments(llama_path, csv_path, out, "--device", "cpu")) == 0
    return out / "pairs"


def wait_for(path: Path, process: Fork) -> None:
    for _ in range(24000):
        if path.exists() or process.has_ended():
            return
        time.sleep(0.005)


def holder(folder: Path, q_id: str) -> int:
    """The process that is at a q_id, by its lock."""
    found = re.search(r"process (\d+)", (folder / f".locks/{q_id}.lock").read_text())
    assert found
    return int(found[1])


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_process_leaves_its_q_id_to_another_and_every_byte_is_as_in_one_process(
    llama_path: Path, csv_path: Path, by_one: Path, tmp_path: Path
) -> None:
    """Here the processes are started as a user's are."""
    command = arguments(llama_path, csv_path, tmp_path, *TWO)
    folder, process = tmp_path / "pairs", Fork(lambda: main(command), tmp_path / "said")
    wait_for(folder / "A1/artifacts/stepD_mean_acts", process)
    killed = holder(folder, "A1")
    assert killed != process.pid
    os.kill(killed, signal.SIGKILL)
    code, said = process.wait(180), process.said()
    assert code == 0, said
    assert re.search(r"the process on cpu ended at A1 \(killed by SIGKILL.*\); another takes it", said)
    assert holder(folder, "A1") not in (killed, process.pid)
    for q_id in ("A1", "B2"):
        assert contents(folder / q_id / "artifacts") == contents(by_one / q_id / "artifacts")
        assert said.count(f" {q_id} stepD_cie ") == 1
        assert said.count(f" {q_id} completed in ") == 1
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["devices"] == ["cpu", "cpu"]
    assert manifest["outcomes"] == {"C3": "skipped", "A1": "completed", "B2": "completed"}
    assert manifest["earlier_runs"] == []
    # all that was said is in the log of the run, details of stages included
    assert f" {'A1'} step6" in (folder / "run.log").read_text()


@pytest.mark.slow
def test_no_more_processes_start_than_there_are_q_ids(started: Callable[..., Fork]) -> None:
    process = started("--q_list", "A1", "--extras", "none")
    assert process.wait(120) == 0, process.said()
    assert process.said().count("opened ") == 1
    assert "A1 completed in " in process.said()


@pytest.mark.slow
def test_an_interrupt_is_passed_on_and_no_process_is_left(started: Callable[..., Fork], tmp_path: Path) -> None:
    folder, process = tmp_path / "pairs", started()
    wait_for(folder / "A1/artifacts/trial_metrics.jsonl", process)
    workers = {holder(folder, q_id) for q_id in ("A1", "B2")}
    process.signal(signal.SIGINT)
    code, said = process.wait(120), process.said()
    assert code == 130, said
    assert not any(map(is_alive, workers))
    assert status(folder, "A1")["status"] == "pending"
    assert "A1 interrupted; what was finished is on disk" in said
    assert "running" not in {status(folder, q_id)["status"] for q_id in ("A1", "B2")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc what lives")
def test_processes_end_with_the_one_that_started_them(started: Callable[..., Fork], tmp_path: Path) -> None:
    folder, process = tmp_path / "pairs", started()
    wait_for(folder / "A1/artifacts/stepD_mean_acts", process)
    worker = holder(folder, "A1")
    process.signal(signal.SIGKILL)
    process.wait()
    for _ in range(6000):
        if not is_alive(worker):
            break
        time.sleep(0.01)
    assert not is_alive(worker)
    assert status(folder, "A1")["status"] == "pending"


@pytest.mark.slow
def test_a_card_that_lets_in_one_process_only_has_one(
    started: Callable[..., Fork], by_one: Path, tmp_path: Path
) -> None:
    """As CUDA says it where the compute mode is exclusive, in three lines."""
    busy = refusing("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with\n")
    process = started("--extras", "none", first=lambda: setattr(torch, "ones", busy))
    code, said = process.wait(120), process.said()
    assert code == 0, said
    (line,) = [line for line in said.splitlines() if "WARNING" in line]
    assert "cpu lets no further process in: CUDA calls it busy or unavailable" in line
    assert line.endswith("or have the mode set to DEFAULT. Its other processes go on; --per_card 1 asks for one")
    assert len({holder(tmp_path / "pairs", q_id) for q_id in ("A1", "B2")}) == 1
    name = "A1/artifacts/trial_metrics.jsonl"
    assert (tmp_path / "pairs" / name).read_bytes() == (by_one / name).read_bytes()


@pytest.mark.slow
def test_a_process_whose_device_refuses_everything_leaves_its_q_id_to_another(
    started: Callable[..., Fork], tmp_path: Path
) -> None:
    """As CUDA does after an illegal access, until the process ends: nothing else fails in it."""

    def fail_at_metrics() -> None:
        replace = Path.replace

        def once(path: Path, target: Path) -> Path:
            if str(target).endswith("trial_metrics.jsonl"):
                torch.ones = refusing("CUDA error: an illegal memory access was encountered")
                torch.ones()
            return replace(path, target)

        Path.replace = once

    process = started("--extras", "none", first=fail_at_metrics)
    code, said = process.wait(120), process.said()
    assert code == 0, said
    (q_id,) = re.findall(r"ERROR: (\w+) failed: RuntimeError: CUDA error: an illegal memory access", said)
    assert f"the process on cpu ended at {q_id} (exit code 1: it can use its device no more); another takes it" in said
    assert [status(tmp_path / "pairs", one)["status"] for one in ("A1", "B2")] == ["completed"] * 2


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_is_one_line_and_leaves_everything_as_it_was(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(llama_path, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = arguments(damaged, csv_path, tmp_path / "out", "--devices", "cpu,cpu", "--force")
    (there := tmp_path / "out/pairs/A1").mkdir(parents=True)
    process = Fork(lambda: with_forked_members(lambda: main(command)), tmp_path / "said")
    code, said = process.wait(120), process.said()
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if "ERROR" in line]
    assert f"--model '{damaged}'" in line
    assert [*there.parent.iterdir()] == [there]


def test_a_device_has_as_many_processes_as_name_it_times_per_card(tmp_path: Path) -> None:
    request = RunRequest(Settings(model="demo", device="cpu"), None, tmp_path)
    for asked, expected in (
        (replace(request, devices=("cpu", "cpu")), 2),
        (replace(request, per_card=3), 3),
        (replace(request, devices=("cpu", "cpu"), per_card=2), 4),
        (request, 1),
    ):
        found = on_devices(asked)
        assert found.devices == (("cpu",) * expected if asked != request else ())
        assert found.processes_a_card == on_devices(found).processes_a_card == expected
    two_pairs = replace(request, devices=("cuda:0+cuda:1", "cuda:2", "cuda:0+cuda:1"))
    assert two_pairs.processes_a_card == 2
    assert replace(request, ray=OnRay("local", gpus_per_worker=0.5)).processes_a_card == 2


def test_one_process_on_a_card_with_room_for_more_is_told_so(
    llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are q_ids enough that it pays, host cores, and in each part of the memory room for all trials."""
    request = RunRequest(Settings(model=str(llama_path), device="cpu"), None, tmp_path)
    assert more_on_a_card(request, outline_for(request), 1000) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    request = replace(request, settings=replace(request.settings, device="auto"))
    for gib, cores, n_q_ids, expected in (
        (80, 16, 30, 4),
        (80, 8, 99, 2),
        (12, 64, 99, 2),
        (80, 4, 99, 0),
        (80, 16, 29, 0),
    ):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, gib=gib: SimpleNamespace(total_memory=gib << 30)
        )
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        said = more_on_a_card(request, outline_for(request), n_q_ids)
        start = f"cuda:0 has room for {expected} processes, which write the same bytes: "
        assert said.startswith(start) if expected else not said
    two = replace(request, devices=("cuda:0", "cuda:0"))
    assert more_on_a_card(two, outline_for(two), 1000) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.slow
def test_two_processes_on_a_card_write_what_one_does(csv_path: Path, llama_path: Path, tmp_path: Path) -> None:
    for name, flags in (("one", ()), ("two", ("--per_card", "2"))):
        assert main(arguments(llama_path, csv_path, tmp_path / name, "--device", "cuda:0", *flags)) == 0
    for q_id in ("A1", "B2"):
        one, two = (contents(tmp_path / name / "pairs" / q_id / "artifacts") for name in ("one", "two"))
        assert one == two


def test_a_dry_run_says_how_many_processes_there_would_be(
    csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, *TWO, "--dry_run")) == 0
    assert re.search(r"processes +2, on cpu, cpu\n", capsys.readouterr().out)


def test_one_device_is_this_process(
    csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, "--devices", "cpu", "--q_list", "A1")) == 0
    assert "devices" not in json.loads((tmp_path / "pairs/run_manifest.json").read_text())
    assert holder(tmp_path / "pairs", "A1") == os.getpid()


def test_weights_that_stream_are_in_memory_once_for_all_processes(
    started: Callable[..., Fork], by_one: Path, tmp_path: Path
) -> None:
    """Both have the one file without a name mapped, and it is gone with them."""
    process = started("--offload", "cpu")
    wait_for(tmp_path / "pairs/B2/artifacts/stepD_mean_acts", process)
    held = {q_id: shared_memory(holder(tmp_path / "pairs", q_id)) for q_id in ("A1", "B2")}
    assert process.wait(180) == 0, process.said()
    (file,) = {*held["A1"], *held["B2"]}
    assert len(held["A1"][file]) == len(held["B2"][file]) > 1
    assert contents(tmp_path / "pairs/A1/artifacts") == contents(by_one / "A1/artifacts")


def shared_memory(pid: int) -> dict[str, list[str]]:
    """By inode the parts of files without a name that a process has mapped."""
    found: dict[str, list[str]] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:relfv" in line:
            found.setdefault(line.split()[4], []).append(line)
    return found
