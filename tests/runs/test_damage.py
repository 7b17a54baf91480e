"""Every file of a finished q_id, damaged in every way: noticed, and made again to the same bytes, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import WORDS
from crashes import lighten
from folders import contents, status, write_status
from relfv.cli import main

FILES = [
    "sampled_trials.json", "sampled_trials_zeroshot.json", "trial_metrics.jsonl", "stepD_cie/noise_floor.json",
    "cie_scores.csv", "aie_scores.csv", "stepD_mean_acts/qid_{q}_clean_mean.pt", "stepD_mean_acts/global_clean_mean.pt",
    "aie_heatmap_{q}.png", "top_heads.json", "fv_global_resid.pt", "fv_global_resid_meta.json", "fv_by_layer.pt",
    "stepE_eval.json", "step6/layer_1/step6_results_*.json", "step6/layer_1/eval_summary.json",
    "step6/layer_1/eval_trials.jsonl", "step6/layer_1/eval_meta.json", "step6/step6_all_layers_summary.json",
    "step6/injection_curve.png", "qid_status.json",
]  # fmt: skip
FROZEN, STATUS = FILES.index("sampled_trials.json"), FILES.index("qid_status.json")
Q_IDS = [f"F{i}" for i in range(len(FILES))]
SMALL = ["--n_trials_per_q", "2", "--n_demos", "2", "--n_eval", "2", "--topk", "2"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    """One bit in the middle; of the status, one of a recorded setting, which still parses."""
    data = bytearray(path.read_bytes())
    at = data.index(b'"alpha": 1.0') + len(b'"alpha": ') if path.name == "qid_status.json" else len(data) // 2
    data[at] ^= 0b10
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("not to be lost")


WAYS = [truncate, flip_a_bit, empty, Path.unlink, put_a_folder_there]


@pytest.fixture(scope="module")
def wide(
    llama_path: Path,
    finished: Path,  # made before: others compare with it, and what is lightened has no words in its pictures
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[list[str], Path]]:
    """A finished run with a q_id for each file to be damaged, lightened like all after it. -> (its arguments but
    --out_root, the relation's folder)"""
    folder = tmp_path_factory.mktemp("wide")
    rows = [f"{q},{a}{i % 7},{b}\n" for i, q in enumerate(Q_IDS) for a, b in WORDS[:4]]
    (folder / "wide.csv").write_text("id,ex_A,ex_B\n" + "".join(rows))
    run = ["run", "--model", str(llama_path), "--relation_csv_path", str(folder / "wide.csv"), *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch)
        assert main([*run, "--out_root", str(folder)]) == 0
        yield run, folder / "wide"


def the_file(relation: Path, i: int) -> Path:
    (path,) = (relation / Q_IDS[i] / "artifacts").glob(FILES[i].format(q=Q_IDS[i]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("damage", WAYS, ids=lambda way: way.__name__)
def test_damage_to_any_file_is_noticed_and_made_good(
    wide: tuple[list[str], Path], damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them noticed. What is made again does not know how its file was lost, so there files take turns at four of
    the ways; in the way of a folder are all, and the frozen trials and the status, which are not made again, are
    damaged in every way."""
    run, finished = wide
    copied = Path(shutil.copytree(finished, tmp_path / "wide"))
    paths = [the_file(copied, i) for i in range(len(FILES))]
    frozen = paths[FROZEN].read_bytes()
    records = {q: status(copied, q)["stages"] for q in Q_IDS}
    paths[FROZEN].chmod(0o644)
    for path in paths:
        damage(path)
    assert main(["verify", str(copied), "--json"]) == 1
    found = {item["name"].split("/")[1]: item for item in json.loads(capsys.readouterr().out)["checked"]}
    for q, path in zip(Q_IDS, paths, strict=True):
        (problem,) = [p for p in found[q]["problems"] if p["kind"] in ("missing", "damaged")]
        assert problem["file"] == path.relative_to(copied / q / "artifacts").as_posix()
        assert problem["kind"] == ("missing" if damage is Path.unlink else "damaged")

    turn = range(len(FILES)) if damage is put_a_folder_there else range(WAYS.index(damage), len(FILES), 4)
    chosen = sorted({*turn, FROZEN, STATUS})
    for q in {*Q_IDS} - {Q_IDS[i] for i in chosen}:
        shutil.rmtree(copied / q)
        shutil.copytree(finished / q, copied / q)
    run = [*run, "--out_root", str(tmp_path), "--q_list", ",".join(Q_IDS[i] for i in chosen)]
    assert main(run) == 1
    said = capsys.readouterr().err
    refused = [line for line in said.splitlines() if "ERROR" in line]
    assert len(refused) == 2
    assert f"{paths[FROZEN]}: the frozen trials were changed" in refused[0]
    assert f"'relfv run --q_list {Q_IDS[FROZEN]} --force'" in refused[0]
    assert f"1 of {len(chosen)} q_ids failed: {Q_IDS[FROZEN]}" in refused[1]
    assert "Traceback" not in said
    for i in chosen:
        q = Q_IDS[i]
        if i == FROZEN:
            assert status(copied, q)["status"] == "failed"
            continue
        assert contents(copied / q / "artifacts") == contents(finished / q / "artifacts"), FILES[i]
        again = [s for s, r in status(copied, q)["stages"].items() if r["started_at"] != records[q][s]["started_at"]]
        assert len(again) == (len(records[q]) if i == STATUS else 1), FILES[i]

    # what was damaged beyond use is kept, whole
    (aside,) = [path for path in copied.iterdir() if ".replaced-" in path.name]
    assert aside.name.startswith(Q_IDS[STATUS])
    assert contents(aside / "artifacts").items() >= contents(finished / Q_IDS[STATUS] / "artifacts").items()
    assert f"{paths[STATUS]}: is " in said
    assert str(aside) in said
    if damage is put_a_folder_there:
        assert len([*copied.glob("*/*.replaced-*/mine")]) == len(FILES) - 2

    # and the frozen trials can be put back
    if paths[FROZEN].is_dir():
        shutil.rmtree(paths[FROZEN])
    paths[FROZEN].write_bytes(frozen)
    assert main(run) == 0
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_status_that_cannot_be_trusted_is_not_taken_for_one(wide: tuple[list[str], Path], tmp_path: Path) -> None:
    """Each of these parses as JSON."""
    from relfv.errors import RunError
    from relfv.store.status import read_status

    original, artifacts = status(wide[1], "F0"), tmp_path / "artifacts"
    artifacts.mkdir()
    changes = [
        {"status": "complexed"},
        {"expected_layers": [0, 1, 6]},
        {"fingerprint": "0" * 64},
        {"config": {**original["config"], "seed": 1}},
        {"trials_per_pass": {"stepE": 0}},
        {"stages": {**original["stages"], "stepE": {**original["stages"]["stepE"], "files": {"../x": "0" * 64}}}},
        {"stages": {**original["stages"], "stepE": {**original["stages"]["stepE"], "files": {"x": "0"}}}},
        {"stages": []},
        {"q_id": None, "stages": None},
    ]
    for change in [{}, *changes]:
        write_status(tmp_path.parent, tmp_path.name, {**original, **change})
        if not change:
            assert read_status(artifacts)
            continue
        with pytest.raises(RunError, match="is damaged"):
            read_status(artifacts)


@pytest.mark.slow
def test_the_status_of_another_q_id_is_not_gone_on_from(wide: tuple[list[str], Path], tmp_path: Path) -> None:
    run, finished = wide
    for q in ("F1", "F2"):
        shutil.copytree(finished / q, tmp_path / "wide" / q)
    shutil.copy(finished / "F2/artifacts/qid_status.json", tmp_path / "wide/F1/artifacts/qid_status.json")
    assert main([*run, "--out_root", str(tmp_path), "--q_list", "F1,F2"]) == 0
    assert status(tmp_path / "wide", "F1")["q_id"] == "F1"
    assert contents(tmp_path / "wide/F1/artifacts") == contents(finished / "F1/artifacts")
    assert len([*(tmp_path / "wide").glob("F1.replaced-*/artifacts/qid_status.json")]) == 1


def test_stepd_does_not_write_over_results_that_have_lost_their_status(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(finished / "A1", tmp_path / "A1"))
    (base / "artifacts/qid_status.json").unlink()
    before = contents(base / "artifacts")
    step_d = ["stepd", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--relation_q_list", "A1"]
    assert main([*step_d, "--out_base_dir", str(base), "--score_key", "mean_delta_logit"]) == 1
    assert "qid_status.json: is missing" in capsys.readouterr().err
    assert contents(base / "artifacts") == before


@pytest.mark.parametrize("damage", WAYS, ids=lambda way: way.__name__)
def test_a_damaged_manifest_is_noticed_kept_and_written_anew(
    finished: Path, llama_path: Path, csv_path: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "pairs"))
    before = {q: contents(copied / q / "artifacts") for q in ("A1", "B2")}
    damage(copied / "run_manifest.json")
    run = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    assert main(["verify", str(copied)]) == 1
    assert main(run) == 0
    assert main(["verify", str(copied)]) == 0
    assert {q: contents(copied / q / "artifacts") for q in before} == before
    assert len([*copied.glob("run_manifest.json.replaced-*")]) == (damage is not Path.unlink)
