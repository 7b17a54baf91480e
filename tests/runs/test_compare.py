"""``relfv compare``: two models, or two settings, on the same relations."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import llama
from folders import arguments
from relfv.cli import main
from relfv.stages.verdict import HELD_OUT
from relfv.stats import clustered_mean


@pytest.fixture(scope="module")
def other_settings(finished: Path, llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other")
    more = ("--alpha", "3", "--topk", "4", "--reuse_stepd", str(finished))
    assert main(arguments(llama_path, csv_path, out, *more)) == 0
    return out / "pairs"


@pytest.fixture(scope="module")
def other_model(save_model: Callable[..., Path], csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model with more heads."""
    model = save_model(llama(hidden_size=60, num_attention_heads=10, num_key_value_heads=5, num_hidden_layers=2))
    out = tmp_path_factory.mktemp("model")
    assert main(arguments(model, csv_path, out, "--q_list", "A1", "--extras", "none")) == 0
    return out


def table(out: Path) -> dict[str, dict[str, float | str | None]]:
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def value(cell: str) -> float | str | None:
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell

    return {f"{row['b']} {row['q_id']}": {name: value(cell) for name, cell in row.items()} for row in rows}


def read(folder: Path, q_id: str, name: str) -> list[dict] | dict:  # type: ignore[type-arg]
    text = (folder / q_id / "artifacts" / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)


def best_rows(folder: Path, q_id: str) -> list[dict]:  # type: ignore[type-arg]
    best = read(folder, q_id, "step6/step6_all_layers_summary.json")["best_layer"]  # type: ignore[call-overload]
    return read(folder, q_id, f"step6/layer_{best}/eval_trials.jsonl")  # type: ignore[return-value]


def test_two_settings_are_compared_query_by_query(
    finished: Path, other_settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(finished), str(other_settings), "--out_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / f"compare.{kind}") for kind in ("csv", "svg", "html")
    ]
    found = table(tmp_path)
    assert list(found) == ["B A1", "B B2", "B all"]
    for q_id in ("A1", "B2"):
        row = found[f"B {q_id}"]
        one, two = best_rows(finished, q_id), best_rows(other_settings, q_id)
        clusters = [r["prompt"] for r in one]
        assert clusters == [r["prompt"] for r in two]
        for measure, key in (("p", "p_with"), ("acc", "accuracy_with")):
            difference = np.array([[b[key] - a[key]] for a, b in zip(one, two, strict=True)])
            mean = clustered_mean(difference, np.unique(clusters, return_inverse=True)[1].tolist())
            assert row[f"{measure}_difference"] == pytest.approx(mean.mean[0], abs=1e-12)
            assert row[f"{measure}_low"] == pytest.approx(mean.low[0], abs=1e-12)
        summaries = [read(folder, q_id, "summary.json") for folder in (finished, other_settings)]
        shares = [summary["share_of_gap"].get(HELD_OUT) for summary in summaries]  # type: ignore[call-overload]
        for side, share in zip("ab", shares, strict=True):
            assert row[f"held_out_share_{side}"] == (share and pytest.approx(share["value"], abs=1e-9))
        heads = [
            {(h["layer"], h["head"]) for h in read(folder, q_id, "top_heads.json")["heads"]}  # type: ignore[call-overload]
            for folder in (finished, other_settings)
        ]
        assert row["n_heads_shared"] == len(heads[0] & heads[1]) == 4
        assert row["n_heads_shared_by_chance"] == pytest.approx(20 * 4 / 24)
    differences = [found[f"B {q_id}"]["p_difference"] for q_id in ("A1", "B2")]
    assert found["B all"]["p_difference"] == pytest.approx(np.mean(differences))  # type: ignore[arg-type]
    page = (tmp_path / "compare.html").read_text()
    for words in ("alpha", "topk", "3.0", str(finished)):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")
    ElementTree.fromstring((tmp_path / "compare.svg").read_text())


def test_results_compared_with_themselves_differ_in_nothing(finished: Path, tmp_path: Path) -> None:
    assert main(["compare", str(finished.parent), str(finished), "--q_list", "A1", "--out_dir", str(tmp_path)]) == 0
    (row,) = table(tmp_path).values()
    assert [row[f"{name}_difference"] for name in ("p", "acc")] == [0, 0]
    assert row["cosine"] == pytest.approx(1)
    assert row["n_heads_shared"] == 20
    assert "No setting differs." in (tmp_path / "compare.html").read_text()


def test_of_models_of_other_shapes_only_what_they_do_is_compared(
    finished: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(finished), str(other_model), str(finished), "--out_dir", str(tmp_path)]) == 0
    found = table(tmp_path)
    assert list(found) == ["B A1", "C A1", "C B2", "C all"]
    row = found["B A1"]
    assert row["p_difference"] is not None
    assert row["held_out_share_b"] is row["n_heads_shared"] is row["cosine"] is None
    assert "in A or B alone, and not compared: B2" in capsys.readouterr().err


def test_q_ids_without_a_query_in_common_are_said(
    finished: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("id,ex_A,ex_B\n" + "".join(f"A1,new{i},word{i}\n" for i in range(12)))
    assert main(arguments(llama_path, path, tmp_path / "out", "--extras", "none")) == 0
    assert main(["compare", str(finished), str(tmp_path / "out"), "--out_dir", str(tmp_path / "c")]) == 0
    (row,) = table(tmp_path / "c").values()
    assert (row["n_queries"], row["p_difference"]) == (0, None)
    assert row["cosine"] is not None
    assert "A1: not one query is the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["$ONE"], "1 folder(s); expected two"),
        (["$ONE", "$NONE"], "no completed q_id here"),
        (["$ONE", "$ONE", "--q_list", "Z9"], "no completed q_id of --q_list here"),
        (["$ONE", "$OTHER", "--q_list", "A1,B2"], "--q_list: B2 not completed in each of"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    given: list[str], says: str, finished: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"$ONE": str(finished), "$NONE": str(tmp_path), "$OTHER": str(other_model)}
    command = ["compare", *(places.get(part, part) for part in given), "--out_dir", str(tmp_path / "c")]
    assert main(command) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c").exists()


def test_a_damaged_q_id_is_left_out_and_words_stay_text(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "<b>&/pairs"))
    path = copied / "A1/artifacts/step6/step6_all_layers_summary.json"
    path.write_text('{"best_layer": 0}')
    assert main(["compare", str(copied), str(finished), "--out_dir", str(tmp_path / "c")]) == 0
    assert list(table(tmp_path / "c")) == ["B B2"]
    assert "A1 left out: " in capsys.readouterr().err
    assert "<b>&" not in (tmp_path / "c/compare.html").read_text()


def test_heads_that_equal_scores_leave_open_are_not_called_shared(
    save_model: Callable[..., Path], csv_path: Path, tmp_path: Path
) -> None:
    model, out = llama(), tmp_path / "out"
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no head writes anything: every effect is 0
    studies = (
        "--topk",
        "3",
        "--n_trials_per_q",
        "6",
        "--replicates",
        "3",
        "--formats",
        "arrow",
        "--extras",
        "attribution",
    )
    assert main(arguments(save_model(model), csv_path, out, "--q_list", "A1", *studies)) == 0
    assert main(["verify", str(out / "pairs")]) == 0
    assert main(["compare", str(out / "pairs"), str(out / "pairs"), "--out_dir", str(tmp_path / "compared")]) == 0
    (row,) = table(tmp_path / "compared").values()
    assert row["n_heads_a"] == row["n_heads_b"] == 3
    assert row["n_heads_shared"] is row["p_value_of_shared"] is None
    for name in ("replicates", "formats"):
        document = read(out / "pairs", "A1", f"{name}/{name}.json")
        assert "equal scores leave" in document["verdict"]  # type: ignore[call-overload]
