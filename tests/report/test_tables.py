from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from folders import arguments
from relfv.cli import main
from relfv.report.tables import COMMON, WRITTEN, columns_of
from relfv.stages.scores import read_scores


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"tables/{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def artifact(folder: Path, name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / f"A1/artifacts/{name}").read_text())


def test_a_run_writes_every_table_with_the_same_first_columns(finished: Path) -> None:
    for name in WRITTEN:
        rows = table(finished, name)
        assert tuple(rows[0]) == columns_of(name)
        assert tuple(rows[0])[:3] == COMMON
        assert {row["q_id"] for row in rows} == ({"A1", "B2", "C3"} if name == "summary" else {"A1", "B2"})
        assert all(row["model"] for row in rows)


def test_one_thing_has_one_name_and_one_value_in_all_tables(finished: Path) -> None:
    summary = next(row for row in table(finished, "summary") if row["q_id"] == "A1")
    best = next(row for row in table(finished, "layers") if (row["q_id"], row["is_best"]) == ("A1", "True"))
    shared = set(best) & set(summary)
    assert {"layer", "acc_base", "acc_with", "mean_delta_p", "mean_delta_p_ci_low", "n_eval", "alpha"} <= shared
    ends = {"mean_delta_p_ci_low", "mean_delta_p_ci_high"}  # one layer alone is summed in another order than all
    assert all(best[column] == summary[column] for column in shared - ends)
    assert all(float(best[column]) == pytest.approx(float(summary[column]), rel=1e-12) for column in ends)


def test_numbers_are_those_of_the_artifacts_to_the_last_digit(finished: Path) -> None:
    steps, answers = artifact(finished, "step6/step6_all_layers_summary.json"), artifact(finished, "step6/answers.json")
    summary = next(row for row in table(finished, "summary") if row["q_id"] == "A1")
    layer = artifact(finished, f"step6/layer_{steps['best_layer']}/eval_summary.json")
    for column in ("acc_base", "acc_with", "mean_p_base", "mean_delta_p"):
        assert float(summary[column]) == layer[column]
    assert float(summary["exact_match_with"]) == answers["summary"]["exact_match_with"]
    heads = [row for row in table(finished, "heads") if row["q_id"] == "A1"]
    scored = read_scores(finished / "A1/artifacts/aie_scores.csv")
    assert [(int(r["layer"]), int(r["head"]), float(r["mean_delta_p_ci_low"])) for r in heads] == [
        (one.id.layer, one.id.head, one.scores["mean_delta_p_ci_low"]) for one in scored
    ]
    assert [int(row["rank"]) for row in heads] == list(range(1, 25))
    controls = artifact(finished, "step6/controls.json")
    of_fv = {row["layer"]: row for row in table(finished, "controls") if (row["q_id"], row["control"]) == ("A1", "fv")}
    for at, numbers in controls["per_layer"].items():
        assert float(of_fv[at]["mean_delta_p"]) == numbers["fv"]["mean_delta_p"]
        assert float(of_fv[at]["mean_delta_p_ci_high"]) == numbers["fv"]["ci_high"]
    written = [row["written_with"] for row in table(finished, "answers") if row["q_id"] == "A1"]
    assert written == [row["written_with"] for row in answers["rows"]]


def test_what_was_left_out_is_an_empty_cell(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path, "--q_list", "A1,C3", "--extras", "none")) == 0
    folder = tmp_path / "pairs"
    assert (table(folder, "answers"), table(folder, "controls")) == ([], [])
    one, skipped = table(folder, "summary")
    assert (one["verdict"], one["share_of_gap"], one["exact_match_with"]) == ("", "", "")
    assert (skipped["status"], skipped["n_rows"], skipped["layer"]) == ("skipped", "9", "")


def test_a_restart_makes_tables_again_that_are_missing_damaged_or_old_and_no_others(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    tables = {path: path.read_bytes() for path in sorted((folder / "tables").glob("[a-z]*.*"))}
    again = arguments(llama_path, csv_path, tmp_path)
    stamps = [path.stat().st_mtime_ns for path in tables]
    assert main(again) == 0
    assert [path.stat().st_mtime_ns for path in tables] == stamps
    for change in (lambda: shutil.rmtree(folder / "tables"), lambda: (folder / "tables/heads.csv").write_text("x")):
        change()
        assert main(again) == 0
        assert {path: path.read_bytes() for path in tables} == tables
    (folder / "tables/heads.csv").write_text("x")
    assert main(["verify", str(folder)]) == 1
    assert main(["export", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert {path: path.read_bytes() for path in tables} == tables


def test_export_writes_parquet_that_pandas_reads(finished: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    assert main(["export", str(tmp_path), "--parquet"]) == 0
    for name in WRITTEN:
        frame, rows = pandas.read_parquet(folder / f"tables/{name}.parquet"), table(folder, name)
        assert (list(frame), len(frame)) == (list(rows[0]), len(rows))
        assert len(pandas.read_csv(folder / f"tables/{name}.csv")) == len(rows)
    assert main(["verify", str(folder)]) == 0


def test_export_without_pandas_writes_nothing_and_says_what_to_install(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    assert main(["export", str(folder), "--parquet"]) == 2
    assert "pip install 'relfv[pandas]'" in capsys.readouterr().err
    assert not list((folder / "tables").glob("*.parquet"))
    assert main(["export", str(tmp_path / "nowhere")]) == 2
