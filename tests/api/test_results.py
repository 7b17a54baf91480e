from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import relfv
from folders import status, write_status
from relfv.store.formats import read_tensors


def test_a_run_is_read_with_its_q_ids(finished: Path) -> None:
    run = relfv.load(finished)
    assert (list(run), len(run), "A1" in run, "Q9" in run) == (["A1", "B2", "C3"], 3, True, False)
    assert [run[q_id].status for q_id in run] == ["completed", "completed", "skipped"]
    with pytest.raises(relfv.InputError, match=r"'Q9': no such q_id in .*, which has A1, B2, C3"):
        run["Q9"]
    with pytest.raises(relfv.RunError, match=r"C3 has no function_vector.safetensors: it is skipped \(9 rows"):
        _ = run["C3"].function_vector


def test_the_vector_is_the_one_of_the_specs_files(finished: Path) -> None:
    qid = relfv.load(finished)["A1"]
    fv, meta = qid.function_vector, json.loads((qid.artifacts / "fv_global_resid_meta.json").read_text())
    there = read_tensors(qid.artifacts / "fv_global_resid.pt")["fv_global_resid"]
    assert np.array_equal(fv.vector, there)
    assert [[head.layer, head.head] for head in fv.heads] == meta["heads"]
    best = json.loads((qid.artifacts / "step6/step6_all_layers_summary.json").read_text())["best_layer"]
    assert (fv.layer, fv.alpha, fv.q_id, fv.model) == (best, 1.0, "A1", meta["model"])
    identity = status(finished, "A1")["fingerprint_fields"]["model_identity"]
    assert fv.metadata["model_identity"] == identity


def test_a_folder_of_none_or_several_relations_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(relfv.InputError, match="no results here"):
        relfv.load(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    with pytest.raises(relfv.InputError, match=r"is not the folder of one relation; expected .*/one, .*/two"):
        relfv.load(tmp_path)


def test_tables_are_frames_with_a_row_a_unit(finished: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = relfv.load(finished)
    frames = {
        name: getattr(run, name)()
        for name in ("summary", "heads", "layers", "controls", "answers", "trials", "effects")
    }
    assert all(isinstance(frame, pandas.DataFrame) for frame in frames.values())
    assert all(list(frame)[:3] == ["q_id", "name", "model"] for frame in frames.values())
    assert run.ablation().empty
    assert run.mlps().empty
    n_rows = {name: len(frame) for name, frame in frames.items()}
    assert (n_rows["summary"], n_rows["heads"], n_rows["layers"]) == (3, 2 * 24, 2 * 3)
    assert (n_rows["trials"], n_rows["effects"]) == (2 * 25, 2 * 25 * 24)
    assert frames["summary"]["status"].tolist() == ["completed", "completed", "skipped"]
    for name in frames:
        one = getattr(run["B2"], name)()
        assert set(one["q_id"]) == {"B2"}
        assert len(one) == (frames[name]["q_id"] == "B2").sum()
    aie = pandas.read_csv(finished / "B2/artifacts/aie_scores.csv")
    of_it = run["B2"].heads()
    assert of_it["mean_delta_p"].tolist() == aie["mean_delta_p"].tolist()
    assert of_it["in_function_vector"].sum() == 20


def test_without_pandas_one_line_says_what_to_install(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(relfv.InputError, match=r"pip install 'relfv\[pandas\]'"):
        relfv.load(finished).summary()


def test_one_unreadable_q_id_does_not_hide_the_others(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    (folder / "A1/artifacts/step6/answers.json").write_text("{")
    assert set(relfv.load(folder).answers()["q_id"]) == {"B2"}
    write_status(folder, "A1", {**status(folder, "A1"), "status": "odd"})
    assert relfv.load(folder).summary()["q_id"].tolist() == ["B2", "C3"]
