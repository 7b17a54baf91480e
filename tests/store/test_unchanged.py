from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from folders import arguments, status
from relfv.cli import main
from relfv.store import files, index
from relfv.store.unchanged import Unchanged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "FEWEST", 1)
    for name in ("artifacts/step6/a.json", "artifacts/b.csv", "logs/c.log"):
        (tmp_path / "Q1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Q1" / name).write_text("0123")
    return tmp_path


def noted(folder: Path) -> None:
    found = Unchanged(folder)
    with found.kept():
        found.note("Q1", found.state("Q1", "all of it"))


def holds(folder: Path, asked: str = "all of it") -> bool:
    return Unchanged(folder).holds("Q1", asked)


def test_a_q_id_is_unchanged_until_a_file_is_touched_or_more_is_asked_for(folder: Path) -> None:
    assert not holds(folder)
    noted(folder)
    assert holds(folder)
    assert not holds(folder, "more")
    (folder / "Q1/logs/c.log").write_text("another log")
    assert holds(folder)
    path = folder / "Q1/artifacts/step6/a.json"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("9999")
    os.utime(path, ns=times)  # as long and, it claims, as old as it was
    assert not holds(folder)


@pytest.mark.parametrize("damage", ["{", "[]", '{"Q1": 3}'])
def test_what_is_not_as_it_was_written_is_not_trusted(folder: Path, damage: str) -> None:
    noted(folder)
    (folder / ".locks/.unchanged.json").write_text(damage)
    assert not holds(folder)


def test_a_copy_is_hashed_anew(folder: Path, tmp_path: Path) -> None:
    noted(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert not holds(tmp_path / "copy")


def test_few_q_ids_leave_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "FEWEST", 2)
    noted(folder)
    assert not (folder / ".locks").exists()


def test_a_run_of_many_q_ids_does_not_hash_them_again_and_still_notices_a_damaged_file(
    llama_path: Path,
    csv_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(index, "FEWEST", 1)
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1", "--extras", "none")
    assert main(command) == 0
    artifacts = tmp_path / "pairs/A1/artifacts"
    scores, whole = artifacts / "cie_scores.csv", (artifacts / "cie_scores.csv").read_bytes()
    read: list[str] = []
    monkeypatch.setattr(files, "read_bytes", lambda path: read.append(path.name) or path.read_bytes())
    assert main(command) == 0
    assert scores.name not in read
    assert "everything is completed: 1 q_ids done" in capsys.readouterr().err
    scores.write_bytes(whole.replace(b"0", b"1"))
    assert main(command) == 0
    assert scores.read_bytes() == whole
    assert status(tmp_path / "pairs", "A1")["status"] == "completed"


def test_a_run_of_many_q_ids_sees_that_the_csv_has_changed(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "FEWEST", 1)
    path = tmp_path / "mine.csv"
    rows = [row for row in csv_path.read_text().splitlines() if row.startswith(("id,", "A1,"))]
    path.write_text("\n".join(rows))
    command = arguments(llama_path, path, tmp_path, "--extras", "none", "--n_trials_per_q", "2", "--topk", "2")
    for name in ("", "young", "its young"):
        path.write_text("\n".join([f"{rows[0]},name", *(f"{row},{name}" for row in rows[1:])]))
        assert main(command) == 0
        assert status(tmp_path / "mine", "A1")["name"] == name
