"""Disks that are full, read-only or forbidden, limits on file sizes, and paths that are too long: one clear line,
nothing lost, and a restart goes on. Real ones: a small tmpfs in a mount namespace of its own, which ends with its
process."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folders import arguments, contents, status
from relfv.cli import main
from relfv.store.status import read_status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="mounts, capabilities and limits as Linux has them"),
]
MS_REMOUNT, MS_RDONLY, MS_REC, MS_PRIVATE = 32, 1, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def libc(name: str, *given: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*given):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def in_a_child(work: Callable[[], None]) -> str:
    """Run ``work`` in a fork of this process. Returns its traceback, if it has one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        problem = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child was killed"
    return problem


def own_mounts() -> None:
    """Be root in namespaces of our own, so that mounts are allowed and nobody else sees them."""
    uid, gid = os.getuid(), os.getgid()
    libc("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def mount_tmpfs(folder: Path, options: str, flags: int = 0) -> None:
    libc("mount", b"tmpfs", str(folder).encode(), b"tmpfs", flags, options.encode())


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the kernel or the container does not allow it."""
    folder = tmp_path_factory.mktemp("probe")

    def probe() -> None:
        own_mounts()
        mount_tmpfs(folder, "size=64k")

    problem = in_a_child(probe)
    if problem:
        pytest.skip(f"no mounts of our own here: {problem.splitlines()[-1]}")


def run(*given: Any) -> tuple[int, str]:
    """-> exit code and what was said, in which nothing may look like a crash."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments(*given))
    text = said.getvalue()
    assert "Traceback" not in text, text
    assert "Logging error" not in text, text
    return code, text


def files_done(relation: Path) -> dict[str, bytes]:
    """What finished stages have promised, read through the recorded hashes."""
    done = {}
    for path in sorted(relation.glob("*/artifacts")):
        found = read_status(path)
        for stage in found.stages if found else ():
            if found and found.intact(stage):
                done |= {f"{path.parent.name}/{name}": (path / name).read_bytes() for name in found.stages[stage].files}
    return done


def require_said(said: str, words: str, remedy: str) -> None:
    lines = [line for line in said.splitlines() if words in line]
    assert lines, said
    for line in lines:
        assert re.search(rf"/\S+: cannot be (written|read) \({words}\); {remedy}", line), line


def test_a_full_disk_stops_a_run_at_any_stage_and_costs_nothing_done(
    mounts: None, finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    whole = {q: contents(finished / q / "artifacts") for q in ("A1", "B2")}
    disk = tmp_path / "disk"
    disk.mkdir()

    def work() -> None:
        own_mounts()
        mount_tmpfs(disk, "size=8k")
        relation, reached, before, code = disk / "pairs", set(), {}, 1
        for size in (8, 64, 160, 240, 560, 800, 900, 1000, 1100, 1200):
            mount_tmpfs(disk, f"size={size}k", MS_REMOUNT)
            code, said = run(llama_path, csv_path, disk)
            assert code == 1, f"{size} KiB were enough"
            require_said(said, "No space left on device", "free space on that disk, then run again")
            done = files_done(relation)
            assert done.items() >= before.items(), f"lost at {size} KiB"
            for path in relation.glob("*/artifacts"):
                found = read_status(path)
                assert found is None or found.status in ("failed", "running", "pending", "completed", "skipped")
                assert not [*path.rglob("*.tmp")]
            reached.add(len(done))
            before = done
        assert len(reached) >= 5, sorted(reached)
        mount_tmpfs(disk, "size=16m", MS_REMOUNT)
        assert run(llama_path, csv_path, disk)[0] == 0
        assert {q: contents(relation / q / "artifacts") for q in whole} == whole
        assert {status(relation, q)["status"] for q in whole} == {"completed"}

    assert in_a_child(work) == ""


def test_a_read_only_disk_is_one_line_and_nothing_changes(
    mounts: None, finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    whole = contents(finished / "A1/artifacts")
    disk = tmp_path / "disk"
    disk.mkdir()

    def work() -> None:
        own_mounts()
        mount_tmpfs(disk, "size=16m")
        shutil.copytree(finished, disk / "pairs")
        (disk / "pairs/A1/artifacts/fv_global_resid.pt").unlink()
        before = contents(disk)
        mount_tmpfs(disk, "size=16m", MS_REMOUNT | MS_RDONLY)
        for more in ((), ("--force",)):
            code, said = run(llama_path, csv_path, disk, *more)
            assert code == 1
            require_said(said, "Read-only file system", "mount it writable, or use another output folder")
            assert sum("ERROR" in line for line in said.splitlines()) == 1
        assert contents(disk) == before
        mount_tmpfs(disk, "size=16m", MS_REMOUNT)
        assert run(llama_path, csv_path, disk)[0] == 0
        assert contents(disk / "pairs/A1/artifacts") == whole

    assert in_a_child(work) == ""


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def heed_permissions() -> None:
    """Give up what lets root write where the mode forbids it."""
    libc("capset", ctypes.byref(_CapabilityHeader(0x20080522, 0)), (ctypes.c_uint32 * 6)())


@pytest.mark.parametrize("forbidden", ["", "A1/artifacts", "A1/artifacts/step6/layer_1", "B2/logs", ".locks"])
def test_a_folder_without_permission_fails_what_needs_it_and_resumes(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, forbidden: str
) -> None:
    whole = {q: contents(finished / q / "artifacts") for q in ("A1", "B2")}
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    for path in ("A1/artifacts/step6/layer_1/eval_summary.json", "B2/artifacts/fv_global_resid.pt"):
        (relation / path).unlink()
    if forbidden == "":
        (relation / "run.log").unlink()
    if forbidden == "B2/logs":
        (relation / "B2/logs/stepD_aie.log").unlink()
    if forbidden == ".locks":
        (relation / ".locks/A1.lock").unlink()

    def work() -> None:
        heed_permissions()
        (relation / forbidden).chmod(0o555)
        before = files_done(relation)
        code, said = run(llama_path, csv_path, tmp_path)
        assert code == 1
        require_said(said, "Permission denied", "change its permissions, or use another output folder")
        assert files_done(relation).items() >= before.items()
        if forbidden.startswith("A1"):
            assert status(relation, "B2")["status"] == "completed"
        if forbidden.endswith("layer_1"):
            assert "Permission denied" in status(relation, "A1")["reason"]
            assert status(relation, "A1")["status"] == "failed"
        if forbidden == "B2/logs":  # it comes before A1
            assert (status(relation, "B2")["status"], status(relation, "A1")["status"]) == ("failed", "completed")
        (relation / forbidden).chmod(0o755)
        assert run(llama_path, csv_path, tmp_path)[0] == 0
        assert {q: contents(relation / q / "artifacts") for q in whole} == whole

    assert in_a_child(work) == ""


def test_a_status_that_may_not_be_read_is_left_alone(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    """It is not damaged: nothing is moved, nothing made again."""
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    before = contents(relation / "A1")

    def work() -> None:
        heed_permissions()
        (relation / "A1/artifacts/qid_status.json").chmod(0)
        code, said = run(llama_path, csv_path, tmp_path)
        assert code == 1
        require_said(said, "Permission denied", "change its permissions")
        assert contents(relation / "A1") == before
        assert not [*relation.glob("A1.*")]

    assert in_a_child(work) == ""


@pytest.mark.parametrize("limit", [1000, 5000, 20000, 60000])
def test_a_limit_on_file_sizes_fails_the_q_ids_and_kills_nobody(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, limit: int
) -> None:
    whole = contents(finished / "A1/artifacts")

    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code, said = run(llama_path, csv_path, tmp_path, "--q_list", "A1")
        assert code == 1
        require_said(said, "File too large", r"raise the limit on file sizes \(ulimit -f\), then run again")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if limit >= 20000:
            assert status(tmp_path / "pairs", "A1")["status"] == "failed"
        assert run(llama_path, csv_path, tmp_path, "--q_list", "A1")[0] == 0
        assert contents(tmp_path / "pairs/A1/artifacts") == whole

    assert in_a_child(work) == ""


def test_a_path_that_is_too_long_says_so(finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    for more in ((), ("--force",)):
        code, said = run(llama_path, csv_path, tmp_path / ("x" * 300), *more)
        assert code == 1
        assert "File name too long" in said
        assert "use a shorter path for the output folder" in said
        assert sum("ERROR" in line for line in said.splitlines()) == 1
    assert not any(tmp_path.iterdir())
    # one that only the longest name of all does not fit into
    results = next((finished / "A1/artifacts/step6/layer_0").glob("step6_results_*")).relative_to(finished)
    room = 4100 - len(str(tmp_path)) - len(f"/pairs/{results}")
    long = tmp_path / "/".join(["y" * 99] * (room // 100) + ["z" * (room % 100)])
    code, said = run(llama_path, csv_path, long, "--q_list", "A1")
    assert code == 1
    require_said(said, "File name too long", "use a shorter path for the output folder")
    assert status(long / "pairs", "A1")["status"] == "failed"
    assert "shorter path" in status(long / "pairs", "A1")["reason"]
