"""Folders of results that came from somebody else, were edited, exchanged, or are being written: one line each, and
never the trouble of a neighbour."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from folders import arguments, contents, status, write_status
from relfv.cli import main
from relfv.store.locks import lock
from relfv.store.status import DamagedStatus, read_status

DEEP = "[" * 100_000


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "pairs"))


def verified(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, str]:
    capsys.readouterr()
    return main(["verify", str(folder)]), capsys.readouterr().out


# --- qid_status.json -----


def test_no_flipped_bit_of_a_status_goes_unnoticed(copied: Path) -> None:
    """Or it changes nothing that is read: 400 at random places."""
    path, rng = copied / "A1/artifacts/qid_status.json", random.Random(0)
    data = path.read_bytes()
    was = vars(read_status(path.parent))
    same = 0
    for _ in range(400):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        with suppress(DamagedStatus):
            assert vars(read_status(path.parent)) == was
            same += 1
    assert same < 10


@pytest.mark.parametrize(
    "edit",
    [
        {"status": "skipped"}, {"q_row_count": 13}, {"reason": "because"}, {"updated_at": "2020"}, {"note": 1},
        {"status_format": None}, {"sha256_of_the_rest": None}, {"expected_layers": None}, {"stages": []},
    ],
    ids=str,
)  # fmt: skip
def test_an_edited_status_is_damaged_for_its_q_id_alone(
    copied: Path, edit: dict[str, Any], csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: the key is gone."""
    path = copied / "A1/artifacts/qid_status.json"
    edited = {key: value for key, value in {**status(copied, "A1"), **edit}.items() if value is not None}
    path.write_text(json.dumps(edited))
    code, said = verified(capsys, copied)
    assert code == 1
    assert "pairs/A1  damaged: qid_status.json (is damaged or not a status file of relfv" in said
    assert "pairs/B2  completed and intact" in said
    assert main(["status", str(copied)]) == 0
    assert "1 unreadable, 1 completed, 1 skipped" in capsys.readouterr().out
    assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "B2")) == 0


def test_results_of_a_newer_relfv_are_not_taken_for_damaged(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(copied, "A1", {**status(copied, "A1"), "status_format": 3, "a key of tomorrow": 1})
    before = contents(copied / "A1")
    code, said = verified(capsys, copied)
    assert code == 1
    assert "A1  unparsable: qid_status.json (is whole, and was written by a newer relfv" in said
    assert main(arguments(llama_path, csv_path, copied.parent)) == 1
    assert "update it, or give --out_root another folder" in capsys.readouterr().err
    assert contents(copied / "A1") == before
    assert not [path for path in copied.iterdir() if "A1" in path.name and path.name != "A1"]


def test_a_status_of_an_earlier_version_is_read_and_verify_says_what_it_cannot_tell(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {k: v for k, v in status(copied, "A1").items() if k not in ("status_format", "sha256_of_the_rest")}
    (copied / "A1/artifacts/qid_status.json").write_text(json.dumps(document))
    code, said = verified(capsys, copied)
    assert code == 0
    assert "its status is of an earlier version, and edits of it cannot be told" in said


# --- folders that are not what they are called -----


def exchange(folder: Path) -> None:
    (folder / "A1").rename(folder / "x")
    (folder / "B2").rename(folder / "A1")
    (folder / "x").rename(folder / "B2")


def copy_over(folder: Path) -> None:
    shutil.rmtree(folder / "B2")
    shutil.copytree(folder / "A1", folder / "B2")


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(("change", "wrong"), [(exchange, ["A1", "B2"]), (copy_over, ["B2"])])
def test_exchanged_and_copied_folders_are_noticed(
    copied: Path, change: Callable[[Path], None], wrong: list[str], with_manifest: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if not with_manifest:  # as the spec's single commands leave it
        for name in ("run_manifest.json", "run.log"):
            (copied / name).unlink()
    assert verified(capsys, copied)[0] == 0
    change(copied)
    code, said = verified(capsys, copied)
    assert code == 1
    assert [line[6:8] for line in said.splitlines() if "and these are of" in line] == wrong
    assert "and these are of" in verified(capsys, copied / wrong[0])[1]


@pytest.mark.parametrize("name", ["artifacts", "my.replaced-rows", "report", "tables"])
def test_a_csv_and_a_q_id_may_have_any_name(
    name: str, csv_path: Path, llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{name}.csv"
    path.write_text(csv_path.read_text().replace("A1,", "artifacts,"))
    small = ["--n_trials_per_q", "2", "--n_demos", "2", "--topk", "2", "--q_list", "artifacts,B2"]
    assert main([*arguments(llama_path, path, tmp_path / "out"), *small]) == 0
    for root in (tmp_path / "out", tmp_path / "out" / name):
        code, said = verified(capsys, root)
        assert code == 0, said
        assert f"{name}/artifacts  completed and intact" in said
        assert said.endswith("all 3 hold\n")
        assert main(["status", str(root)]) == 0
        assert "2 completed" in capsys.readouterr().out
    code, said = verified(capsys, tmp_path / "out" / name / "artifacts")
    assert (code, said.count("intact")) == (0, 1)


# --- what relfv was told to make, or is making -----


def test_what_a_command_made_under_another_name_is_known(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts = copied / "A1/artifacts"
    assert main(["heatmap", "--in_dir", str(artifacts), "--topk", "3", "--out_name", "other.png"]) == 0
    trials = ["--sampled_trials_path", str(artifacts / "sampled_trials.json")]
    assert main(["zeroshot", *trials, "--out_path", str(artifacts / "again.json")]) == 0
    code, said = verified(capsys, copied)
    assert code == 0, said
    (artifacts / "other.png").write_bytes(b"x")
    assert "damaged: other.png" in verified(capsys, copied)[1]
    (artifacts / "other.png").unlink()
    assert verified(capsys, copied)[0] == 0
    assert main(["heatmap", "--in_dir", str(artifacts), "--out_name", "a\0b.png"]) == 2
    assert "expected a file name" in capsys.readouterr().err


def test_what_a_run_is_writing_is_no_problem(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "A1/artifacts/cie_scores.csv").write_text("half")
    document = status(copied, "B2")
    write_status(copied, "B2", {**document, "status": "pending", "reason": None, "stages": {}})
    for name in [*contents(copied / "B2/artifacts")]:
        (copied / "B2/artifacts" / name).unlink()
    with lock(copied / ".locks/A1.lock"):
        code, said = verified(capsys, copied)
        assert code == 0, said
        assert "A1  not checked: is being written by process" in said
        assert "B2  not checked: waits for the run that is at work" in said
        assert "all 2 hold; 2 not checked" in said
        write_status(copied, "A1", {**status(copied, "A1"), "status": "running"})
        assert main(["status", str(copied)]) == 0
        assert "its process is gone" not in capsys.readouterr().out
    # The lock's file still names a process that lives: this one.
    assert main(["status", str(copied)]) == 0
    assert "its process is gone" in capsys.readouterr().out
    assert verified(capsys, copied)[0] == 1


# --- the page -----


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:2000], lambda data: data.replace(b"P", b"p", 1)]
)
def test_a_damaged_page_is_noticed_and_made_again(
    copied: Path, damage: Callable[[bytes], bytes], csv_path: Path, llama_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = copied / "report/index.html"
    whole = page.read_bytes()
    page.write_bytes(damage(whole))
    code, said = verified(capsys, copied)
    assert code == 1
    assert "damaged: report/index.html (is not as it was written" in said
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert page.read_bytes() == whole
    assert verified(capsys, copied)[0] == 0


def test_a_status_from_the_future_does_not_make_the_page_again_and_again(
    copied: Path, csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(copied / "A1/artifacts/qid_status.json", (4e9, 4e9))
    page = copied / "report/index.html"
    before = page.stat()
    assert main(arguments(llama_path, csv_path, copied.parent)) == 0
    assert (page.stat().st_ino, page.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_status(copied, "C3", {**status(copied, "C3"), "reason": "another"})
    os.utime(copied / "C3/artifacts/qid_status.json", (0, 0))
    assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "A1")) == 0
    assert b"another" in page.read_bytes()


# --- one q_id's trouble is its own -----


def spoil(name: str, text: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        path.chmod(0o644)
        path.write_text(text)
        path_of_status = folder / "A1/artifacts/qid_status.json"
        if path != path_of_status and path.parent.name == "artifacts":  # as if it had been written so
            import hashlib

            document = status(folder, "A1")
            for record in document["stages"].values():
                for files in (record["files"], record["inputs"]):
                    if path.name in files:
                        files[path.name] = hashlib.sha256(text.encode()).hexdigest()
            write_status(folder, "A1", document)

    return do


SPOILT = [
    spoil("A1/artifacts/qid_status.json", DEEP),
    spoil("A1/artifacts/qid_status.json", "[]"),
    spoil("A1/artifacts/qid_status.json", "{}"),
    spoil("A1/artifacts/top_heads.json", DEEP),
    spoil("A1/artifacts/top_heads.json", '{"heads": [{"layer": 0}]}'),
    spoil("A1/artifacts/stepE_eval.json", "[]"),
    spoil("A1/artifacts/summary.json", '{"verdixt": "x"}'),
    spoil("A1/artifacts/summary.json", "[1]"),
    spoil("A1/artifacts/sampled_trials.json", '{"meta": {}, "trials": [{}]}'),
]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_one_q_id_holds_is_one_line_and_the_others_are_as_ever(
    copied: Path, spoilt: Callable[[Path], None], csv_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt(copied)
    code, said = verified(capsys, copied)
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.startswith("pairs/A1")]
    assert "intact" not in line
    assert "pairs/B2  completed and intact" in said
    assert main(["status", str(copied)]) == 0
    assert main(["report", str(copied)]) == 0
    assert '<h2 id="B2">' in (copied / "report/index.html").read_text()
    assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "B2")) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", '{"settings": 1, "q_list": 2}', DEEP, '{"model": []}'])
def test_a_manifest_of_another_shape_is_one_line_of_verify_and_none_of_the_page(
    copied: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "run_manifest.json").write_text(text)
    code, said = verified(capsys, copied)
    assert code == 1
    assert "pairs/run_manifest.json  damaged" in said
    assert main(["report", str(copied)]) == 0
    assert "shape not recorded" in (copied / "report/index.html").read_text()


def a_folder_like_a_temporary(folder: Path) -> None:
    (folder / "A1/artifacts/.relfv-0123456789abcdef.tmp").mkdir()


def a_folder_for_a_lock(folder: Path) -> None:
    (folder / ".locks/A1.lock").unlink()
    (folder / ".locks/A1.lock").mkdir()


def a_pipe_for_a_lock(folder: Path) -> None:
    (folder / ".locks/A1.lock").unlink()
    os.mkfifo(folder / ".locks/A1.lock")


def a_file_for_a_q_id(folder: Path) -> None:
    shutil.rmtree(folder / "A1")
    (folder / "A1").write_text("mine")


@pytest.mark.parametrize(
    ("change", "code"),
    [(a_folder_like_a_temporary, 0), (a_folder_for_a_lock, 1), (a_pipe_for_a_lock, 1), (a_file_for_a_q_id, 1)],
)
def test_what_stands_in_one_q_ids_way_does_not_stop_the_others(
    copied: Path, change: Callable[[Path], None], code: int, csv_path: Path, llama_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for q_id in ("A1", "B2"):
        (copied / q_id / "artifacts/fv_global_resid.pt").unlink()
    whole = {**contents(copied / "B2/artifacts")}
    change(copied)
    assert main(arguments(llama_path, csv_path, copied.parent)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("A1 failed: ") == code
    assert status(copied, "B2")["status"] == "completed"
    assert contents(copied / "B2/artifacts").items() > whole.items()
    # those who are skipped are in nobody's way either
    (copied / ".locks/C3.lock").unlink()
    (copied / ".locks/C3.lock").mkdir()
    shutil.rmtree(copied / "C3")
    assert main(arguments(llama_path, csv_path, copied.parent, "--q_list", "B2,C3")) == 1
    assert "C3 failed: " in capsys.readouterr().err
