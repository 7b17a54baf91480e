"""Where output, temporary files, names and drives are not what one expects: one line each."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from crashes import Fork
from folders import arguments, status
from relfv.cli import main
from relfv.store import files
from relfv.store.files import write_atomic


def relfv(redirected: str, *command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command as a shell runs it, with ``redirected`` behind it."""
    line = f'exec "$0" -m relfv "$@" {redirected}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_a_closed_stdout_is_no_failure_and_a_full_one_is_one_line(finished: Path) -> None:
    for command in (("status", str(finished)), ("verify", str(finished)), ("report", str(finished))):
        assert (relfv(">&-", *command).returncode, relfv("2>&-", *command).returncode) == (0, 0)
    done = relfv(">/dev/full", "status", str(finished))
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"the output (stdout) cannot be written (No space left on device)" in done.stderr


@pytest.mark.slow
def test_a_run_whose_stdout_is_closed_is_complete(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    small = ("--q_list", "A1", "--topk", "2", "--n_trials_per_q", "2")

    def run() -> int:
        """As Python begins where a shell has closed descriptor 1."""
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
        return main(arguments(llama_path, csv_path, tmp_path, *small))

    process = Fork(run, tmp_path / "said")
    assert process.wait() == 0, process.said()
    assert status(tmp_path / "pairs", "A1")["status"] == "completed"


@pytest.mark.slow
def test_what_the_terminals_encoding_lacks_is_escaped(finished: Path, tmp_path: Path) -> None:
    there = tmp_path / "é"
    there.symlink_to(finished)
    done = relfv("", "report", str(there), PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\\xe9/report/index.html\n")


@pytest.mark.parametrize("flag", ["--relation_csv_path", "--model", "--out_root"])
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(
    flag: str, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")
    try:
        code = main([*arguments(llama_path, csv_path, tmp_path / "out"), flag, bad])
    except SystemExit as ending:
        code = ending.code  # type: ignore[assignment]
    assert code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert flag in said
    assert "is not UTF-8; expected a name that is" in said
    assert not [*tmp_path.iterdir()]


def test_without_a_temporary_folder_the_model_is_not_opened(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    assert main(arguments(llama_path, csv_path, tmp_path / "out")) == 1
    assert "set TMPDIR to a folder that can be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def fsync_failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], int | None]) -> None:
    """``fails`` gives the errno with which the fsync of a descriptor fails, or None."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if code := fails(descriptor):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")  # noqa: PTH112


def test_a_drive_that_cannot_sync_folders_is_named_once_and_written_to(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "_cannot_sync", set())
    fsync_failing(monkeypatch, lambda descriptor: errno.EINVAL if is_folder(descriptor) else None)
    small = ("--q_list", "A1", "--topk", "2", "--n_trials_per_q", "2")
    assert main(arguments(llama_path, csv_path, tmp_path / "out", *small)) == 0
    assert capsys.readouterr().err.count("this drive cannot sync folders (Invalid argument)") == 1
    assert status(tmp_path / "out/pairs", "A1")["status"] == "completed"


def test_a_file_that_cannot_be_synced_is_a_failure_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_failing(monkeypatch, lambda descriptor: None if is_folder(descriptor) else errno.EINVAL)
    with pytest.raises(Exception, match=r"x: cannot be written \(Invalid argument\)"):
        write_atomic(tmp_path / "x", b"1")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("interruptions", "works"), [(4, True), (10**6, False)])
def test_an_interrupted_call_is_tried_again_a_few_times(
    interruptions: int, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interruptions

    def once_more(_: int) -> int | None:
        nonlocal left
        left -= 1
        return errno.EINTR if left >= 0 else None

    fsync_failing(monkeypatch, once_more)
    if works:
        write_atomic(tmp_path / "x", b"1")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"1")]
        return
    with pytest.raises(Exception, match=r"x: cannot be written \(Interrupted"):
        write_atomic(tmp_path / "x", b"1")
    assert not [*tmp_path.iterdir()]


def test_a_long_path_is_cut_in_its_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "/".join(["deep" * 10] * 80))]) == 2
    said = capsys.readouterr().err
    assert len(said) < 500
    assert said.count("…") == 1
    assert said.endswith("expected the folder that relfv run wrote to\n")


# --- what a dry run says ---


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--device", "bogus"), "--device 'bogus': not a device"),
        (("--topk", "25"), "has 24 heads to choose from"),
        (("--k_sweep", "25"), "has 24 heads to choose from"),
        (("--model_spec", "gpt2"), "--model_spec 'gpt2'"),
        (("--quant", "8bit", "--offload", "cpu"), "packed weights do not stream"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    flags: tuple[str, ...], says: str, llama_path: Path, csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = arguments(llama_path, csv_path, tmp_path / "out", "--device", "cpu", *flags)
    for more in ((), ("--dry_run",)):
        assert main([*command, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_no_weights(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_path, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    assert main(arguments(model, csv_path, tmp_path / "out", "--dry_run")) == 0


def test_a_dry_run_refuses_damaged_trials_and_another_experiment(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "pairs"))
    command = [*arguments(llama_path, csv_path, tmp_path), "--dry_run"]
    assert main(command) == 0
    assert main([*command, "--seed", "5"]) == 1
    assert "refuse: seed was 0, now 5" in capsys.readouterr().out
    path = copied / "A1/artifacts/sampled_trials.json"
    path.chmod(0o644)
    path.write_text("{}")
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "refuse: " in said
    assert "the frozen trials were changed" in said
    assert "completed, nothing to do" in said


# --- what a config may ask for ---


@pytest.fixture
def with_config(llama_path: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        model = Path(shutil.copytree(llama_path, tmp_path / "model"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        return model

    return make


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("asked", ["someone/kernel", "kernels-community/flash-attn2", "paged|someone/kernel"])
def test_a_config_cannot_ask_for_code_from_elsewhere(
    key: str, asked: str, with_config: Callable[..., Path], csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = with_config(**{key: asked})
    for more in ((), ("--dry_run",)):
        assert main(arguments(model, csv_path, tmp_path / "out", *more)) == 2
        assert f"asks for attn_implementation '{asked}'" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_a_built_in_implementation_is_taken(
    asked: str, with_config: Callable[..., Path], csv_path: Path, tmp_path: Path
) -> None:
    assert main(arguments(with_config(attn_implementation=asked), csv_path, tmp_path / "out", "--dry_run")) == 0
