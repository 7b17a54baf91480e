"""The settings of a run; what makes results another experiment, and what does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, llama
from folders import arguments, contents, status, write_status
from relfv import ALGORITHM_VERSION
from relfv.cli import main
from relfv.errors import InputError
from relfv.fingerprints import differences, fingerprint, fingerprint_fields
from relfv.settings import IDENTITY, Settings, parse_index_list
from relfv.store.files import move_aside

OTHER = {
    "dtype": "bf16", "quant": "8bit", "precision": "fast", "seed": 1, "n_trials_per_q": 24,
    "n_demos": 8, "corruption": "shuffle", "target": "distinguishing", "score_key": "mean_delta_logit",
    "topk": 19, "alpha": 2.5, "n_eval": 49,
    "allow_query_duplicates": True,
}  # fmt: skip
NO_CHOICE = {"model_spec"}
"""The checkpoint has one family; another is refused as such."""
NOT_COUNTED = {
    "figure_formats",
    "model",
    "revision",
    "device",
    "offload",
    "relation_csv_path",
    "trust_remote_code",
    "self_check",
    "alpha_sweep",
    "alpha_sweep_relative",
    "k_sweep",
    "replicates",
    "formats",
    "extras",
}
ONLY_STEPD = {"layers", "heads"}
"""``relfv run`` has no flag for these; stepd refuses them."""


def test_the_defaults_are_the_specs_and_conform() -> None:
    settings = Settings()
    assert settings.departures() == []
    assert (settings.model, settings.model_spec, settings.seed) == ("meta-llama/Llama-3.1-8B", "llama3", 0)
    assert (settings.n_trials_per_q, settings.n_demos, settings.topk, settings.n_eval) == (25, 9, 20, 50)
    assert (settings.score_key, settings.alpha) == ("mean_delta_p", 1.0)


def test_settings_survive_json_and_ignore_keys_of_other_versions() -> None:
    settings = Settings(topk=5, alpha=0.5)
    assert Settings.from_json({**settings.to_json(), "of_the_future": 1}) == settings


def prints(settings: Settings, rows: str = "r", model: str = "m") -> str:
    return fingerprint(fingerprint_fields(settings, rows_sha256=rows, model_identity=model))


def test_the_fingerprint_follows_what_the_numbers_depend_on_and_nothing_else() -> None:
    same = prints(Settings())
    assert prints(Settings(device="cpu", model="/elsewhere", relation_csv_path="moved.csv")) == same
    for other in (Settings(seed=1), Settings(alpha=2.0), Settings(precision="fast"), Settings(corruption="shuffle")):
        assert prints(other) != same
    assert prints(Settings(), rows="other") != same
    assert prints(Settings(), model="other") != same


def refusal(said: str) -> str:
    (line,) = [line for line in said.splitlines() if "ERROR" in line]
    assert "holds results of another experiment" in line
    return line


def test_every_setting_either_counts_or_is_known_not_to() -> None:
    assert {*OTHER, *NO_CHOICE, *NOT_COUNTED, *ONLY_STEPD} == set(Settings().to_json())
    fields = fingerprint_fields(Settings(), rows_sha256="", model_identity="")
    assert set(fields) == {*OTHER, *NO_CHOICE, *ONLY_STEPD, "rows_sha256", "model_identity", "algorithm_version"}
    assert set(IDENTITY) == {*OTHER, *NO_CHOICE, *ONLY_STEPD}


def without(folder: Path, q_id: str, *names: str) -> Path:
    """Make the status one of a version of relfv that did not know these settings. -> its file"""
    path, document = folder / q_id / "artifacts/qid_status.json", status(folder, q_id)
    for name in names:
        del document["config"][name], document["fingerprint_fields"][name]
    document["fingerprint"] = fingerprint(document["fingerprint_fields"])
    write_status(folder, q_id, document)
    return path


@pytest.mark.parametrize("name", [*(name for name in OTHER if name != "dtype"), *sorted(ONLY_STEPD)])
def test_a_setting_that_an_earlier_version_did_not_know_has_its_default_there(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    relation = Path(shutil.copytree(finished, tmp_path / "pairs"))
    path = without(relation, "A1", name)
    before = path.read_bytes()
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")
    # every other one was made with the default
    default = getattr(Settings(), name)
    assert status(finished, "A1")["config"][name] == default
    assert main(["verify", str(relation / "A1")]) == 0
    assert main(command) == 0
    assert "everything is completed" in capsys.readouterr().err
    assert path.read_bytes() == before
    if name in OTHER:
        flag = [f"--{name}"] if OTHER[name] is True else [f"--{name}", str(OTHER[name])]
        assert main([*command, *flag]) == 2
        assert f"A1 ({name} was {default}, now " in refusal(capsys.readouterr().err)
        assert path.read_bytes() == before


def test_what_differs_is_named_both_ways() -> None:
    one = fingerprint_fields(Settings(), rows_sha256="r", model_identity="m")
    other = fingerprint_fields(Settings(seed=5, alpha=2.0), rows_sha256="x", model_identity="m")
    assert differences(one, one, "Q1") == []
    assert differences(one, other, "Q1") == [
        "seed was 0, now 5", "alpha was 1.0, now 2.0", "the rows of Q1 in the CSV have changed",
    ]  # fmt: skip
    del other["seed"]  # of an earlier version: 0
    assert differences(other, one, "Q1") == ["alpha was 2.0, now 1.0", "the rows of Q1 in the CSV have changed"]
    assert differences({**one, "of_the_future": 1}, one, "Q1") == ["of_the_future was 1, now None"]


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
    assert f"{flag[2:]} was all, now 0-1" in refusal(capsys.readouterr().err)


def test_another_model_and_other_rows_are_refused_together_each_by_name(
    finished: Path, save_model: Callable[..., Path], csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(llama(hidden_size=32))
    (tmp_path / "pairs.csv").write_text(csv_path.read_text().replace("puppy", "poodle"))
    assert main(arguments(other, tmp_path / "pairs.csv", finished.parent)) == 2
    line = refusal(capsys.readouterr().err)
    was = status(finished, "A1")["config"]["model"]
    assert f"A1 (model was {was}, now {other}, the rows of A1 in the CSV have changed)" in line
    assert f"B2 (model was {was}, now {other})" in line


def test_a_model_whose_files_changed_under_its_name_is_said_so(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, relation = Path(shutil.copytree(llama_path, tmp_path / "model")), tmp_path / "pairs"
    shutil.copytree(finished, relation)
    path = relation / "A1/artifacts/qid_status.json"
    path.write_text(path.read_text().replace(str(llama_path), str(model)))
    command = arguments(model, csv_path, tmp_path, "--q_list", "A1")
    assert main(command) == 0
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "add_bos_token": False}))
    assert main(command) == 2
    assert "A1 (the model's files or revision have changed)" in refusal(capsys.readouterr().err)


def test_family_and_dtype_by_name_and_by_auto_are_the_same_experiment(
    finished: Path, llama_path: Path, csv_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished / "A1")
    named = ["--model_spec", "llama", "--dtype", "fp32"]
    for flags in ([], named, ["--model_spec", "auto", "--dtype", "auto"], ["--model_spec", "llama3"]):
        assert main(arguments(llama_path, csv_path, finished.parent, *flags)) == 0
        assert "everything is completed" in capsys.readouterr().err
    config = status(finished, "A1")["config"]
    assert (config["model_spec"], config["dtype"]) == ("llama3", "float32")
    assert contents(finished / "A1") == before


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
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (1 if "refuse: " in done.stdout else 0), done.stderr
        return done.stdout

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


@pytest.mark.parametrize(
    ("text", "indices"), [("all", [0, 1, 2, 3, 4]), ("0-2,4", [0, 1, 2, 4]), (" 3 ", [3]), ("1,0-1", [0, 1])]
)
def test_index_lists(text: str, indices: list[int]) -> None:
    assert parse_index_list(text, 5, "--layers") == indices


@pytest.mark.parametrize("text", ["5", "", "0-", "a-b", "1-0", "0-5"])
def test_index_lists_that_make_no_sense_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match="--layers"):
        parse_index_list(text, 5, "--layers")
