from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from folders import arguments, contents, status
from relfv.cli import main
from relfv.signals import Terminated, as_exceptions, raise_received


@contextmanager
def a_library_that_keeps(number: int, *, once_there: Path, error: type[Exception] | None) -> Iterator[None]:
    """While open, a signal arrives within the first module call after a file is there; its exception is swallowed, or
    becomes ``error``."""
    waiting = True

    def call(*_: object) -> None:
        nonlocal waiting
        if waiting and once_there.exists():
            waiting = False
            try:
                os.kill(os.getpid(), number)
            except BaseException:
                if error:
                    raise error("Invalid bounding box") from None

    handle = nn.modules.module.register_module_forward_pre_hook(call)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("error", [ValueError, None])
def test_an_interrupt_that_a_library_keeps_to_itself_ends_the_run_all_the_same(
    finished: Path,
    csv_path: Path,
    llama_path: Path,
    tmp_path: Path,
    number: int,
    code: int,
    error: type[Exception] | None,
) -> None:
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")
    metrics = tmp_path / "pairs/A1/artifacts/trial_metrics.jsonl"
    with a_library_that_keeps(number, once_there=metrics, error=error):
        assert main(command) == code
    found = status(tmp_path / "pairs", "A1")
    assert found["status"] == "pending"
    assert found["stages"]["stepD_trials"]["status"] == "completed"
    assert main(command) == 0
    assert contents(tmp_path / "pairs/A1/artifacts") == contents(finished / "A1/artifacts")


def test_handlers_are_put_back_and_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with as_exceptions():
            os.kill(os.getpid(), signal.SIGINT)
            raise_received()
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Terminated):
                raise_received()
        with as_exceptions():
            raise_received()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_an_interrupt_while_flags_are_read_is_an_interrupt_too(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Arguments(list[str]):
        def __iter__(self) -> Iterator[str]:
            os.kill(os.getpid(), number)
            return super().__iter__()

    assert main(Arguments(["status"])) == code
    assert "Traceback" not in capsys.readouterr().err
    raise_received()  # it was that command's, and is over: nothing is raised


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "ERROR: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_an_interrupt_while_modules_are_imported_is_an_interrupt_too(
    tmp_path: Path, number: int, code: int, said: str
) -> None:
    """The first module that the command line imports sends the signal, as a user might just then."""
    (tmp_path / "argparse.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(20)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "relfv", "status"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)
