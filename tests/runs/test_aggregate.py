"""``relfv aggregate``: what it finds, what it keeps, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from folders import rewrite
from relfv.cli import main
from relfv.errors import InputError
from relfv.report.page import write_pages
from relfv.runs.several import require_alike
from relfv.store.files import sha256_file
from relfv.store.locks import lock
from relfv.store.status import read_status

Q_IDS = ["A1", "B2"]


@pytest.fixture(scope="module")
def tree(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two relations put together, though a model of random weights can do neither. Read only."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("together") / "pairs"))
    assert main(["aggregate", str(folder), "--all"]) == 0
    return folder


@pytest.fixture
def copied(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "pairs"))


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "aggregate.json").read_text())


def rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open() as file:
        return {(row["layer"], row["head"]): row for row in csv.DictReader(file)}


def made(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> list[str]:
    """The relations that were left out by the model."""
    capsys.readouterr()
    assert main(["aggregate", str(folder), *flags]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder / 'aggregate.json'}\n"
    return [q_id for q_id in Q_IDS if f"] {q_id} left out in " in said.err]


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    capsys.readouterr()
    assert main(["aggregate", str(folder), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("ERROR") == 1
    return said


def test_the_table_has_the_means_of_the_relations_tables_to_the_last_digit(tree: Path) -> None:
    own = [rows(tree / q_id / "artifacts/cie_scores.csv") for q_id in Q_IDS]
    found = rows(tree / "aggregate_aie.csv")
    assert found.keys() == own[0].keys()
    for head, row in found.items():
        for column in ("mean_delta_p", "mean_abs_delta_logit", "mean_logprob_patch", "clean_mean_norm"):
            exact = sum(Fraction(float(of[head][column])) for of in own)
            assert float(row[column]) == float(exact) / 2
        assert (row["n_qid"], row["n_trials"]) == ("2", "50")
    scores = [float(row["mean_delta_p"]) for row in found.values()]
    assert scores == sorted(scores, reverse=True)
    best = document(tree)["heads"]["universal"]
    assert [(str(head["layer"]), str(head["head"])) for head in best] == list(found)[:20]


def test_each_relation_is_left_out_with_the_others_heads_and_its_own_row_is_step6(tree: Path) -> None:
    found = document(tree)
    for q_id, other in zip(Q_IDS, Q_IDS[::-1], strict=True):
        target = found["left_out"]["targets"][q_id]
        heads = json.loads((tree / other / "artifacts/top_heads.json").read_text())["heads"]
        assert target["made_from"]["heads_of_the_others"] == [[head["layer"], head["head"]] for head in heads]
        controls = json.loads((tree / q_id / "artifacts/step6/controls.json").read_text())
        for layer, numbers in target["vector"]["per_layer"].items():
            assert numbers["own"] == pytest.approx(controls["per_layer"][layer]["fv"], rel=1e-3, abs=1e-6)
        in_place = controls["at_once"]["numbers"]["heads_in_place"]
        assert target["in_place"]["own"] == pytest.approx(in_place, rel=1e-3, abs=1e-6)
    assert found["left_out"]["waiting"] == []
    assert found["left_out"]["over_relations"]["vector"]["n_relations"] == 2


def test_what_the_model_cannot_do_is_left_out_and_said(finished: Path, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    said = refused(capsys, folder)
    assert "of 2 relations are ones that the model can do (A1: clean accuracy 0.00 is not above" in said
    assert "keep them by --all" in said
    assert not (folder / "aggregate.json").exists()


def test_the_verdict_names_what_is_counted_against_the_rule_and_that_two_are_few(tree: Path) -> None:
    found = document(tree)
    assert (
        "2 of 2 relations are counted (--all), A1, B2 among them, which the model is not shown to do."
        in found["verdict"]
    )
    assert "With 2 relations intervals are wide" in found["verdict"]
    assert "with 2 relations no head can be told from 0" in found["verdict"]
    for q_id in Q_IDS:
        relation = found["relations"][q_id]
        assert relation["included"]
        assert relation["why_not"]
        assert relation["clean_acc"] <= relation["majority_acc"]


def test_a_second_run_opens_no_model_and_changes_nothing(copied: Path, capsys: Any) -> None:
    before = {path: sha256_file(path) for path in copied.glob("aggregate*")}
    assert made(capsys, copied, "--all", "--model", "/no/such/model") == []
    assert {path: sha256_file(path) for path in copied.glob("aggregate*")} == before
    (copied / "aggregate_aie.png").unlink()
    assert made(capsys, copied, "--all") == []
    assert {path: sha256_file(path) for path in copied.glob("aggregate*")} == before


def test_without_the_model_everything_else_is_there_and_the_rest_is_added(
    tree: Path, copied: Path, capsys: Any
) -> None:
    (copied / "aggregate.json").unlink()
    assert made(capsys, copied, "--all", "--no_model", "--model", "/no/such/model") == []
    found = document(copied)
    assert found["left_out"]["waiting"] == Q_IDS
    assert "was not tried (--no_model)" in found["verdict"]
    assert (copied / "aggregate_aie.csv").read_bytes() == (tree / "aggregate_aie.csv").read_bytes()
    assert main(["verify", str(copied)]) == 0
    assert made(capsys, copied, "--all") == Q_IDS
    assert (copied / "aggregate.json").read_bytes() == (tree / "aggregate.json").read_bytes()


def test_another_mean_makes_its_own_relation_anew_and_the_old_file_stays(tree: Path, copied: Path, capsys: Any) -> None:
    def turn_round(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "trials": content["trials"][::-1]}))

    rewrite(copied / "B2/artifacts", "sampled_trials_zeroshot.json", turn_round)
    assert main(["verify", str(copied)]) == 1
    what = "made from another B2/artifacts/sampled_trials_zeroshot.json"
    assert f"pairs/aggregate.json  out of date: aggregate.json ({what})" in capsys.readouterr().out
    assert f"Out of date ({what})" in write_pages(copied).read_text()
    assert made(capsys, copied, "--all") == ["B2"]
    (aside,) = copied.glob("aggregate.json.replaced-*")
    assert aside.read_bytes() == (tree / "aggregate.json").read_bytes()


def test_damage_is_seen_and_made_anew(tree: Path, copied: Path, capsys: Any) -> None:
    text = (copied / "aggregate.json").read_text()
    (copied / "aggregate.json").write_text(text.replace('"n_trials": 25', '"n_trials": 24', 1))
    assert main(["verify", str(copied)]) == 1
    assert "pairs/aggregate.json  damaged: aggregate.json" in capsys.readouterr().out
    assert "All relations together" not in write_pages(copied).read_text()
    assert made(capsys, copied, "--all") == Q_IDS
    assert (copied / "aggregate.json").read_bytes() == (tree / "aggregate.json").read_bytes()
    (copied / "aggregate_aie.csv").write_text("")
    assert main(["verify", str(copied)]) == 1
    assert "damaged: aggregate_aie.csv" in capsys.readouterr().out


def test_the_page_shows_it_and_so_does_the_index_of_several_relations(tree: Path, tmp_path: Path, capsys: Any) -> None:
    page = (tree / "report/index.html").read_text()
    assert "All relations together" in page
    assert 'href="../aggregate.json"' in page
    for name in ("one", "two"):
        shutil.copytree(tree, tmp_path / name, ignore=shutil.ignore_patterns("aggregate*"))
    assert made(capsys, tmp_path, "--all", "--no_model", "--q_list", "one/A1,one/B2,two/B2") == []
    found = document(tmp_path)
    assert list(found["relations"]) == ["one/A1", "one/B2", "two/B2"]
    assert "All relations together" in (tmp_path / "report/index.html").read_text()
    assert main(["verify", str(tmp_path)]) == 0
    assert f"{tmp_path.name}/aggregate.json  intact" in capsys.readouterr().out
    assert found["similarity"]["matrices"]["answers"][1][2] == 1.0


def test_relations_of_other_settings_are_not_averaged(tree: Path) -> None:
    statuses = {q_id: read_status(tree / q_id / "artifacts") for q_id in Q_IDS}
    assert all(statuses.values())
    require_alike(tree, statuses)  # other rows, the same settings
    statuses["B2"].fingerprint_fields |= {"n_demos": 4, "seed": 7}
    with pytest.raises(InputError, match=r"B2 was made with other settings than A1 \(n_demos was 9, now 4\)"):
        require_alike(tree, statuses)


def test_two_at_once_do_not_write_one_file_and_links_lead_no_write_outside(
    copied: Path, tmp_path: Path, capsys: Any
) -> None:
    with lock(copied / ".locks/.aggregate.lock"):
        assert f"is being written by process {os.getpid()}" in refused(capsys, copied, "--all")
    (copied / "aggregate.json").rename(tmp_path / "precious")
    (copied / "aggregate.json").symlink_to(tmp_path / "precious")
    assert "is a symbolic link" in refused(capsys, copied, "--all")
    assert "no q_id here" in refused(capsys, tmp_path / "nowhere")
