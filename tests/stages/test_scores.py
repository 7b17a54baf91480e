from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relfv.errors import InputError, RunError
from relfv.settings import SCORE_KEYS
from relfv.stages.cie import read_deltas
from relfv.stages.scores import measure_of, rank_heads, read_scores, select_heads, trial_scores
from relfv.types import HeadId, ScoredHead


def scored(layer: int, head: int, value: float) -> ScoredHead:
    return ScoredHead(HeadId(layer, head), {"mean_delta_p": value}, 25)


def test_heads_are_ranked_by_score_and_ties_by_layer_then_head() -> None:
    heads = [scored(2, 0, 0.5), scored(0, 1, 0.1), scored(1, 3, 0.5), scored(1, 2, 0.5), scored(0, 0, -1.0)]
    order = [(head.id.layer, head.id.head) for head in rank_heads(heads, "mean_delta_p")]
    assert order == [(1, 2), (1, 3), (2, 0), (0, 1), (0, 0)]


def test_asking_for_more_heads_than_there_are_is_bad_input() -> None:
    with pytest.raises(InputError, match="only 2 heads were scored"):
        select_heads([scored(0, 0, 1.0), scored(0, 1, 1.0)], 3)


@pytest.mark.parametrize("score_key", SCORE_KEYS)
def test_a_score_is_the_mean_of_its_trial_scores(finished: Path, score_key: str) -> None:
    artifacts = finished / "A1/artifacts"
    deltas, scored = read_deltas(artifacts / "trial_metrics.jsonl"), read_scores(artifacts / "cie_scores.csv")
    scores = trial_scores(deltas.of[measure_of(score_key)], score_key).mean(0)
    assert [head.id for head in scored] == [*deltas.heads]
    assert np.allclose(scores, [head.scores[score_key] for head in scored], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("change", "words"), [(("0,0,", "-1,0,"), "a negative layer or head"), ((",0,", ",x,"), "'x'")]
)
def test_a_row_that_is_not_the_score_of_a_head_is_named(
    finished: Path, tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    lines = (finished / "A1/artifacts/aie_scores.csv").read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("0,0,"))
    lines[row] = lines[row].replace(*change, 1)
    (tmp_path / "x.csv").write_text("\n".join(lines))
    with pytest.raises(RunError, match=rf"x\.csv: line {row + 1} is not the score of a head .*{words}"):
        read_scores(tmp_path / "x.csv")
