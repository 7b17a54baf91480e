"""A relation's words: from a column of the CSV to wherever the q_id is read, and no part of the experiment."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from conftest import ROOT
from folders import arguments, contents, status
from relfv.cli import main
from relfv.relations import load_relations, rows_sha256
from relfv.report.page import page_path
from relfv.report.table import status_table
from relfv.runs.naming import take_names_below

NAMES = {"A1": "animal -> <its> young", "B2": "place -> where it is", "C3": ""}


@pytest.fixture
def named_csv(csv_path: Path, tmp_path: Path) -> Path:
    """The tests' CSV with names: on some rows of A1 only."""
    return with_names(csv_path, tmp_path / "pairs.csv", NAMES)


def with_names(csv_path: Path, path: Path, names: dict[str, str]) -> Path:
    header, *rows = csv_path.read_text(encoding="utf-8").splitlines()
    lines = [
        f"{row},{names.get(row.partition(',')[0], '') if i % 2 or 'A1' not in row else ''}"
        for i, row in enumerate(rows)
    ]
    path.write_text("\n".join([header + ",Name", *lines, ""]), encoding="utf-8")
    return path


def test_a_name_is_read_and_is_no_part_of_the_rows(csv_path: Path, named_csv: Path) -> None:
    plain, named = load_relations(csv_path), load_relations(named_csv)
    assert {q_id: relation.name for q_id, relation in named.items()} == {q: NAMES.get(q, "") for q in plain}
    assert plain == named
    assert [rows_sha256(relation) for relation in plain.values()] == [rows_sha256(r) for r in named.values()]


def test_the_shipped_relations_have_names() -> None:
    relations = load_relations(ROOT / "datasets/relation/relationA_ex.csv")
    assert relations["Q10"].name == "adjective -> opposite"
    assert len({relation.name for relation in relations.values()} - {""}) == len(relations)


def test_a_finished_folder_takes_a_new_name_without_computing_anything(
    finished: Path, llama_path: Path, csv_path: Path, named_csv: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(finished, tmp_path / "out/pairs"))
    monkeypatch.setattr("relfv.language_model.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    before = contents(folder / "A1/artifacts")
    command = arguments(llama_path, named_csv, tmp_path / "out")
    assert main(command) == 0
    assert contents(folder / "A1/artifacts") == before
    assert status(folder, "A1")["name"] == NAMES["A1"]
    page = page_path(folder).read_text()
    assert "animal → &lt;its&gt; young" in page
    assert "<its>" not in page
    monkeypatch.setenv("COLUMNS", "120")
    assert "A1 animal -> <its> young  completed" in status_table(folder)
    monkeypatch.setenv("COLUMNS", "80")
    assert re.search(r"\nA1 +completed .*\n    animal -> <its> young\n", status_table(folder))
    assert main(["verify", str(folder)]) == 0

    with_names(csv_path, named_csv, {"A1": "quite another"})
    assert main(command) == 0
    assert "quite another" in page_path(folder).read_text()
    assert "place →" not in page_path(folder).read_text()
    capsys.readouterr()


def test_a_report_made_again_has_the_names_that_the_csv_has_now(
    finished: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "out/pairs"))
    kept = csv_path.read_bytes()
    try:
        with_names(csv_path, tmp_path / "named.csv", NAMES)
        csv_path.write_bytes((tmp_path / "named.csv").read_bytes())
        assert main(["report", str(folder)]) == 0
        assert "place → where it is" in page_path(folder).read_text()
        # Rows that are others by now are another relation, whatever it is called.
        csv_path.write_text("id,ex_A,ex_B,name\nA1,one,two,counting words\n")
        assert main(["report", str(folder)]) == 0
        assert "counting words" not in page_path(folder).read_text()
    finally:
        csv_path.write_bytes(kept)


def test_what_is_asked_of_one_q_id_renames_that_one_alone(finished: Path, csv_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "out/pairs"))
    kept = csv_path.read_bytes()
    try:
        with_names(csv_path, tmp_path / "named.csv", NAMES)
        csv_path.write_bytes((tmp_path / "named.csv").read_bytes())
        take_names_below(folder / "A1")
    finally:
        csv_path.write_bytes(kept)
    assert [status(folder, q_id)["name"] for q_id in ("A1", "B2")] == [NAMES["A1"], ""]


def test_the_log_calls_a_relation_by_its_name(
    llama_path: Path, named_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--q_list", "A1", "--topk", "2", "--n_trials_per_q", "2")
    assert main(arguments(llama_path, named_csv, tmp_path / "out", *small)) == 0
    said = capsys.readouterr().err
    assert "A1 (animal -> <its> young) completed" in said
    assert "A1 summary" in said
    assert ": animal -> <its> young: " in said
