from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from folders import status, write_status
from relfv.report.table import status_json
from relfv.store.folder import QidFolder
from relfv.store.locks import lock

EXTRAS = ("step6_controls", "step6_answers", "summary")


@pytest.mark.parametrize(("extras", "n_steps"), [("all", 15), ("none", 12)])
def test_a_running_q_id_is_counted_by_the_steps_that_it_has_to_take(
    finished: Path, tmp_path: Path, extras: str, n_steps: int
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    document = status(folder, "A1")
    document["config"]["extras"] = extras
    document["status"] = "running"
    for name in EXTRAS:
        del document["stages"][name]
    document["stages"]["injection_curve"] |= {"status": "running", "finished_at": None}
    write_status(folder, "A1", document)
    with lock(QidFolder(folder / "A1/artifacts", "A1").lock):
        (row,) = [row for row in json.loads(status_json(folder)) if row["q_id"] == "A1"]
    assert (row["n_steps_done"], row["n_steps"]) == (11, n_steps)
    assert row["reason"] == f"at injection_curve, 11 of {n_steps} steps done"
