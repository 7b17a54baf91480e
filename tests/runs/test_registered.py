"""``relfv run --plan``: on record before the first result, never replaced, and held against what was found."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import relfv
from relfv.cli import main
from relfv.report.registered import files_of_a_qid, layer_of

SETTINGS = {"n_trials_per_q": 2, "n_eval": 2, "topk": 2}
N_ROWS = {"says": "Two heads make it.", "file": "top_heads.json", "value": ["heads", 1, "layer"], "at_least": 0}
ONE_TRIAL = {"says": "There are many queries.", "file": "summary.json", "value": ["n_queries"], "at_least": 3}
OF_A_LAYER = {"says": "It helps.", "file": "controls.json", "value": ["per_layer", 1, "fv", "acc"], "at_most": 1}


def write(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def said_on(folder: Path) -> str:
    """The page, its tags and line breaks gone."""
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


@pytest.fixture(scope="module")
def followed(csv_path: Path, llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A relation's folder, begun with a plan; and the plan. Read only."""
    out = tmp_path_factory.mktemp("followed")
    hypotheses = [{**N_ROWS, "q_ids": ["A1"]}, {**ONE_TRIAL, "q_ids": ["A1"]}, OF_A_LAYER]
    plan = write(out / "mine.json", hypotheses=hypotheses, layer_rule=0, exclusions={}, analyst="A. B.")
    relfv.run(csv_path, str(llama_path), q_list=["A1"], out_root=out, plan=plan, **SETTINGS)
    return out / "pairs", plan


def again(followed: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(followed[0].parent, tmp_path / "copy")
    return tmp_path / "copy/pairs", tmp_path / "copy/mine.json"


def run(folder: Path, csv_path: Path, llama_path: Path, plan: Path, *flags: str) -> int:
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    places = ["--out_root", str(folder.parent), "--relation_csv_path", str(csv_path), "--plan", str(plan)]
    return main(["run", "--model", str(llama_path), *settings, *places, *flags])


def test_the_plan_is_on_record_before_the_first_stage_begins(followed: tuple[Path, Path]) -> None:
    folder, plan = followed
    content, status = (
        json.loads((folder / name).read_text()) for name in ("plan.json", "A1/artifacts/qid_status.json")
    )
    registered = content["registered"]
    assert registered["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert registered["at"] <= min(stage["started_at"] for stage in status["stages"].values())
    log = (folder / "run.log").read_text()
    assert log.index("plan registered") < log.index("A1 stepD_trials")
    assert registered["results_before"] == []
    assert registered["fingerprint_fields"].items() <= status["fingerprint_fields"].items()
    assert {name: content[name] for name in ("hypotheses", "layer_rule", "exclusions", "analyst")} == json.loads(
        plan.read_text()
    )


def test_the_page_says_what_held_and_whether_the_layer_rule_was_followed(
    followed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counted = "1 of 3 hypotheses held, 1 did not hold, 1 cannot be told yet"
    said = said_on(followed[0])
    assert "by A. B., before there was any result. sha256 of its file: " in said
    assert f"{counted}. Each is judged alone; nothing is corrected for their number." in said
    assert re.search(r"cannot be told yet ?held in 1 of 3 held: A1: [\d.]+ ?not run: B2, C3", said)
    assert "Layer rule: layer 0. Not followed by H3 of the 1 hypotheses with a layer." in said
    assert "H2 did not hold here (2; at least 3)" in said
    assert main(["status", str(followed[0])]) == 0
    assert f"before any result; {counted}" in " ".join(capsys.readouterr().out.split())


def test_the_same_plan_laid_out_anew_carries_on_and_another_is_refused(
    followed: tuple[Path, Path], csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plan = again(followed, tmp_path)
    before = (folder / "plan.json").read_bytes()
    plan.write_text(json.dumps(json.loads(plan.read_text()), indent=4))
    assert run(folder, csv_path, llama_path, plan, "--q_list=A1") == 0
    assert (folder / "plan.json").read_bytes() == before
    write(plan, **{**json.loads(plan.read_text()), "layer_rule": 1})
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for flags in (("--dry_run",), (), ("--force",)):
        capsys.readouterr()
        assert run(folder, csv_path, llama_path, plan, *flags) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line]
        assert (
            "with other layer_rule, and a plan is not replaced; go on without --plan, use another --out_root, or "
            in line
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    # What was registered is itself a plan, for another folder.
    other = tmp_path / "other/pairs"
    assert run(other, csv_path, llama_path, folder / "plan.json", "--dry_run") == 0


def test_other_settings_and_results_moved_aside_are_named(
    followed: tuple[Path, Path], csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder, plan = again(followed, tmp_path)
    assert run(folder, csv_path, llama_path, plan, "--q_list=A1", "--force", "--topk=3") == 0
    said = said_on(folder)
    assert "Changed since then, in A1: topk was 2, now 3." in said
    assert "Earlier results were moved aside; what is judged is the latest: A1.replaced-" in said
    (folder / "plan.json").unlink()  # and whoever registers now has seen them
    shutil.rmtree(folder / "A1")
    assert run(folder, csv_path, llama_path, plan, "--q_list=C3") == 0  # too few rows: no model is opened
    assert json.loads((folder / "plan.json").read_text())["registered"]["results_before"] == ["A1"]


def test_what_is_registered_after_results_is_no_prediction(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    lost = {"says": "No such row.", "file": "answers.json", "value": ["rows", 5000, "n_tokens"], "equals": 1}
    plan = write(tmp_path / "plan.json", hypotheses=[N_ROWS, {**lost, "q_ids": ["B2"]}], exclusions={"A1": "seen it"})
    places = ["--out_root", str(tmp_path), "--relation_csv_path", str(csv_path), "--plan", str(plan)]
    assert main(["run", "--model", str(llama_path), *places]) == 0
    assert "after results of B2, A1 were there" in capsys.readouterr().err
    said = said_on(folder)
    assert "No prediction of B2, A1: results were there when the plan was registered." in said
    # C3 has too few rows to run, and does not count; A1 is excluded.
    assert "1 of 2 hypotheses held, 1 cannot be told; 2 of them, on results that were there before, are no" in said
    assert "answers.json has no 5000 there: B2" in said
    assert "Excluded by the registered plan: seen it." in said
    assert main(["aggregate", str(folder), "--all"]) == 2
    assert "1 completed q_id(s) besides those that the registered plan excludes" in capsys.readouterr().err


def test_a_plan_that_was_changed_in_its_place_is_seen_by_verify_page_and_run(
    followed: tuple[Path, Path], csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plan = again(followed, tmp_path)
    assert main(["verify", str(folder)]) == 0
    assert "pairs/plan.json  intact" in capsys.readouterr().out
    (folder / "plan.json").chmod(0o644)
    (folder / "plan.json").write_text((folder / "plan.json").read_text().replace('"at_least": 3', '"at_least": 2'))
    assert main(["verify", str(folder)]) == 1
    assert "pairs/plan.json  DAMAGED" in capsys.readouterr().out.replace("damaged", "DAMAGED")
    assert main(["report", str(folder)]) == 0
    assert "it does not match its sha256_of_the_rest. Nothing is judged by it." in said_on(folder)
    assert run(folder, csv_path, llama_path, plan) == 2
    assert "has been changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "path", "layer"),
    [
        ("summary.json", ["share_of_gap", "held_out, layer_chosen_by_others", "low"], "held_out"),
        ("summary.json", ["share_of_gap", "fv", "value"], "best"),
        ("summary.json", ["p", "zero_shot"], None),
        ("summary.json", ["carriers", "heads_in_place", "share_of_gap", "value"], None),
        ("new_queries.json", ["share_of_gap", "value"], "held_out"),
        ("controls.json", ["per_layer", 12, "fv", "mean_p"], 12),
        ("controls.json", ["per_layer", "12", "fv", "mean_p"], 12),
        ("step6_all_layers_summary.json", ["best_score"], "best"),
        ("top_heads.json", ["heads", 0, "mean_delta_p"], None),
        ("aggregate.json", ["heads", "n_called"], None),
    ],
)
def test_it_is_known_how_the_layer_of_a_value_was_chosen(file: str, path: list[str | int], layer: Any) -> None:
    assert layer_of(file, path) == layer


def test_every_json_file_of_a_q_id_may_be_named() -> None:
    assert {"summary.json", "controls.json", "top_heads.json", "ablation.json"} <= files_of_a_qid().keys()
