from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity import rounding, size_in
from relfv.cli import main
from relfv.errors import InputError
from relfv.runs import estimate
from relfv.settings import MAX_SEED, Settings
from relfv.stages import measured
from relfv.stages.draws import draw_seeds, prompts_swept
from relfv.stages.function_vector import read_function_vector
from relfv.stages.means import read_means
from relfv.stages.measured import Measured, read_measured
from relfv.stages.replicates import STAGE
from relfv.stages.scores import read_scores


@pytest.fixture(scope="module")
def replicated(finished: Path, csv_path: Path, llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' run with three draws of A1."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("replicated") / "pairs"))
    assert main([*command(folder, csv_path, llama_path), "--replicates", "3"]) == 0
    return folder


def command(folder: Path, csv_path: Path, llama_path: Path) -> list[str]:
    where = ["--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(folder.parent)]
    return ["run", *where, "--q_list", "A1"]


def draws_of(folder: Path) -> dict[int, dict[int, Measured]]:
    found: dict[int, dict[int, Measured]] = {}
    for name, one in read_measured(folder / "A1/artifacts/replicates/draws.safetensors")[0].items():
        n_trials, number = map(int, name.split("."))
        found.setdefault(n_trials, {})[number] = one
    return found


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "A1/artifacts/replicates/replicates.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    there = folder / "A1/artifacts/replicates"
    return {path.name: path.read_bytes() for path in sorted(there.iterdir())}


def test_a_draw_is_what_an_ordinary_run_with_its_seed_gives(
    replicated: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    draws = draws_of(replicated)
    assert {n: [*some] for n, some in draws.items()} == {5: [0, 1, 2], 10: [0, 1, 2], 25: [0, 1, 2], 50: [0]}
    flags = ["--seed", "1", "--extras", "none"]
    assert main([*command(tmp_path / "pairs", csv_path, llama_path), *flags]) == 0
    for folder, number in ((replicated, 0), (tmp_path / "pairs", 1)):
        there, found = folder / "A1/artifacts", draws[25][number]
        limit = rounding(size_in(there / "trial_metrics.jsonl"))
        means = read_means(there / "stepD_mean_acts/qid_A1_clean_mean.pt").values
        assert np.allclose(found.means, means, atol=limit)
        scores = [head.scores["mean_delta_p"] for head in read_scores(there / "cie_scores.csv")]
        assert np.allclose(found.scores, scores, atol=limit)
        top = json.loads((there / "top_heads.json").read_text())["heads"]
        if {(head["layer"], head["head"]) for head in top} == {(head.layer, head.head) for head in found.heads}:
            vector = read_function_vector(there / "fv_global_resid.pt")
            assert np.allclose(found.vector, vector, atol=limit * np.abs(vector).max())
        else:  # heads that are told apart by rounding alone
            assert sorted(scores, reverse=True)[19] - sorted(scores, reverse=True)[20] < limit
    said = document(replicated)
    assert [one["seed"] for one in said["draws"]] == [0, 1, 2]
    own = json.loads((replicated / "A1/artifacts/step6/controls.json").read_text())["per_layer"]
    for layer, numbers in said["curve"]["per_layer"].items():
        assert numbers["mean_p"][0] == pytest.approx(own[layer]["fv"]["mean_p"], rel=limit)


def test_the_work_that_is_foretold_is_what_is_done(replicated: Path) -> None:
    done = {(n, i) for n, made in draws_of(replicated).items() for i in made} - {(25, 0)}  # swept by StepD
    assert prompts_swept(Settings(replicates=3)) == sum(n for n, _ in done) == 3 * 15 + 2 * 25 + 50
    of_few = estimate.Costs(n_trials=6, n_eval=5, seconds={}, n_bytes={}, n_files=0, page_s=0.0, peak_bytes=0)
    whole = Settings(replicates=3)
    assert estimate.times_as_much(STAGE, of_few, whole, 16) == 145 / (3 * 5 + 2 * 6 + 12)


def test_the_numbers_are_those_of_the_vectors_and_lists_by_hand(replicated: Path) -> None:
    said = document(replicated)
    draws = draws_of(replicated)
    for rung in said["ladder"]:
        some = draws[rung["n_trials"]]
        pairs = [(some[i], some[j]) for i, j in combinations(some, 2)]
        vectors = [(one.vector.astype(float), other.vector.astype(float)) for one, other in pairs]
        cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in vectors])
        assert rung["cosine"]["mean"] == pytest.approx(cosine)
        assert rung["heads_shared"]["mean"] == pytest.approx(np.mean([len({*a.heads} & {*b.heads}) for a, b in pairs]))
    assert [rung["n_trials"] for rung in said["ladder"]] == [5, 10, 25]  # of 50 there is one
    trials = json.loads((replicated / "A1/artifacts/sampled_trials.json").read_text())["trials"]
    assert said["draws"][0]["n_queries"] == len({trial["query"]["input"] for trial in trials})
    assert said["samples"]["n_rows"] == 12
    assert "Another draw of 25 trials gives the same vector to cosine" in said["verdict"]
    assert "of the same 12 rows" in said["verdict"]


def test_more_draws_are_added_to_those_there_are_and_fewer_take_none_away(
    replicated: Path, csv_path: Path, llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(replicated, tmp_path / "pairs"))
    before, made = files(folder), []
    real = measured.head_effects

    def counting(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        made.append(len(prompts))
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(measured, "head_effects", counting)
    assert main([*command(folder, csv_path, llama_path), "--replicates", "2"]) == 0
    assert files(folder) == before
    assert not made
    assert main([*command(folder, csv_path, llama_path), "--replicates", "4"]) == 0
    assert sorted(made) == [5, 10, 25, 50]
    assert document(folder)["n_draws"] == 4
    assert main(["verify", str(folder)]) == 0
    assert "Other draws of trials" in (folder / "report/index.html").read_text()


def test_a_run_that_is_stopped_goes_on_after_the_last_draw_and_gives_the_same_bytes(
    finished: Path, replicated: Path, csv_path: Path, llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    real, made, stop_after = measured.head_effects, [], [4]

    def stopping(*args: Any, **options: Any) -> Any:
        if len(made) in stop_after:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args, **options)

    monkeypatch.setattr(measured, "head_effects", stopping)
    assert main([*command(folder, csv_path, llama_path), "--replicates", "3"]) == 130
    assert main(["verify", str(folder)]) == 0  # the q_id is complete without
    stop_after.clear()
    assert main([*command(folder, csv_path, llama_path), "--replicates", "3"]) == 0
    assert len(made) == 3 * 2 + 2 + 1  # with 5 and 10 trials, with 25 but the run's own, with 50: each once
    assert files(folder) == files(replicated)


def test_a_changed_draw_is_seen_and_made_again(
    replicated: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(replicated, tmp_path / "pairs"))
    path = folder / "A1/artifacts/replicates/draws.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    assert main(["verify", str(folder)]) == 1
    assert main(command(folder, csv_path, llama_path)) == 0
    assert files(folder) == files(replicated)


def test_seeds_of_draws_follow_the_runs_own_and_begin_anew_after_the_largest() -> None:
    assert draw_seeds(Settings(seed=7, replicates=3)) == [7, 8, 9]
    assert draw_seeds(Settings(seed=MAX_SEED, replicates=3)) == [MAX_SEED, 0, 1]


def test_one_draw_is_refused() -> None:
    with pytest.raises(InputError, match="--replicates 1: one draw has none to be compared with"):
        Settings(replicates=1)
