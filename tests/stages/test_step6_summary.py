from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relfv.errors import RunError
from relfv.runs.qid import no_model
from relfv.stages.stage import Work
from relfv.stages.step6 import EVAL_SUMMARY, RESULTS
from relfv.stages.step6_summary import STAGE, STEP6_SUMMARY
from relfv.store.folder import QidFolder
from relfv.store.status import read_status

LAYERS = range(3)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> QidFolder:
    return QidFolder(Path(shutil.copytree(finished / "A1/artifacts", tmp_path / "A1/artifacts")), "A1")


def put_together(folder: QidFolder, score_key: str = "mean_delta_p") -> dict[str, Any]:
    status = read_status(folder.artifacts)
    assert status is not None
    settings = replace(status.settings, score_key=score_key)
    STAGE.step().run(Work(QidFolder(folder.artifacts, "A1"), settings, no_model, LAYERS))
    return json.loads(folder.path(STEP6_SUMMARY).read_text())


def rescore(folder: QidFolder, **scores: list[float]) -> None:
    """Give the layers' summaries other scores."""
    for layer in LAYERS:
        path = folder.path(EVAL_SUMMARY, layer)
        its = {name: values[layer] for name, values in scores.items()}
        path.write_text(json.dumps(json.loads(path.read_text()) | its))


def test_the_best_layer_has_the_largest_score_and_of_equal_ones_the_first_is_best(folder: QidFolder) -> None:
    rescore(folder, mean_delta_p=[0.1, 0.3, 0.3], mean_delta_logit=[-3.0, -1.0, -2.0], acc_with=[1.0, 0.5, 0.75])
    found = put_together(folder)
    assert (found["best_layer"], found["best_score"]) == (1, 0.3)
    assert [found["per_layer"][str(layer)]["acc_with"] for layer in LAYERS] == [1.0, 0.5, 0.75]
    of_logits = put_together(folder, "mean_delta_logit")
    assert (of_logits["best_layer"], of_logits["best_score"]) == (1, -1.0)
    rescore(folder, mean_delta_logit=[-1.0, -1.0, -2.0])
    absolute = put_together(folder, "mean_abs_delta_logit")  # Step6 has signed means alone
    assert (absolute["score_key"], absolute["best_layer"]) == ("mean_delta_logit", 0)


def test_layers_without_results_are_missing_and_none_at_all_is_an_error(folder: QidFolder) -> None:
    folder.path(RESULTS, 1).unlink()
    found = put_together(folder)
    assert (found["completed_layers"], found["missing_layers"]) == ([0, 2], [1])
    assert [*found["per_layer"]] == ["0", "2"]
    assert found["expected_layers"] == [*LAYERS]
    for entry in found["per_layer"].values():
        assert (folder.artifacts / entry["results_path"]).is_file()
        assert (folder.artifacts / entry["eval_summary_path"]).is_file()
    shutil.rmtree(folder.path(EVAL_SUMMARY, 0).parent)
    folder.path(EVAL_SUMMARY, 2).unlink()
    with pytest.raises(RunError, match="no layer has Step6 results"):
        put_together(folder)
