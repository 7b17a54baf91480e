from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from relfv.cli import main
from relfv.errors import InputError
from relfv.language_model import open_model
from relfv.report.page import write_report
from relfv.stages.attribution import judge_estimates, require_gradients


def effects() -> np.ndarray:
    """(trial, head): twenty heads, the first ones the strongest."""
    rng = np.random.default_rng(0)
    return 0.3 * 0.7 ** np.arange(20) + 0.001 * rng.standard_normal((25, 20))


def test_estimates_that_are_the_effects_find_everything() -> None:
    exact = effects()
    found = judge_estimates(exact, exact, np.abs(exact), "mean_delta_p", 5)
    assert found["first_order"] == {"spearman": pytest.approx(1.0), "recall": 1.0}
    assert found["graddrop"]["recall"] == 1.0
    assert [size["median_ratio"] for size in found["by_size"]] == pytest.approx([1.0] * 4)
    assert found["within_heads"] == pytest.approx(1.0)
    assert sum(size["n"] for size in found["by_size"]) == exact.size


def test_heads_that_equal_scores_leave_open_are_not_found() -> None:
    nothing, exact = np.zeros((25, 20)), effects()
    for found in (judge_estimates(nothing, nothing, nothing, "mean_delta_p", 5),
                  judge_estimates(exact, nothing, nothing, "mean_delta_p", 5)):  # fmt: skip
        assert found["first_order"] == found["graddrop"] == {"spearman": None, "recall": None}


def test_saturation_and_cancellation_are_told_apart() -> None:
    exact = effects()
    saturated = judge_estimates(exact, np.minimum(exact, 0.05), np.abs(exact), "mean_delta_p", 5)
    assert saturated["by_size"][-1]["median_ratio"] < 0.5
    assert saturated["by_size"][-1]["signs_differ"] == 0
    cancelled = exact.copy()
    cancelled[:, 0] *= -0.5
    found = judge_estimates(exact, cancelled, np.abs(exact), "mean_delta_p", 5)
    assert found["first_order"]["recall"] == 0.8
    assert found["by_size"][-1]["signs_differ"] == pytest.approx(25 / found["by_size"][-1]["n"])
    assert found["graddrop"]["recall"] == 1.0


def test_chance_is_what_noise_finds() -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((25, 20))
    recalls = [
        judge_estimates(effects(), rng.permuted(noise, axis=1), np.abs(noise), "mean_delta_p", 5) for _ in range(60)
    ]
    assert np.mean([found["first_order"]["recall"] for found in recalls]) == pytest.approx(0.25, abs=0.08)


def test_a_finished_q_id_gets_it_and_nothing_else_changes(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    before = {path: path.read_bytes() for path in (folder / "A1/artifacts").rglob("*") if path.is_file()}
    command = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    assert main([*command, "--q_list", "A1", "--extras", "attribution"]) == 0
    found = json.loads((folder / "A1/artifacts/attribution.json").read_text())
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"qid_status.json"}
    assert (found["n_heads"], found["n_trials"]) == (24, 25)
    assert found["n_passes"] == {"forward": 25, "backward": 100}
    rows = (folder / "A1/artifacts/cie_scores.csv").read_text().splitlines()
    header = rows[0].split(",")
    scores = [float(row.split(",")[header.index("mean_delta_p")]) for row in rows[1:]]
    assert [head["exact"] for head in found["heads"]] == pytest.approx(scores, rel=1e-9)
    assert "Attribution patching" in write_report(folder).read_text()
    assert main(["verify", str(folder / "A1")]) == 0


def test_quantised_models_are_refused_in_a_line(llama_path: Path) -> None:
    model = open_model(str(llama_path))
    require_gradients(model)
    with pytest.raises(
        InputError, match=r"--extras attribution: .* has --quant 4bit, and a backward pass needs all weights"
    ):
        require_gradients(dataclasses.replace(model, quant="4bit"))
