"""What is said while something takes long: on a real terminal, in files and in pipes."""

from __future__ import annotations

import fcntl
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from conftest import ROOT
from folders import arguments
from relfv import progress
from relfv.pace import Pace
from relfv.progress import Task, at_hand, at_layer, at_work, counted, doing

IMPATIENT = (
    "import sys; from relfv import progress; progress.SILENCE_S = progress.REFRESH_S = 0.05; "
    "from relfv.cli import main; sys.exit(main(sys.argv[1:]))"
)
"""relfv whose silences are short."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"}


def on_a_terminal(command: list[str], *, columns: int = 100) -> tuple[int, str, str]:
    """Exit code, stdout and what a terminal of ``columns`` got as stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment())
    os.close(theirs)
    said = bytearray()

    def listen() -> None:
        try:
            while data := os.read(ours, 65536):
                said.extend(data)
        except OSError:  # Linux says so where the other end is closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    out, _ = running.communicate(timeout=300)
    listener.join()
    os.close(ours)
    return running.returncode, out.decode(), said.decode()


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_a_stage_and_every_line_stays_whole(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    command = arguments(llama_path, csv_path, tmp_path)
    code, out, said = on_a_terminal([sys.executable, "-c", IMPATIENT, *command])
    assert (code, out) == (0, "")
    assert re.search(r"\ropening .*\|", said)
    assert re.search(r"\r\[1/2, \d+ s left\] \w\w step\w+ \|.*\| .*s so far", said)  # before the first q_id has ended
    # What a bar wrote is overwritten before a line is written, so that lines begin at the left.
    lines = [line.rpartition("\r")[2] for line in said.replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if line.strip() and not re.match(r"\d\d:\d\d:\d\d ", line)] == []
    assert "so far" not in "".join(lines)
    assert all(len(shown) <= 100 for line in said.split("\n") for shown in line.split("\r") if "so far" in shown)


@pytest.mark.slow
def test_in_a_pipe_there_are_dated_lines_and_no_bar_from_the_opening_on(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", IMPATIENT, *arguments(llama_path, csv_path, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "\r" not in done.stderr
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in done.stderr.splitlines())
    log = (tmp_path / "pairs/run.log").read_text()
    for said in (done.stderr, log):
        assert re.search(r"opening .*: \d+ s so far: loading PyTorch", said)
        assert re.search(r"\[1/2, \d+ s left\] \w\w step\w+: .*s so far", said)


def test_a_loop_says_how_much_is_done_and_what_is_left_of_it() -> None:
    with at_work("stage", "what it does", unit="prompts") as task:
        for part in counted([slice(0, 4), slice(4, 6)], lambda part: part.stop - part.start):
            assert (task.done, task.total) == (part.start, 6)
        assert (task.done, task.total) == (6, 6)
        with at_work("within", "no unit: nothing is counted") as inner:
            assert list(counted([1, 2])) == [1, 2]
            assert (at_hand(), inner.total, task.total) == (inner, 0, 6)
    assert at_hand() is None


def test_the_part_of_the_work_and_the_layer_are_told_while_they_last() -> None:
    with at_work("stage", "what it does") as task:
        with doing("one part of it"):
            at_layer("layer 7 of 18")
            assert (task.about, task.said()) == ("one part of it", "layer 7 of 18, 0 s so far")
        at_layer("")
        assert (task.about, task.said()) == ("what it does", "0 s so far")


def test_time_left_of_a_stage_is_by_what_is_counted_or_by_what_it_took_before() -> None:
    task = Task("stage", "", unit="prompts", done=6, total=24, started=progress.time.monotonic() - 10)
    assert task.left_s() == pytest.approx(30, abs=1)
    assert task.said().startswith("6 of 24 prompts, 10 s so far, 30 s left")
    task.expected_s = 15
    assert task.left_s() == pytest.approx(5, abs=1)
    task.expected_s = 5  # longer than ever before: nothing is promised
    assert task.left_s() is None


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_time_left_is_known_before_the_first_q_id_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(3, {"a": 0.1, "b": 0.6, "c": 0.3})
    assert pace.heading() == "[1/3] "
    pace.begin()
    pace.begin_stage("a")
    clock.now += 10
    pace.begin_stage("b")
    assert pace.left() == pytest.approx(90 + 200)
    with at_work("b", "", unit="prompts") as task:
        task.done, task.total = 1, 4
        clock.now += 5  # four times as fast as its share has it
        assert pace.left() == pytest.approx(15 + 15 / 0.25 * 0.3 + 2 * (10 + 20 + 18), rel=0.01)


def test_what_is_only_slow_the_first_time_says_nothing_of_the_q_ids_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(28, {"sweep": 0.3, "heatmap": 0.02, "controls": 0.68})
    pace.begin()
    pace.begin_stage("sweep")
    clock.now += 3
    pace.begin_stage("heatmap")
    before = pace.left()
    assert before is not None
    assert before == pytest.approx(0.2 + 6.8 + 27 * 10)
    clock.now += 4  # a library is imported
    pace.begin_stage("controls")
    assert pace.left() == pytest.approx(before - 0.2)


def test_studies_count_once_they_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(2, {"sweep": 1.0})
    for stages in (("sweep", "study"), ("sweep",)):
        pace.begin()
        for stage in stages:
            pace.begin_stage(stage)
            clock.now += {"sweep": 10, "study": 30}[stage]
        if len(stages) == 2:
            pace.end()
    assert pace.left() == pytest.approx(30)
    pace.begin_stage("study")
    clock.now += 5
    assert pace.left() == pytest.approx(25)


def test_q_ids_that_another_run_took_say_nothing_of_the_pace_and_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, pace = Clock(monkeypatch), Pace(4, {"a": 1.0})
    pace.begin()
    clock.now += 0.1
    pace.end(lambda: 2)  # and one of the three that wait is taken, too
    assert pace.left() is None
    pace.begin()
    pace.begin_stage("a")
    clock.now += 100
    pace.end(pytest.fail)
    assert pace.heading() == "[3/4, 100 s left] "
    assert pace.left() == pytest.approx(100)


def test_a_stage_takes_as_long_as_it_did_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(4, {"a": 1.0})
    for seconds in (10, 30):
        pace.begin()
        pace.begin_stage("a")
        clock.now += seconds
        pace.end()
    pace.begin()
    assert pace.begin_stage("a") == 20
    assert pace.left() == pytest.approx(20 + 20)


def test_the_pace_of_thousands_of_q_ids_takes_no_more_room_than_that_of_ten() -> None:
    """Its time left stands in front of every log line, so it must not add up all q_ids before this one."""

    def behind(n: int) -> Pace:
        pace = Pace(n + 1, {"a": 0.5, "b": 0.5})
        for _ in range(n):
            pace.begin()
            pace.begin_stage("a")
            pace.begin_stage("b")
            pace.end()
        return pace

    assert len(pickle.dumps(behind(3000))) < len(pickle.dumps(behind(10))) + 100
