"""What makes results another experiment, and what does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, llama
from folders import arguments, contents, status
from relfv import ALGORITHM_VERSION
from relfv.cli import main
from relfv.settings import Settings, fingerprint_fields
from relfv.store.files import move_aside

OTHER = {
    "model_spec": "auto", "dtype": "bf16", "quant": "8bit", "precision": "fast", "seed": 1, "n_trials_per_q": 24,
    "n_demos": 8, "corruption": "shuffle", "score_key": "mean_delta_logit", "topk": 19, "alpha": 2.5, "n_eval": 49,
    "allow_query_duplicates": True,
}  # fmt: skip
NOT_COUNTED = {"model", "device", "relation_csv_path", "trust_remote_code", "alpha_sweep", "k_sweep"}
ONLY_STEPD = {"layers", "heads"}
"""``relfv run`` has no flag for these; stepd refuses them."""


def refusal(said: str) -> str:
    (line,) = [line for line in said.splitlines() if "ERROR" in line]
    assert "holds results of another experiment" in line
    return line


def test_every_setting_either_counts_or_is_known_not_to() -> None:
    assert {*OTHER, *NOT_COUNTED, *ONLY_STEPD} == set(Settings().to_json())
    fields = fingerprint_fields(Settings(), rows_sha256="", model_identity="")
    assert set(fields) == {*OTHER, *ONLY_STEPD, "rows_sha256", "model_identity", "algorithm_version"}


@pytest.mark.parametrize("name", OTHER)
def test_each_setting_that_counts_refuses_by_name_with_both_values(
    finished: Path, llama_path: Path, csv_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = [f"--{name}"] if OTHER[name] is True else [f"--{name}", str(OTHER[name])]
    before = contents(finished)
    assert main(arguments(llama_path, csv_path, finished.parent, "--q_list", "A1", *flag)) == 2
    line = refusal(capsys.readouterr().err)
    was = status(finished, "A1")["config"][name]
    now = {"bf16": "bfloat16"}.get(str(OTHER[name]), OTHER[name])
    assert f"A1 ({name} was {was}, now {now})" in line
    assert contents(finished) == before


@pytest.mark.parametrize("flag", ["--layers", "--heads"])
def test_stepd_refuses_other_heads(
    finished: Path, llama_path: Path, csv_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    step_d = ["stepd", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--relation_q_list", "A1"]
    assert main([*step_d, "--out_base_dir", str(finished / "A1"), flag, "0-1"]) == 2
    assert f"{flag[2:]} is 'all' there, '0-1' here" in refusal(capsys.readouterr().err)


def test_another_model_and_other_rows_are_refused_together_each_by_name(
    finished: Path, save_model: Callable[..., Path], csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(llama(hidden_size=32))
    (tmp_path / "pairs.csv").write_text(csv_path.read_text().replace("puppy", "poodle"))
    assert main(arguments(other, tmp_path / "pairs.csv", finished.parent)) == 2
    line = refusal(capsys.readouterr().err)
    assert "A1 (the rows of A1 in the CSV have changed, the model's files or revision have changed)" in line
    assert "B2 (the model's files or revision have changed)" in line


@pytest.mark.slow
def test_a_comment_in_the_source_changes_nothing_and_another_algorithm_is_refused(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    """A copy of the package with a comment in every file, then with its version of the algorithm raised."""
    source = Path(shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__")))
    for path in source.rglob("*.py"):
        path.write_text(path.read_text() + "\n# a remark\n")

    def dry_run() -> str:
        command = [sys.executable, "-m", "relfv", *arguments(llama_path, csv_path, finished.parent, "--dry_run")]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert dry_run().count("completed, nothing to do") == 2
    init, version = source / "relfv/__init__.py", f"ALGORITHM_VERSION = {ALGORITHM_VERSION}"
    assert version in init.read_text()
    init.write_text(init.read_text().replace(version, "ALGORITHM_VERSION = 99"))
    assert dry_run().count(f"refuse: algorithm_version was {ALGORITHM_VERSION}, now 99") == 2


def test_two_forces_within_a_second_keep_both_results(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    """Three moves take milliseconds; were they in three different seconds, the names would differ by themselves."""
    for name in ("twice", "same"):
        shutil.copytree(finished / "A1", tmp_path / name / "A1")
    one, two = tmp_path / "twice/A1", tmp_path / "same/A1"
    (two / "mark").write_text("second")
    first = move_aside(one)
    second = move_aside(two, first.parent)
    third = move_aside(Path(shutil.copytree(finished / "A1", tmp_path / "third/A1")), first.parent)
    assert len({first, second, third}) == 3
    assert (second / "mark").read_text() == "second"
    assert all(contents(path / "artifacts") == contents(finished / "A1/artifacts") for path in (first, second, third))

    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    force = arguments(llama_path, csv_path, tmp_path, "--q_list", "C3", "--force")
    for _ in range(3):  # C3 is only skipped: milliseconds
        assert main(force) == 0
    assert len([*relation.glob("C3.replaced-*/artifacts/qid_status.json")]) == 3
    assert status(relation, "C3")["status"] == "skipped"
