"""All layers of Step6 together: the best by score, and every layer's accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relfv.errors import RunError
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.step6 import EVAL_SUMMARY, RESULTS, locate_results
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, read_json
from relfv.store.status import QidStatus

STEP6_SUMMARY = File("step6/step6_all_layers_summary.json", read_json)


def layer_score(score_key: str) -> str:
    """The eval_summary column that compares layers: score_key itself, of which only signed means exist there."""
    return score_key.replace("mean_abs_delta", "mean_delta")


def _put_together(work: Work) -> str:
    folder, score = work.folder, layer_score(work.settings.score_key)
    per_layer: dict[str, dict[str, Any]] = {}
    for layer in work.layers:
        if not folder.has(EVAL_SUMMARY, layer):
            continue
        summary = work.read(EVAL_SUMMARY, layer)
        results = locate_results(folder, work.settings.model, layer, summary["n_eval"])
        if not results.exists():
            continue
        per_layer[str(layer)] = {
            "results_path": str(results.relative_to(folder.artifacts)),
            "eval_summary_path": EVAL_SUMMARY.named(work.q_id, layer),
            "score_value": summary[score],
            "acc_base": summary["acc_base"],
            "acc_with": summary["acc_with"],
        }
    if not per_layer:
        raise RunError(f"{folder.artifacts}: no layer has Step6 results; run Step6 for each layer first")
    best = max(per_layer, key=lambda layer: (per_layer[layer]["score_value"], -int(layer)))
    document = {
        "q_id": work.q_id,
        "score_key": score,
        "expected_layers": list(work.layers),
        "completed_layers": [layer for layer in work.layers if str(layer) in per_layer],
        "missing_layers": [layer for layer in work.layers if str(layer) not in per_layer],
        "best_layer": int(best),
        "best_score": per_layer[best]["score_value"],
        "per_layer": per_layer,
    }
    work.write(STEP6_SUMMARY, json_bytes(document), content=document)
    chosen = per_layer[best]
    return (
        f"best of {len(per_layer)} layers: {best}, {score} {document['best_score']:+.3f}, "
        f"accuracy {chosen['acc_base']:.2f} -> {chosen['acc_with']:.2f}"
    )


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    path, overall = folder.path(STEP6_SUMMARY), folder.read(STEP6_SUMMARY)
    yield Check(path, "every layer", overall["completed_layers"] == status.expected_layers)
    for layer in status.expected_layers:
        summary, entry = folder.read(EVAL_SUMMARY, layer), overall["per_layer"][str(layer)]
        kept = [entry[name] for name in ("acc_base", "acc_with", "score_value")]
        there = [summary[name] for name in ("acc_base", "acc_with", overall["score_key"])]
        yield Check(path, f"the numbers of layer {layer}", kept == there)


STAGE = Stage(
    "step6_summary",
    "All layers together, and the best.",
    _put_together,
    reads=(RESULTS, EVAL_SUMMARY),
    writes=(STEP6_SUMMARY,),
    settings=("score_key",),
    agrees=_agrees,
    share=0.01,
)
