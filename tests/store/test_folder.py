from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from folders import contents, rewrite
from relfv.cli import main
from relfv.errors import InputError, RunError
from relfv.stages.function_vector import FV, TOP_HEADS
from relfv.stages.heatmap import HEATMAP
from relfv.stages.means import MEANS
from relfv.stages.scores import CIE
from relfv.stages.step6 import EVAL_SUMMARY, RESULTS, locate_results
from relfv.stages.table import makers
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, read_json
from relfv.store.locks import lock

PLAIN = File("plain.json", read_json)


def test_every_file_of_a_finished_q_id_is_where_its_declaration_says(finished: Path) -> None:
    folder = QidFolder(finished / "A1/artifacts", "A1")
    there = set(contents(folder.artifacts))
    declared = {
        str(folder.path(file, layer).relative_to(folder.artifacts))
        for file, stage in makers().items()
        if not stage.asked
        for layer in (range(3) if file.per_layer else [None])
    }
    assert declared == there
    for name in there:
        assert sum(file.is_named(name, "A1") for file in makers()) == 1, name


@pytest.mark.parametrize(
    ("file", "name", "is_it"),
    [
        (HEATMAP, "aie_heatmap_A.1.png", True),
        (HEATMAP, "aie_heatmap_AX1.png", False),
        (MEANS, "stepD_mean_acts/qid_A.1_clean_mean.pt", True),
        (EVAL_SUMMARY, "step6/layer_31/eval_summary.json", True),
        (EVAL_SUMMARY, "step6/layer_x/eval_summary.json", False),
        (EVAL_SUMMARY, "step6/layer_/eval_summary.json", False),
        (RESULTS, "step6/layer_0/step6_results_model_layer0_n25.json", True),
        (RESULTS, "step6/layer_0/step6_results_a/b.json", False),
        (RESULTS, "step6/layer_0/eval_summary.json", False),
        (TOP_HEADS, "x/top_heads.json", False),
    ],
)
def test_names_are_taken_letter_by_letter(file: File[object], name: str, is_it: bool) -> None:
    assert file.is_named(name, "A.1") is is_it


def test_results_of_a_long_model_path_keep_its_end(tmp_path: Path) -> None:
    folder = QidFolder(tmp_path, "A1")
    path = locate_results(folder, "/long" * 100 + "/Llama 3.1-8B", 2, 25)
    assert path.parent == tmp_path / "step6/layer_2"
    assert path.name.startswith("step6_results_")
    assert path.name.endswith("_long_Llama_3.1-8B_layer2_n25.json")
    assert len(path.name) < 200
    assert folder.path(RESULTS, 2) == path
    assert folder.path(RESULTS, 1).parent.name == "layer_1"


def test_a_file_is_parsed_again_when_its_bytes_have_changed_whoever_changed_them(tmp_path: Path) -> None:
    folder = QidFolder(tmp_path, "A1")
    folder.write(PLAIN, json_bytes([1]), content=[1])
    first = folder.read(PLAIN)
    assert folder.read(PLAIN) is first == [1]
    (tmp_path / "plain.json").write_text("[2]")
    assert folder.read(PLAIN) == [2]
    (tmp_path / "plain.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        folder.read(PLAIN)
    folder.write(PLAIN, json_bytes([3]))
    assert folder.read(PLAIN) == [3]
    (tmp_path / "plain.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        folder.read(PLAIN)


def test_a_file_that_nobody_touched_is_not_hashed_again_once_its_times_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = QidFolder(tmp_path, "A1"), list[Path]()
    path, real = folder.path(PLAIN), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path) or real(path))
    folder.write(PLAIN, json_bytes([1]), content=[1])
    for _ in range(2):  # within a tick of the clock a change would not show
        assert folder.read(PLAIN) == [1]
    assert len(seen) == 2
    time.sleep(0.1)
    for _ in range(2):
        assert folder.read(PLAIN) == [1]
    assert len(seen) == 3
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(json_bytes([2]))
    os.utime(path, ns=times)  # who sets a file's time back cannot set back when that was done
    assert folder.read(PLAIN) == [2]


def test_a_file_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("[7]")
    folder = QidFolder(tmp_path / "artifacts", "A1", {PLAIN: tmp_path / "mine.json"})
    assert folder.has(PLAIN)
    assert folder.read(PLAIN) == [7]
    assert not QidFolder(tmp_path / "artifacts", "A1").has(PLAIN)


@pytest.mark.parametrize("file", [CIE, MEANS, FV, TOP_HEADS, EVAL_SUMMARY], ids=lambda file: file.name)
@pytest.mark.parametrize(("make", "words"), [(os.mkfifo, "not a regular file"), (Path.mkdir, "Is a directory")])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_one_clear_error(
    tmp_path: Path, file: File[object], make, words: str
) -> None:  # type: ignore[no-untyped-def]
    folder = QidFolder(tmp_path, "A1")
    path = folder.path(file, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    assert not folder.has(file, 0)
    with pytest.raises(RunError) as caught:
        folder.read(file, 0)
    assert str(caught.value) == f"{path}: cannot be read ({words})"


@pytest.mark.parametrize("name", ["top_heads.json", "fv_global_resid.pt", "trial_metrics.jsonl", "aie_scores.csv"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_no_command_waits_for_a_pipe_in_a_q_ids_folder(
    finished: Path, tmp_path: Path, name: str, make, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    copied = Path(shutil.copytree(finished, tmp_path / "pairs"))
    path = copied / "A1/artifacts" / name
    path.unlink()
    make(path)
    assert main(["verify", str(copied)]) == 1
    assert f"damaged: {name} (cannot be read)" in capsys.readouterr().out
    assert main(["status", str(copied)]) == 0
    assert main(["report", str(copied)]) == 0
    assert main(["heatmap", "--in_dir", str(path.parent)]) == (2 if name == "aie_scores.csv" else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_a_picture_that_is_no_picture_is_still_what_its_hash_says(finished: Path, tmp_path: Path) -> None:
    """Pictures have no reader: the record alone vouches for them."""
    copied = Path(shutil.copytree(finished, tmp_path / "pairs"))
    rewrite(copied / "A1/artifacts", "aie_heatmap_A1.png", lambda path: path.write_bytes(b"x"))
    assert main(["verify", str(copied / "A1")]) == 0


def test_the_lock_is_the_one_of_a_run_and_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relfv.store.folder._WAIT_S", 0.0)
    artifacts = tmp_path / "pairs/A1/artifacts"
    folder = QidFolder(artifacts, "A1")
    assert folder.lock == tmp_path / "pairs/.locks/A1.lock"
    artifacts.mkdir(parents=True)
    (artifacts / ".relfv-1-2.tmp").touch()
    with (
        lock(folder.lock),
        pytest.raises(InputError, match=rf"is being written by process {os.getpid()} "),
        folder.locked(),
    ):
        pass
    assert (artifacts / ".relfv-1-2.tmp").exists()
    with folder.locked():
        assert not (artifacts / ".relfv-1-2.tmp").exists()
    (artifacts / "step6").symlink_to(tmp_path)
    with pytest.raises(InputError, match="step6: is a symbolic link"), folder.locked():
        pass
