from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from relfv.cli import main
from relfv.errors import InputError
from relfv.report.page import write_report
from relfv.report.table import natural_key, status_table


def test_the_page_shows_every_q_id_and_its_links_lead_to_files(finished: Path) -> None:
    page = finished / "report/index.html"
    html = page.read_text()
    links = re.findall(r'(?:href|src)="([^"#]+)"', html)
    assert len(links) >= 8
    for link in links:
        assert (page.parent / link).resolve().is_file(), link
    assert "9 rows, fewer than the 10" in html
    # What differs from the spec is said at the foot of the page, and is no warning.
    assert "Other settings than the spec's: model is" in html.rpartition('<p class="soft">')[2]


def test_words_of_the_csv_are_text_on_the_page_and_never_markup(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pairs"
    shutil.copytree(finished, copy)
    path = copy / "A1/artifacts/sampled_trials.json"
    path.chmod(0o644)
    word = re.search(r'"query": \{\s*"input": "([^"]+)"', path.read_text()).group(1)  # type: ignore[union-attr]
    path.write_text(path.read_text().replace(f'"input": "{word}"', '"input": "<script>alert(1)</script>"'))
    html = write_report(copy).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_status_is_a_table_of_all_q_ids(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"A1 +completed +12 +\d of 3", said)
    assert re.search(r"C3 +skipped +9 ", said)
    assert "2 completed, 1 skipped" in said
    assert status_table(finished.parent) == status_table(finished)


def test_a_folder_without_results_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no qid_status\.json"):
        status_table(tmp_path)
    with pytest.raises(InputError, match="no q_id here"):
        write_report(tmp_path)


def test_q_ids_sort_as_people_count() -> None:
    assert sorted(["Q10", "Q2", "Q1"], key=natural_key) == ["Q1", "Q2", "Q10"]
