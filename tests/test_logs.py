"""What a program that calls relfv hears of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

_PROGRAM = """
import logging, sys
sys.path.insert(0, {src!r})
from relfv.logs import logging_to, told
{set_up}
with told(), logging_to(__import__("pathlib").Path("of_a_run.log")):
    logging.getLogger("relfv.stages").info("a stage ends")
    logging.getLogger("relfv.stages").warning("a warning")
assert logging.getLogger("relfv").propagate and not logging.getLogger("relfv").handlers
"""
_FILE = "logging.basicConfig(filename='own.log', level='{}')"


@pytest.mark.parametrize(
    ("set_up", "where", "hears"),
    [
        ("", "stderr", ["a stage ends", "a warning"]),
        (_FILE.format("INFO"), "own.log", ["a stage ends", "a warning"]),
        (_FILE.format("WARNING"), "own.log", ["a warning"]),
        (_FILE.format("INFO") + "; logging.getLogger('relfv').setLevel('ERROR')", "own.log", []),
    ],
)
def test_a_program_hears_what_it_asks_for_and_as_a_command_does_where_it_set_up_no_logging(
    set_up: str, where: str, hears: list[str], tmp_path: Path
) -> None:
    program = _PROGRAM.format(src=str(ROOT / "src"), set_up=set_up)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    own = tmp_path / "own.log"
    said = {"stdout": done.stdout, "stderr": done.stderr, "own.log": own.read_text() if own.exists() else ""}
    for line in ("a stage ends", "a warning"):
        assert [name for name, text in said.items() if line in text] == [where] * (line in hears)
        assert line in (tmp_path / "of_a_run.log").read_text()
