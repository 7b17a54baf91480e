"""``relfv run --config``: a run again as its manifest records it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from folders import arguments, contents, sealed, status
from relfv.cli import main


@pytest.fixture(scope="module")
def recorded(llama_path: Path, csv_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relation's folder with settings of its own."""
    out = tmp_path_factory.mktemp("recorded")
    more = ("--q_list", "B2", "--seed", "3", "--n_trials_per_q", "12", "--alpha", "2", "--extras", "none")
    assert main(arguments(llama_path, csv_path, out, *more)) == 0
    return out / "pairs"


def test_it_gives_the_same_bytes_whatever_the_environment_says(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPHA", "7")
    assert main(["run", "--config", str(recorded / "run_manifest.json"), "--out_root", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "pairs").glob("[A-C]*")] == ["B2"]
    assert contents(tmp_path / "pairs/B2/artifacts") == contents(recorded / "B2/artifacts")
    assert status(tmp_path / "pairs", "B2")["config"] == status(recorded, "B2")["config"]


def test_flags_override_it(recorded: Path, tmp_path: Path) -> None:
    config = ["run", "--config", str(recorded / "run_manifest.json"), "--out_root", str(tmp_path)]
    assert main([*config, "--q_list", "A1", "--alpha", "3"]) == 0
    made = status(tmp_path / "pairs", "A1")["config"]
    assert (made["alpha"], made["seed"], made["n_trials_per_q"]) == (3.0, 3, 12)


def test_a_model_of_its_own_is_opened_in_its_own_dtype(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["run", "--config", str(recorded / "run_manifest.json"), "--out_root", str(tmp_path)]
    assert main([*config, "--model", "demo", "--dry_run"]) == 0
    assert "family llama3, 8 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"settings": {}}',
        json.dumps({"settings": 3, "q_list": ["B2"]}),
        json.dumps(sealed({"settings": {"alpha": "x"}, "q_list": []})),
    ],
)
def test_what_is_no_manifest_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run_manifest.json"
    path.write_text(content)
    assert main(["run", "--config", str(path), "--out_root", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
