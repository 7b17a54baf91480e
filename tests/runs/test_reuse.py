"""``--reuse_stepd``: other alphas, k and numbers of prompts without StepD again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from folders import arguments, contents, status
from relfv.cli import main
from relfv.runs.verify import verify

OTHER = ("--q_list", "A1", "--alpha", "2", "--topk", "5", "--n_eval", "7", "--extras", "none")


@pytest.fixture(scope="module")
def afresh(llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same settings without anything to reuse."""
    out = tmp_path_factory.mktemp("afresh")
    assert main(arguments(llama_path, csv_path, out, *OTHER)) == 0
    return out / "pairs"


@pytest.mark.parametrize("given", ["all results", "a relation's"])
def test_what_comes_out_is_what_computing_it_all_gives(
    given: str, afresh: Path, finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    there = finished.parent if given == "all results" else finished
    command = arguments(llama_path, csv_path, tmp_path, *OTHER, "--reuse_stepd", str(there))
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"A1: StepD is that of {finished / 'A1/artifacts'}" in said
    assert "A1 stepD_cie" not in said
    assert contents(tmp_path / "pairs/A1/artifacts") == contents(afresh / "A1/artifacts")
    assert verify(tmp_path).holds
    made, before = status(tmp_path / "pairs", "A1"), status(finished, "A1")
    assert made["reused_stepd"] == str(finished / "A1/artifacts")
    for stage in ("stepD_trials", "stepD_means", "stepD_cie"):
        assert made["stages"][stage] == before["stages"][stage]
    assert json.loads((tmp_path / "pairs/run_manifest.json").read_text())["reuse_stepd"] == str(there)
    # A copy, not a link: the one folder does not change with the other.
    assert not (tmp_path / "pairs/A1/artifacts/cie_scores.csv").samefile(finished / "A1/artifacts/cie_scores.csv")
    assert (tmp_path / "pairs/A1/artifacts/sampled_trials.json").stat().st_mode & 0o222 == 0
    assert main(command) == 0
    assert "everything is completed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--seed", "5"), "its StepD is of another experiment: A1 (seed was 0, now 5)"),
        (("--score_key", "mean_delta_logit"), "A1 (score_key was mean_delta_p, now mean_delta_logit)"),
        (("--precision", "fast"), "A1 (precision was exact, now fast)"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_other_settings_of_step_d_are_named_in_one_line_and_nothing_is_done(
    flags: tuple[str, ...], says: str, more: tuple[str, ...], finished: Path, llama_path: Path, csv_path: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = arguments(llama_path, csv_path, tmp_path / "out", *OTHER, "--reuse_stepd", str(finished.parent), *flags)
    assert main([*command, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_none_of_the_q_ids_and_the_one_written_to_are_refused(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, tmp_path / "out", "--reuse_stepd", str(tmp_path))) == 2
    assert "has no results of B2, A1, C3; expected earlier ones" in capsys.readouterr().err
    command = arguments(llama_path, csv_path, finished.parent, "--reuse_stepd", str(finished.parent), "--force")
    assert main(command) == 2
    assert "give another --out_root" in capsys.readouterr().err
    assert verify(finished).holds


def test_a_damaged_step_d_is_computed_again(
    afresh: Path, finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "from/pairs"))
    (copied / "A1/artifacts/cie_scores.csv").write_text("changed")
    command = arguments(llama_path, csv_path, tmp_path / "out", *OTHER, "--reuse_stepd", str(copied))
    assert main(command) == 0
    assert "has no whole StepD of it, which is computed here" in capsys.readouterr().err
    assert contents(tmp_path / "out/pairs/A1/artifacts") == contents(afresh / "A1/artifacts")


def test_a_refusal_says_what_could_be_reused_and_only_where_it_could(
    finished: Path, llama_path: Path, csv_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(llama_path, csv_path, finished.parent, "--alpha", "2")) == 2
    assert f"--reuse_stepd {finished.parent}, since StepD is the same" in capsys.readouterr().err
    assert main(arguments(llama_path, csv_path, finished.parent, "--alpha", "2", "--seed", "1")) == 2
    assert "--reuse_stepd" not in capsys.readouterr().err
