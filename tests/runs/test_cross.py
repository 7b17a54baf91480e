"""``relfv cross``: what it finds, what it keeps, what it refuses."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import PLACES, WORDS, llama
from folders import rewrite, sealed, status, write_status
from relfv.cli import main
from relfv.engine.reference import naive_baseline, naive_injection
from relfv.language_model import open_model
from relfv.report.page import write_report
from relfv.stages.function_vector import read_function_vector
from relfv.stages.zeroshot import read_zero_shot_trials
from relfv.store.files import sha256_file, write_atomic
from relfv.store.formats import json_bytes
from relfv.store.locks import lock

Q_IDS = ["A1", "B2", "D4"]


@pytest.fixture(scope="module")
def tree(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and crossed run of three relations and one that is skipped. Read only."""
    folder = tmp_path_factory.mktemp("tree")
    rows = (
        [("A1", *pair) for pair in WORDS] + [("B2", *pair) for pair in PLACES] + [("C3", *pair) for pair in WORDS[:3]]
    )
    rows += [("D4", b, a) for a, b in WORDS[:11]]
    (folder / "pairs.csv").write_text("id,ex_A,ex_B\n" + "".join(f"{q},{a},{b}\n" for q, a, b in rows))
    arguments = ["--model", str(llama_path), "--relation_csv_path", str(folder / "pairs.csv")]
    assert main(["run", *arguments, "--out_root", str(folder)]) == 0
    assert main(["cross", str(folder / "pairs")]) == 0
    return folder / "pairs"


@pytest.fixture
def copied(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "pairs"))


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cross_fv.json").read_text())


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the file as if relfv itself had written it so."""
    content = document(folder)
    del content["sha256_of_the_rest"]
    change(content)
    write_atomic(folder / "cross_fv.json", json_bytes(sealed(content)))


def double(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "fv_global_resid": 2 * content["fv_global_resid"]}, path)


def crossed(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> list[str]:
    """The q_ids that were computed."""
    capsys.readouterr()
    assert main(["cross", str(folder), *flags]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder / 'cross_fv.json'}\n"
    return [q_id for q_id in Q_IDS if f"] {q_id} in " in said.err]


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["cross", str(folder), *flags]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("ERROR") == 1
    return said


def test_the_own_row_is_the_vectors_row_of_controls(tree: Path) -> None:
    found = document(tree)
    assert found["q_ids"] == list(found["targets"]) == Q_IDS
    for q_id in Q_IDS:
        own, controls = found["targets"][q_id], json.loads((tree / q_id / "artifacts/step6/controls.json").read_text())
        summary = json.loads((tree / q_id / "artifacts/step6/step6_all_layers_summary.json").read_text())
        assert own["best_layer"] == summary["best_layer"]
        assert (own["n_eval"], own["n_queries"]) == (controls["n_eval"], controls["n_queries"])
        assert own["zero_shot"] == pytest.approx(controls["zero_shot"], rel=1e-3)
        for layer in map(str, found["layers"]):
            assert list(own["per_layer"][layer]) == Q_IDS
            assert own["per_layer"][layer][q_id] == pytest.approx(
                controls["per_layer"][layer]["fv"], rel=1e-3, abs=1e-7
            )


def test_another_q_ids_vector_does_what_plain_hooks_do_with_it(tree: Path, llama_path: Path) -> None:
    targets = document(tree)["targets"]
    places = [(t, s, layer) for t in Q_IDS for s in Q_IDS if s != t for layer in document(tree)["layers"]]
    # Random weights put little on most answers: where another's vector does most, and where A1's own does best.
    largest = max(
        places, key=lambda place: abs(targets[place[0]]["per_layer"][str(place[2])][place[1]]["mean_delta_p"])
    )
    model = open_model(str(llama_path))
    for target, source, layer in (largest, ("A1", "B2", targets["A1"]["best_layer"])):
        vector = torch.from_numpy(read_function_vector(tree / source / "artifacts/fv_global_resid.pt"))
        lines = (tree / target / f"artifacts/step6/layer_{layer}/eval_trials.jsonl").read_text().splitlines()
        reached, deltas, hits = [], [], []
        with model.backbone.running():
            for row in map(json.loads, lines):
                ids = model.tokens.encode(row["prompt"])
                with_it = naive_injection(model.backbone, ids, row["target_id"], layer, vector)
                reached.append(float(with_it.p[0]))
                deltas.append(reached[-1] - float(naive_baseline(model.backbone, ids, row["target_id"]).p[0]))
                hits.append(int(with_it.top_id[0]) == row["target_id"])
        there = targets[target]["per_layer"][str(layer)][source]
        assert there["mean_p"] == pytest.approx(sum(reached) / len(lines), rel=1e-3)
        assert there["mean_delta_p"] == pytest.approx(sum(deltas) / len(lines), rel=1e-2)
        assert there["acc"] == pytest.approx(sum(hits) / len(lines))
    target, source, layer = largest
    assert abs(targets[target]["per_layer"][str(layer)][source]["mean_delta_p"]) > 1e-3


def test_the_file_says_what_it_was_made_from(tree: Path) -> None:
    found = document(tree)
    for q_id in Q_IDS:
        files = found["targets"][q_id]["made_from"]["files"]
        assert set(files) == {
            *(f"{source}/artifacts/fv_global_resid.pt" for source in Q_IDS),
            f"{q_id}/artifacts/sampled_trials_zeroshot.json",
            f"{q_id}/artifacts/step6/step6_all_layers_summary.json",
        }
        assert all(sha256_file(tree / name) == digest for name, digest in files.items())
        assert found["targets"][q_id]["made_from"]["settings"]["alpha"] == 1.0
    assert found["precision"] == "exact"
    assert "unscaled" in found["meaning"]["scale"]
    vectors = [read_function_vector(tree / q / "artifacts/fv_global_resid.pt") for q in Q_IDS]
    norms = [float(np.linalg.norm(vector.astype(np.float64))) for vector in vectors]
    assert found["norms"] == pytest.approx(norms)
    assert found["figure"] == {"cross_fv.png": sha256_file(tree / "cross_fv.png")}
    assert not list(tree.glob(".relfv-*"))


def test_again_nothing_is_computed_or_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.glob("cross_fv.*")}
    assert crossed(capsys, copied) == []
    assert {path: path.stat().st_mtime_ns for path in copied.glob("cross_fv.*")} == before


def test_a_lost_picture_is_drawn_again_without_a_model(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copied / "cross_fv.png").read_bytes()
    (copied / "cross_fv.png").unlink()
    assert crossed(capsys, copied) == []
    assert (copied / "cross_fv.png").read_bytes() == before


@pytest.fixture
def interrupting() -> Iterator[None]:
    """An interrupt arrives once the first q_id is done."""

    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " in %.1f s" in str(record.msg):
                raise KeyboardInterrupt

    logger, handler = logging.getLogger("relfv.runs.cross"), Interrupting()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_an_interrupted_run_has_what_it_did(
    copied: Path, interrupting: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copied.glob("cross_fv.*"):
        path.unlink()
    assert "interrupted" in refused(capsys, copied, code=130)
    found = document(copied)
    assert list(found["targets"]) == ["A1"]
    assert "1 q_ids done so far" in found["verdict"]
    assert main(["verify", str(copied)]) == 1
    assert "unfinished: cross_fv.json (next: B2; the same 'relfv cross' goes on)" in capsys.readouterr().out


def test_a_restart_computes_the_rest_and_ends_with_the_same_bytes(
    tree: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(copied, lambda content: content["targets"].pop("B2"))
    assert crossed(capsys, copied) == ["B2"]
    for name in ("cross_fv.json", "cross_fv.png"):
        assert (copied / name).read_bytes() == (tree / name).read_bytes()
    assert not list(copied.glob("*.replaced-*"))


def test_a_changed_vector_makes_every_target_that_uses_it_anew_and_keeps_the_old_file_aside(
    tree: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(copied / "B2/artifacts", "fv_global_resid.pt", double)
    assert main(["verify", str(copied)]) == 1
    said = capsys.readouterr().out
    assert "pairs/cross_fv.json  out of date: cross_fv.json (made from another B2/artifacts/fv_global_resid.pt)" in said
    assert "Out of date (made from another B2/artifacts/fv_global_resid.pt)" in write_report(copied).read_text()
    assert crossed(capsys, copied) == Q_IDS
    (aside,) = copied.glob("cross_fv.json.replaced-*")
    assert aside.read_bytes() == (tree / "cross_fv.json").read_bytes()
    before, after = document(tree), document(copied)
    assert after["norms"][1] == pytest.approx(2 * before["norms"][1])
    assert after["cosine"][0] == pytest.approx(before["cosine"][0], abs=1e-6)
    rows = [found["targets"]["A1"]["per_layer"]["1"] for found in (before, after)]
    assert rows[1]["D4"] == pytest.approx(rows[0]["D4"], rel=1e-3, abs=1e-7)
    assert rows[1]["B2"]["mean_p"] != pytest.approx(rows[0]["B2"]["mean_p"], rel=0.1)


def test_changed_prompts_concern_their_own_target_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def turn_round(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "trials": content["trials"][::-1]}))

    rewrite(copied / "B2/artifacts", "sampled_trials_zeroshot.json", turn_round)
    assert crossed(capsys, copied) == ["B2"]


def test_fewer_q_ids_are_a_new_file_and_the_old_one_stays(
    tree: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crossed(capsys, copied, "--q_list", "D4,A1") == ["A1", "D4"]
    assert document(copied)["q_ids"] == ["A1", "D4"]
    (aside,) = copied.glob("cross_fv.json.replaced-*")
    assert aside.read_bytes() == (tree / "cross_fv.json").read_bytes()
    assert main(["verify", str(copied)]) == 0


def test_another_models_vectors_are_not_compared(
    copied: Path, save_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    foreign = str(save_model(llama(vocab_size=420, num_hidden_layers=2)))
    said = refused(capsys, copied, "--model", foreign)
    assert f"A1, B2, D4 (model was {status(copied, 'A1')['config']['model']}, now {foreign})" in said
    said = refused(capsys, copied, "--precision", "fast", "--dtype", "bf16")
    assert "dtype was float32, now bfloat16, precision was exact, now fast" in said
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_a_model_that_was_moved_is_the_same_model(
    tree: Path, copied: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = str(shutil.copytree(llama_path, tmp_path / "elsewhere"))
    (copied / "cross_fv.json").unlink()
    assert crossed(capsys, copied, "--model", elsewhere) == Q_IDS
    assert (copied / "cross_fv.json").read_bytes() == (tree / "cross_fv.json").read_bytes()


def test_two_completed_q_ids_are_the_least(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 completed q_id(s)" in refused(capsys, copied, "--q_list", "A1")
    assert "--q_list: C3 (skipped)" in refused(capsys, copied, "--q_list", "A1,B2,C3")
    assert "--q_list: Z9 not in" in refused(capsys, copied, "--q_list", "A1,Z9")
    shutil.rmtree(copied / "A1")
    shutil.rmtree(copied / "B2")
    said = refused(capsys, copied)
    assert "1 completed q_id(s) besides C3 (skipped); expected at least two" in said
    assert "no q_id here" in refused(capsys, copied.parent)
    assert "no q_id here" in refused(capsys, copied / "nowhere")


def test_a_damaged_q_id_is_not_crossed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double(copied / "B2/artifacts/fv_global_resid.pt")
    said = refused(capsys, copied)
    assert "B2/artifacts: completed, but not as its status says" in said
    assert crossed(capsys, copied, "--q_list", "A1,D4") == ["A1", "D4"]
    (copied / "B2/artifacts/qid_status.json").write_text("{")
    assert "is damaged" in refused(capsys, copied)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["flip a digit", "no seal", "not JSON", "another file"])
def test_a_damaged_file_is_noticed_kept_aside_and_made_anew(
    tree: Path, copied: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "cross_fv.json"
    content = document(copied)
    if change == "flip a digit":
        content["targets"]["A1"]["per_layer"]["0"]["B2"]["acc"] += 0.125
        path.write_text(json.dumps(content))
    elif change == "no seal":
        del content["sha256_of_the_rest"]
        path.write_text(json.dumps(content))
    else:
        path.write_text("{" if change == "not JSON" else "[1]")
    assert main(["verify", str(copied)]) == 1
    assert "pairs/cross_fv.json  damaged: cross_fv.json" in capsys.readouterr().out
    assert "cross_fv" not in write_report(copied).read_text()
    assert crossed(capsys, copied) == Q_IDS
    assert path.read_bytes() == (tree / "cross_fv.json").read_bytes()
    assert len(list(copied.glob("cross_fv.json.replaced-*"))) == 1


def test_verify_knows_the_files(tree: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(tree)]) == 0
    assert "pairs/cross_fv.json  intact\n" in capsys.readouterr().out
    (copied / "cross_fv.png").write_bytes(b"")
    assert main(["verify", str(copied)]) == 1
    assert "damaged: cross_fv.png" in capsys.readouterr().out
    (copied / "cross_fv.json").unlink()
    assert main(["verify", str(copied)]) == 1
    assert "missing: cross_fv.json" in capsys.readouterr().out


def test_the_page_shows_the_figure_where_there_is_one(tree: Path, finished: Path) -> None:
    html = (tree / "report/index.html").read_text()
    picture = base64.b64encode((tree / "cross_fv.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{picture}"' in html  # in the page itself, which can be mailed
    assert 'href="../cross_fv.png"' in html
    assert 'href="../cross_fv.json"' in html
    assert document(tree)["verdict"].split(";")[0] in html
    assert "cross_fv" not in (finished / "report/index.html").read_text()


def test_words_in_the_file_are_text_on_the_page(copied: Path) -> None:
    reseal(copied, lambda content: content.update(verdict="<script>alert(1)</script>"))
    html = write_report(copied).read_text()
    assert "&lt;script&gt;" in html
    assert "<script>" not in html


def test_two_at_once_do_not_write_one_file(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(copied / ".locks/.cross.lock"):
        assert f"is being written by process {os.getpid()}" in refused(capsys, copied)


def test_links_lead_no_write_outside(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "cross_fv.json").rename(tmp_path / "precious")
    (copied / "cross_fv.json").symlink_to(tmp_path / "precious")
    assert "is a symbolic link" in refused(capsys, copied)


def test_prompts_are_those_of_step6(tree: Path) -> None:
    trials = read_zero_shot_trials(tree / "A1/artifacts/sampled_trials_zeroshot.json")
    assert document(tree)["targets"]["A1"]["n_eval"] == len(set(trials.clusters)) < len(trials.questions)


def test_a_q_id_that_is_being_run_again_does_not_narrow_what_is_there(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied / "cross_fv.json").read_bytes()
    write_status(copied, "B2", {**status(copied, "B2"), "status": "running"})
    assert main(["cross", str(copied)]) == 2
    assert "cross_fv.json has B2, not completed now; let 'relfv run' finish, or name by --q_list" in (
        capsys.readouterr().err
    )
    assert (copied / "cross_fv.json").read_bytes() == before
    assert main(["cross", str(copied), "--q_list", "A1,D4"]) == 0
    assert list(document(copied)["targets"]) == ["A1", "D4"]
