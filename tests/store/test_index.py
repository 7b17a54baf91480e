"""What is kept of thousands of q_ids saves time and is never out of date."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from relfv.errors import RelfvError
from relfv.report.table import status_json
from relfv.runs.naming import take_names_below
from relfv.store import index
from relfv.store.files import write_atomic
from relfv.store.status import read_status


@pytest.fixture
def folder(finished: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "FEWEST", 1)
    return shutil.copytree(finished, tmp_path / "out" / finished.name)


def rows(folder: Path) -> dict[str, dict[str, object]]:
    return {row["q_id"]: row for row in json.loads(status_json(folder.parent))}


def count_reads(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Path]:
    seen: list[Path] = []
    monkeypatch.setattr(f"{module}.read_status", lambda path: [seen.append(path), read_status(path)][1])
    return seen


def test_a_status_is_read_again_only_where_its_files_were_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(folder)
    seen = count_reads(monkeypatch, "relfv.report.table")
    assert rows(folder) == before
    assert not seen
    moved = folder.rename(folder.with_name("renamed"))
    assert {row["relation"] for row in rows(moved).values()} == {"renamed"}
    status = read_status(moved / "A1" / "artifacts")
    assert status
    status.set("failed", "another reason")
    assert (rows(moved)["A1"]["status"], rows(moved)["A1"]["reason"]) == ("failed", "another reason")
    status.set("completed")
    summary = moved / "A1/artifacts/step6/step6_all_layers_summary.json"
    assert rows(moved)["A1"]["best_score"] == before["A1"]["best_score"]
    summary.write_bytes(summary.read_bytes()[:-20])
    assert rows(moved)["A1"]["status"] == "unreadable"
    (moved / "B2/artifacts/qid_status.json").write_bytes(b"{}")
    assert rows(moved)["B2"]["status"] == "unreadable"


def test_what_goes_on_is_looked_at_every_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = read_status(folder / "A1" / "artifacts")
    assert status
    status.set("running")
    rows(folder)
    seen = count_reads(monkeypatch, "relfv.report.table")
    rows(folder)
    assert seen == [folder / "A1" / "artifacts"]


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"version": 1}', b'{"q_ids": 3}'])
def test_an_index_that_is_damaged_or_cannot_be_written_changes_nothing(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(folder)
    path = folder / ".locks" / ".status.json"
    assert path.is_file()
    path.write_bytes(content)

    def fails(path: Path, data: bytes) -> Path:
        raise RelfvError(f"{path}: cannot be written")

    monkeypatch.setattr(index, "write_atomic", fails)
    assert rows(folder) == before
    assert path.read_bytes() == content
    monkeypatch.setattr(index, "write_atomic", write_atomic)
    assert rows(folder) == before
    assert path.read_bytes() != content


def test_names_are_looked_at_again_where_the_csv_was_written(
    folder: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copy(csv_path, tmp_path / csv_path.name))
    for q_id in ("A1", "B2"):
        status = read_status(folder / q_id / "artifacts")
        assert status
        status.settings = type(status.settings)(**{**status.settings.to_json(), "relation_csv_path": str(own)})
        status.write()
    take_names_below(folder.parent)
    seen = count_reads(monkeypatch, "relfv.runs.naming")
    take_names_below(folder.parent)
    assert folder / "B2" / "artifacts" not in seen
    with own.open(encoding="utf-8", newline="") as file:
        lines = [*csv.reader(file)]
    text = "\n".join(",".join([*line, "name" if not i else "things"]) for i, line in enumerate(lines))
    own.write_text(text + "\n", encoding="utf-8")
    take_names_below(folder.parent)
    assert rows(folder)["B2"]["name"] == "things"
