"""What page and tables tell of a q_id is read once for as long as its files stay as they are, and is never out of
date."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from folders import arguments, rewrite
from relfv.cli import main
from relfv.report import page
from relfv.report.known import Brief, Known
from relfv.report.page import page_path, write_report
from relfv.report.written_tables import _lines, _read_for, write_tables
from relfv.runs import worker
from relfv.runs.so_far import SoFar
from relfv.store import index


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two completed q_ids, as if they were very many."""
    monkeypatch.setattr(index, "FEWEST", 1)
    monkeypatch.setattr(page, "MOST_ON_ONE_PAGE", 1)
    return shutil.copytree(finished, tmp_path / "out" / finished.name)


class Reads(Counter[str]):
    """How often each file of a q_id, or its own page, is read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        read_bytes = Path.read_bytes

        def counted(path: Path) -> bytes:
            if path.is_relative_to(folder) and ("artifacts" in path.parts or path.parent.name == "q_ids"):
                self[str(path.relative_to(folder))] += 1
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", counted)


def written(folder: Path) -> dict[str, bytes]:
    """Page, q_ids' own pages and tables."""
    files = [*(folder / "report").rglob("*.html"), *(folder / "tables").glob("[a-z]*.*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_after_a_q_id_its_files_are_read_once_and_those_of_others_not_at_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished, tmp_path / finished.name)
    (folder / "A1").rename(tmp_path / "A1")
    so_far = SoFar(folder)
    so_far.write()
    (tmp_path / "A1").rename(folder / "A1")
    reads = Reads(folder, monkeypatch)
    so_far.write()
    assert "A1/artifacts/summary.json" in reads
    assert {(name, n) for name, n in reads.items() if n > 1 or not name.startswith("A1/")} == set()
    assert {name: written(folder)[name] for name in written(finished)} == written(finished)


def test_of_many_q_ids_nothing_is_read_again_that_is_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # own pages that were just written are read once
        write_report(folder)
        write_tables(folder)
    before, reads = written(folder), Reads(folder, monkeypatch)
    write_tables(folder)
    write_report(folder)
    assert not reads
    assert written(folder) == before
    shutil.rmtree(folder / ".locks")
    write_tables(folder)
    write_report(folder)
    assert written(folder) == before


def change_verdict(folder: Path) -> None:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "All is well."}))

    rewrite(folder / "A1/artifacts", "summary.json", change)


def test_an_own_page_that_is_deleted_is_made_again(folder: Path) -> None:
    write_report(folder)  # once: what it has just written it has not read yet
    before = written(folder)
    shutil.rmtree(folder / "report/q_ids")
    for _ in range(2):
        write_report(folder)
        assert written(folder) == before


def test_tables_that_cannot_be_read_are_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        write_tables(folder)
    before, opened = written(folder), Path.open

    def refused(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == "heads.csv":  # root may read any file
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **more)

    monkeypatch.setattr(Path, "open", refused)
    write_tables(folder)
    monkeypatch.undo()
    assert written(folder) == before


def test_what_was_changed_or_deleted_is_noticed(folder: Path) -> None:
    for _ in range(2):
        write_report(folder)
        write_tables(folder)
    before, own = written(folder), folder / "report/q_ids/A1.html"
    for change in (own.unlink, lambda: own.write_bytes(before["report/q_ids/A1.html"].replace(b"A1", b"B7"))):
        change()
        write_report(folder)
        assert written(folder) == before
    (folder / "tables/heads.csv").write_bytes(before["tables/heads.csv"].replace(b"1", b"2"))
    write_tables(folder)
    assert written(folder) == before
    change_verdict(folder)
    write_report(folder)
    write_tables(folder)
    assert "All is well." in own.read_text()
    assert "All is well." in (folder / "tables/summary.csv").read_text()
    shutil.rmtree(folder / "A1")
    write_report(folder)
    write_tables(folder)
    assert "A1" not in page_path(folder).read_text() + (folder / "tables/summary.csv").read_text()


def test_a_damaged_index_makes_no_wrong_page(folder: Path) -> None:
    for _ in range(2):
        write_report(folder)
        write_tables(folder)
    before = written(folder)
    kept = {path: path.read_bytes() for path in folder.glob(".locks/.[a-z]*.json")}
    assert {path.name for path in kept} == {".told.json", ".pages.json", ".tables.json"}
    for path, data in kept.items():  # it still is JSON
        path.write_bytes(data.replace(b"A1", b"A7").replace(b"completed", b"skipped").replace(b"[0,", b"[1,"))
    write_report(folder)
    write_tables(folder)
    assert written(folder) == before


def test_rows_are_made_from_no_file_that_is_not_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, artifacts = Reads(folder, monkeypatch), folder / "A1/artifacts"
    known = Known(folder)
    brief = known.briefs()[artifacts]
    assert isinstance(brief, Brief)
    assert None not in _lines(known, artifacts)
    looked_at = {str(Path(name).relative_to(folder)) for name in _read_for(artifacts, brief)}
    assert {name for name in reads if name.startswith("A1/")} == looked_at | {"A1/artifacts/qid_status.json"}


def test_no_q_ids_own_page_is_left_without_a_link_to_it(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Very many are chosen, but few of them completed."""
    for module in (page, worker):
        monkeypatch.setattr(module, "MOST_ON_ONE_PAGE", 1)
    more = ("--q_list", "A1,C3", "--extras", "none", "--n_trials_per_q", "5")
    assert main(arguments(llama_path, csv_path, tmp_path, *more)) == 0
    folder = tmp_path / "pairs"
    assert json.loads((folder / "C3/artifacts/qid_status.json").read_text())["status"] == "skipped"
    index = page_path(folder).read_text()
    assert [path.name for path in (folder / "report/q_ids").iterdir()] == ["A1.html"]
    assert 'href="q_ids/A1.html#A1"' in index


def test_of_very_many_q_ids_each_page_is_written_once(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (page, worker):
        monkeypatch.setattr(module, "MOST_ON_ONE_PAGE", 1)
    own: dict[Path, int] = {}
    write = worker.write_own_page

    def seen(folder: Path, artifacts_dir: Path) -> None:
        write(folder, artifacts_dir)
        path = folder / f"report/q_ids/{artifacts_dir.parent.name}.html"
        own[path] = path.stat().st_ino

    monkeypatch.setattr(worker, "write_own_page", seen)
    more = ("--q_list", "A1,B2", "--extras", "none", "--n_trials_per_q", "5")
    assert main(arguments(llama_path, csv_path, tmp_path, *more)) == 0
    assert {path: path.stat().st_ino for path in own} == own
    assert {path.stem for path in own} == {"A1", "B2"}
