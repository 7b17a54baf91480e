"""Ended at any instant, in any way, a run resumes to the bytes of an undisturbed one and repeats nothing."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import WORDS, llama
from crashes import (
    DIED,
    Fault,
    Fork,
    Job,
    Operations,
    finished_work,
    lighten,
    require_kept,
    require_undisturbed,
)
from power_cuts import Disk
from relfv.cli import main
from relfv.settings import STUDIES
from relfv.stages import sweeps
from relfv.stages.table import steps
from relfv.store.files import temporaries
from relfv.store.status import read_status

pytestmark = pytest.mark.slow
HOWS = ("before", "after", "ENOSPC", "EIO")


@pytest.fixture(scope="module")
def job(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Two eligible relations and one that is skipped, on a model that is as small as it may be."""
    folder = tmp_path_factory.mktemp("job")
    model = save_model(llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    csv_path = folder / "pairs.csv"
    rows = [f"{q_id},{a},{b}\n" for q_id, words in (("A1", WORDS[:4]), ("B2", WORDS[4:8])) for a, b in words]
    csv_path.write_text("id,ex_A,ex_B\n" + "".join(rows) + "C3,one,two\n")
    flags = ["run", "--model", str(model), "--relation_csv_path", str(csv_path)]
    for name in ("n_trials_per_q", "n_demos", "n_eval", "topk"):
        flags += [f"--{name}", "2"]
    flags += ["--alpha_sweep", "0.5,2"]
    undisturbed = folder / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch)
        assert main([*flags, "--out_root", str(undisturbed)]) == 0
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        Job(tuple(flags), undisturbed, 0.0).run(folder / "timed")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        yield Job(tuple(flags), undisturbed, seconds)


@pytest.fixture(scope="module")
def operations(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Operations:
    """What an undisturbed run does to files."""
    folder = tmp_path_factory.mktemp("operations")
    seen = Operations(folder)

    def body() -> int:
        seen.install()
        code = main([*job.flags, "--out_root", str(folder / "out")])
        (folder / "seen").write_bytes(pickle.dumps((seen.seen, seen.statuses, seen.written)))
        return code

    assert Fork(body, folder / "said").wait() == 0
    seen.seen, seen.statuses, seen.written = pickle.loads((folder / "seen").read_bytes())
    return seen


def test_killed_at_random_instants_and_resumed_it_ends_as_if_undisturbed(
    job: Job, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed again and again until one run gets through. ``--kills`` says how many kills.

    Each comes some time after one of the stages that are left, any of them, and not at any time of the whole: of that
    one machine spends most in a single stage, another before the first."""
    rng, kills, where = random.Random(0), 0, Counter[str]()
    every = len(finished_work(job.undisturbed))
    while kills < request.config.getoption("--kills"):
        out = tmp_path / f"out{kills}"
        while True:
            before = finished_work(out)
            run = job.start(out)
            done = rng.randint(len(before), every + 1)  # one more than there are: to its end
            run.until(lambda out=out, done=done: len(finished_work(out)) >= done)
            run.compute(run.computed() + rng.uniform(0, 4) * job.seconds / every)
            run.signal(signal.SIGKILL)
            code = run.wait()
            require_kept(before, out)
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.said()
            kills += 1
            where[f"{len(finished_work(out)):2d} stages and q_ids done"] += 1
        require_undisturbed(out, job)
        shutil.rmtree(out)
    print(kills, "kills:", dict(sorted(where.items())))


def test_studies_killed_at_random_instants_and_resumed_end_as_if_undisturbed(job: Job, tmp_path: Path) -> None:
    """Added to a finished q_id, whose other stages stay as they are."""
    rng = random.Random(0)
    undisturbed, out = (Path(shutil.copytree(job.undisturbed, tmp_path / name)) for name in ("undisturbed", "out"))
    added = Job((*job.flags, "--q_list", "A1", "--extras", ",".join(STUDIES)), undisturbed, job.seconds)
    added.run(undisturbed)
    for kill in (True, True, True, False):
        stages = {name: work for name, work in finished_work(out).items() if " " in name}  # statuses are added to
        run = added.start(out)
        if kill:
            run.compute(rng.uniform(0, added.seconds / 2))
            run.signal(signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL if kill else 0), run.said()
        require_kept(stages, out)
    require_undisturbed(out, added)


def test_dead_or_failed_at_any_operation_on_a_file_and_resumed_it_ends_as_if_undisturbed(
    job: Job, operations: Operations, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two faults in a row, then a run without. ``--faults`` says on how many trees; four times the number of operations
    is every one of them in every way."""
    rng = random.Random(0)
    n = len(operations.seen)
    kinds = {kind for kind, _, _ in operations.seen}
    assert kinds >= {"open", "write", "fsync", "replace", "mkdir"}
    trees = request.config.getoption("--faults")
    spread = [Fault(i * n // trees + rng.randrange(max(1, n // trees)), HOWS[i % 4]) for i in range(trees)]
    each = {kind: next(i for i, (other, _, _) in enumerate(operations.seen) if other == kind) for kind in kinds}
    chosen = spread + [Fault(at, how) for at in each.values() for how in ("before", "EIO")]
    happened = 0
    for number, first in enumerate(chosen):
        out = tmp_path / f"out{number}"
        happened += _faulty(job, out, first)
        happened += _faulty(job, out, Fault(rng.randrange(n - first.at), HOWS[rng.randrange(4)]))
        before = finished_work(out)
        job.run(out)
        require_kept(before, out)
        require_undisturbed(out, job)
        shutil.rmtree(out)
    print(happened, "faults in", len(chosen), "trees,", n, "operations")
    assert happened > len(chosen)


def _faulty(job: Job, out: Path, fault: Fault) -> bool:
    """One run with a fault, and what must hold right after it. True if the run got as far as that."""
    before, left = finished_work(out), set(temporaries(out))
    run = job.start(out, Operations(out.parent, fault).install)
    code = run.wait()
    require_kept(before, out)
    assert "Traceback" not in run.said()
    if code == 0:
        return False
    assert code == (DIED if fault.how in ("before", "after") else 1), (fault, run.said())
    if code == 1:
        assert "ERROR: " in run.said()
        # A process that lives on clears up after itself.
        assert set(temporaries(out)) <= left
    return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_random_instants_it_says_so_and_resumes_to_the_same_bytes(
    job: Job, tmp_path: Path, number: int, code: int
) -> None:
    rng, interrupts = random.Random(number), 0
    while interrupts < 8:
        out = tmp_path / f"out{interrupts}"
        while True:
            before = finished_work(out)
            run = job.start(out)
            run.until(run.said)  # earlier it has not taken charge of signals yet
            run.compute(run.computed() + rng.uniform(0, 1) * job.seconds)
            run.signal(number)
            found = run.wait()
            require_kept(before, out)
            assert "Traceback" not in run.said()
            assert not temporaries(out)
            if found == 0:
                break
            assert found == code, run.said()
            interrupts += 1
            for path in out.rglob("qid_status.json"):
                assert json.loads(path.read_bytes())["status"] != "running"
        job.run(out)
        require_undisturbed(out, job)
        shutil.rmtree(out)


def test_two_runs_at_once_do_every_stage_once_whenever_they_meet(job: Job, tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(8):
        out = tmp_path / f"out{number}"
        first = job.start(out)
        if number % 2:
            first.compute(rng.uniform(0, job.seconds))
        second = job.start(out)
        assert [first.wait(), second.wait()] == [0, 0], first.said()
        require_undisturbed(out, job)
        for q_id in ("A1", "B2"):
            said = (out / f"pairs/{q_id}/logs/stepD_aie.log").read_text()
            times = Counter(
                {
                    name: said.count(f" {q_id} {name} ")
                    for name in [*(step.name for step in steps([0, 1])), sweeps.STAGE.name]
                }
            )
            assert set(times.values()) == {1}, times
        manifest = json.loads((out / "pairs/run_manifest.json").read_text())
        runs = [manifest, *manifest["earlier_runs"]]
        # The one that found everything done has nothing to describe.
        assert 1 <= len(runs) == len({run["pid"] for run in runs})
        assert all(run["finished_at"] for run in runs)
        shutil.rmtree(out)


def test_a_stopped_runs_half_written_files_are_not_removed_by_another(
    job: Job, operations: Operations, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    at = next(
        i for i, (kind, path, _) in enumerate(operations.seen) if kind == "write" and "A1/artifacts/step6" in path
    )
    stopped = job.start(out, Operations(out.parent, Fault(at, "stop")).install)
    stopped.wait_until_stopped()
    try:
        its_own = set(temporaries(out))
        assert its_own
        job.run(out)
        assert set(temporaries(out)) == its_own
    finally:
        stopped.signal(signal.SIGCONT)
    assert stopped.wait() == 0, stopped.said()
    require_undisturbed(out, job)


def test_a_run_that_slept_while_another_did_its_work_forgets_and_repeats_nothing(
    job: Job, operations: Operations, tmp_path: Path
) -> None:
    """It has looked at A1, found nothing, and sleeps just before it takes A1's lock to write a pending status."""
    out = tmp_path / "out"
    at = next(i for i, (_, path, _) in enumerate(operations.seen) if path.endswith("A1.lock"))
    late = job.start(out, Operations(out.parent, Fault(at, "stop")).install)
    late.wait_until_stopped()
    try:
        job.run(out)
        before = finished_work(out)
    finally:
        late.signal(signal.SIGCONT)
    assert late.wait() == 0, late.said()
    require_kept(before, out)
    require_undisturbed(out, job)


def test_what_a_status_promises_would_survive_a_power_cut(operations: Operations) -> None:
    """Whenever a status takes its place, the content of every file it names has been synced, then its name, and the
    name of every folder above it."""
    unsynced_names: dict[str, set[str]] = {}
    synced: set[str] = set()
    promises = 0
    for index, (kind, path, source) in enumerate(operations.seen):
        folder, _, name = path.rpartition("/")
        if kind == "write":
            synced.discard(path)
        elif kind == "fsync":
            synced.add(path)
            unsynced_names.pop(path, None)
        elif kind in ("mkdir", "replace"):
            assert kind == "mkdir" or source in synced, path
            unsynced_names.setdefault(folder, set()).add(name)
        if index not in operations.statuses:
            continue
        status = operations.statuses[index]
        for stage in status["stages"].values():
            for file in stage["files"] if stage["status"] == "completed" else ():
                above = Path(folder) / file
                promises += 1
                while str(above).startswith(operations.root):
                    assert above.name not in unsynced_names.get(str(above.parent), ()), above
                    above = above.parent
    assert promises > 100
    assert not any(unsynced_names.values())


def test_after_a_power_cut_at_any_operation_what_is_recorded_is_there_and_the_run_goes_on(
    job: Job, operations: Operations, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """``--cuts`` says at how many; every tenth is resumed to its end, too."""
    rng, n_cuts, n = random.Random(0), request.config.getoption("--cuts"), len(operations.seen)
    cuts, recorded = Counter(sorted(rng.randrange(1, n + 1) for _ in range(n_cuts))), 0
    disk, number = Disk(operations.root), 0
    for index, operation in enumerate(operations.seen, start=1):
        disk.do(operation, operations.written.get(index - 1))
        for _ in range(cuts[index]):
            left = tmp_path / f"cut{number}"
            left.mkdir()
            disk.cut(rng, left)
            out = left / "out"
            for path in out.glob("*/*/artifacts/qid_status.json"):
                status = read_status(path.parent)
                assert status
                for name, record in status.stages.items():
                    if record.status == "completed":
                        recorded += 1
                        assert status.intact(name), (index, operation, name)
            if number % 10 == 0:
                before = finished_work(out)
                job.run(out)
                require_kept(before, out)
                require_undisturbed(out, job, may_lack=(".log", ".lock"))
            shutil.rmtree(left)
            number += 1
    print(number, "power cuts,", recorded, "recorded stages that had to be whole,", n, "operations")
    assert recorded > n_cuts
