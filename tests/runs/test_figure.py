"""``relfv figure``, and the other formats of a run's figures."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from folders import arguments, contents, status
from relfv.cli import main


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out/pairs"))


@pytest.mark.parametrize("more", [(), ("--q_list", "A1"), ("--kind", "curve"), ("--kind", "curve", "--q_list", "B2")])
@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_of_one_and_of_all_q_ids_are_drawn_in_every_format(
    more: tuple[str, ...], kind: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = contents(copied / "A1/artifacts"), tmp_path / f"figure.{kind}"
    command = ["figure", str(copied), *more, "--out", str(out), "--dpi", "60"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}\n"
    first = out.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])
    assert main(command) == 0
    assert out.read_bytes() == first
    assert main([*command, "--width", "9", "--height", "4"]) == 0
    assert out.read_bytes() != first
    assert contents(copied / "A1/artifacts") == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--out", "x.gif"), "expected a file name that ends in .png, .svg, .pdf"),
        (("--out", "x.png", "--q_list", "A1,Z9"), "--q_list: Z9 without results in"),
        (("--out", "x.png", "--q_list", "C3"), "--q_list: C3 without results in"),
        (("--out", "x.png", "--metric", "acc"), "--metric acc: is not of a heatmap"),
        (
            ("--out", "x.png", "--kind", "curve", "--metric", "mean_delta_p"),
            "is not of a curve; expected one of p, acc",
        ),
        (("--out", "$A1/aie_heatmap_A1.png"), "lies among a q_id's results"),
        (("--out", "notes.png"), "is there and is no figure"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    flags: tuple[str, ...], says: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("my notes")
    command = [flag.replace("$A1", str(copied / "A1/artifacts")) for flag in flags]
    assert main(["figure", str(copied), *command]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_other_formats_are_added_to_finished_q_ids_and_verified(
    copied: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied / "A1/artifacts")
    command = arguments(llama_path, csv_path, tmp_path / "out", "--figure_formats", "png,svg")
    assert main(command) == 0
    more = {"aie_heatmap_A1.svg", "step6/injection_curve.svg"}
    after = contents(copied / "A1/artifacts")
    assert after.keys() - before.keys() == more
    assert {name: after[name] for name in before} == before
    assert status(copied, "A1")["other_files"] == {name: hashlib.sha256(after[name]).hexdigest() for name in more}
    assert main(["verify", str(copied)]) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "everything is completed" in capsys.readouterr().err
    (copied / "A1/artifacts/aie_heatmap_A1.svg").write_bytes(b"<svg/>")
    assert main(["verify", str(copied)]) == 1
    assert main(command) == 0
    assert contents(copied / "A1/artifacts") == after
    assert main([*command[:-1], "gif"]) == 2
    assert "--figure_formats 'gif': expected some of png, svg, pdf" in capsys.readouterr().err
