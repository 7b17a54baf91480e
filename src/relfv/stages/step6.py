"""Step6 at one layer: alpha times the function vector added to the zero-shot prompts' residual stream after that block.

The spec's loop over layers is outside. The layers of one process share one pass (injection.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv.settings import MODEL_SETTINGS
from relfv.stages.function_vector import FV
from relfv.stages.injection import TOKEN_RULE, Injections, inject_at_every_layer, length, summaries
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated, evaluated_prompts
from relfv.store.files import make_folders
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, jsonl_bytes, read_json, read_jsonl
from relfv.store.status import QidStatus
from relfv.types import MEASURES, Effects

if TYPE_CHECKING:
    import numpy as np

PREFIX = "step6_layer_"
"""Beginning of the stage's name at each layer."""

# --- files ---------------------------------------------------------------------------------------------------------

EVAL_SUMMARY = File("step6/layer_{layer}/eval_summary.json", read_json)
EVAL_TRIALS = File("step6/layer_{layer}/eval_trials.jsonl", read_jsonl)
EVAL_META = File("step6/layer_{layer}/eval_meta.json", read_json)
RESULTS = File("step6/layer_{layer}/step6_results_*.json", read_json)


def locate_results(folder: QidFolder, model: str, layer: int, n_eval: int) -> Path:
    """``step6_results_<model>_layer<l>_n<N>.json``; of a long path the end is kept, which tells models apart."""
    safe = re.sub(r"[^A-Za-z0-9.-]", "_", model)[-150:]
    return folder.locate(RESULTS, layer, f"step6_results_{safe}_layer{layer}_n{n_eval}.json")


def _write(work: Work, layer: int, *, results: Any, summary: Any, rows: Sequence[Any], meta: Any) -> None:
    """The four files of one layer; the results file, which the summary looks for, last."""
    folder = work.folder
    work.once(_make_folders)
    folder.write_together(
        {
            folder.path(EVAL_SUMMARY, layer): json_bytes(summary),
            folder.path(EVAL_TRIALS, layer): jsonl_bytes(rows),
            folder.path(EVAL_META, layer): json_bytes(meta),
            locate_results(folder, work.model.name, layer, len(rows)): json_bytes(results),
        }
    )


def _make_folders(work: Work) -> None:
    """Make the folders of all layers, with one wait for the disk."""
    make_folders(work.folder.path(EVAL_META, layer).parent for layer in work.layers)


# --- the stage -----------------------------------------------------------------------------------------------------


def injections(work: Work) -> Injections:
    """The vector at every layer of the evaluated prompts (``work.once(injections)``)."""
    prompts, fv, alpha = work.once(evaluated_prompts), work.read(FV), work.settings.alpha
    return work.repeatable("step6", inject_at_every_layer, work.model, prompts, fv, alpha)


def _inject(work: Work, layer: int) -> str:
    work.once(injections).require_sound(layer)
    numbers = work.once(_summaries)[layer]
    rows = _rows(work, layer)
    summary = {
        "n_eval": len(rows),
        "requested_n_eval": work.settings.n_eval,
        "n_trials": len(work.read(ZERO_SHOT_TRIALS).questions),
        **numbers,
    }
    meta, fv = _meta(work, layer), work.read(FV)
    results = {
        "config": meta,
        "fv": {"shape": list(fv.shape), "norm": meta["fv_norm"]},
        "summary": summary,
        "per_qid": _per_qid(work, layer, numbers),
        "metadata": {
            "trials": [question.trial_id for question in work.once(evaluated).questions],
            "fv_global_path": work.folder.path(FV).name,
            "sampled_trials_path": work.folder.path(ZERO_SHOT_TRIALS).name,
        },
        "results": rows,
    }
    _write(work, layer, results=results, summary=summary, rows=rows, meta=meta)
    return f"layer {layer}: P {numbers['mean_p_base']:.3f} -> {numbers['mean_p_with']:.3f}"


def _summaries(work: Work) -> list[dict[str, float]]:
    """The summary numbers of each layer."""
    return summaries(work.once(injections).effects, work.once(evaluated_prompts).right)


def _per_qid(work: Work, layer: int, of_all: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The summary of each q_id's prompts: of one q_id here, ``of_all``; of more in snapshots of other tools."""
    right, q_ids = work.once(evaluated_prompts).right, [q.q_id for q in work.once(evaluated).questions]
    if len(set(q_ids)) == 1:
        return {q_ids[0]: {"n_eval": len(q_ids), **of_all}}
    parts, effects = {}, work.once(injections).at_layer(layer)
    for q_id in dict.fromkeys(q_ids):
        rows = [i for i, other in enumerate(q_ids) if other == q_id]
        part = Effects(base=effects.base[rows], edited=effects.edited[rows])
        parts[q_id] = {"n_eval": len(rows), **summaries(part, [right[i] for i in rows])[0]}
    return parts


def _meta(work: Work, layer: int) -> dict[str, Any]:
    meta = work.once(_meta_of_all)
    norm, hidden = meta["fv_norm"], float(work.once(injections).hidden[layer])
    share = abs(work.settings.alpha) * norm / hidden if hidden else None
    return meta | {"edit_layer": layer, "mean_norm_hidden": hidden, "share_of_hidden": share}


def _meta_of_all(work: Work) -> dict[str, Any]:
    """The metadata that all layers share, with None in the place of what differs from layer to layer."""
    settings, facts = work.settings, work.model.facts()
    return {
        "model": facts["model"],
        "model_spec": facts["model_spec"],
        "edit_layer": None,
        "alpha": settings.alpha,
        "seed": settings.seed,
        "token_position_rule": TOKEN_RULE,
        "fv_norm": length(work.read(FV)),
        "mean_norm_hidden": None,
        "share_of_hidden": None,
        **{name: facts[name] for name in ("dtype", "quant", "precision", "engine", "device")},
        "n_eval": len(work.once(evaluated).questions),
        "requested_n_eval": settings.n_eval,
        "sampling": "all trials" if settings.allow_query_duplicates else "unique queries",
    }


def _rows(work: Work, layer: int) -> list[dict[str, Any]]:
    tokens, tops = work.model.tokens, work.once(injections).effects.edited.top_id[:, layer].tolist()
    after = {m: values[:, layer].tolist() for m, values in work.once(_edited).items()}
    rows = []
    for i, (question, row, top) in enumerate(
        zip(work.once(evaluated).questions, work.once(_rows_of_all), tops, strict=True)
    ):
        its = {
            "pred_id_with": top,
            "pred_token_with": tokens.text(top),
            "accuracy_with": int(top in question.right_ids),
        }
        for m, values in after.items():
            its |= {f"{m}_with": values[i], f"delta_{m}": values[i] - row[f"{m}_base"]}
        rows.append(row | its)
    return rows


def _edited(work: Work) -> dict[str, np.ndarray]:
    """Measures with the vector, (prompt, layer)."""
    return work.once(injections).effects.edited.measures()


def _rows_of_all(work: Work) -> list[dict[str, Any]]:
    """A row for each prompt, with None in the place of what differs from layer to layer."""
    trials, tokens, base = work.once(evaluated), work.model.tokens, work.once(injections).effects.base
    before, rows = base.measures(), []
    asked = zip(trials.questions, trials.prompts, base.top_id.tolist(), strict=True)
    for i, (question, prompt, top) in enumerate(asked):
        target = question.target.token_id
        row = {
            "idx": i,
            "q_id": question.q_id,
            "trial_idx": question.trial_idx,
            "prompt": tokens.fed(prompt, question.target.fed_ids),
            "answer": question.answer,
            "target_id": target,
            "target_token": tokens.text(target),
            "pred_id_base": top,
            "pred_id_with": None,
            "pred_token_base": tokens.text(top),
            "pred_token_with": None,
            "accuracy_base": int(top in question.right_ids),
            "accuracy_with": None,
        }
        for m in sorted(MEASURES):
            row |= {f"{m}_base": float(before[m][i]), f"{m}_with": None, f"delta_{m}": None}
        rows.append(row)
    return rows


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    for layer in status.expected_layers:
        summary, rows = folder.read(EVAL_SUMMARY, layer), folder.read(EVAL_TRIALS, layer)
        yield Check(folder.path(EVAL_TRIALS, layer), "n_eval rows", len(rows) == summary["n_eval"])
        path = locate_results(folder, status.settings.model, layer, summary["n_eval"])
        results = folder.read(RESULTS, layer)
        same = (results["summary"], results["results"]) == (summary, rows)
        yield Check(path, "the layer's own summary and rows", same)
        same = folder.read(EVAL_META, layer)["edit_layer"] == layer
        yield Check(folder.path(EVAL_META, layer), f"edit_layer {layer}", same)


STAGE = Stage(
    PREFIX,
    "Add the vector after this layer to the zero-shot prompts.",
    _inject,
    reads=(FV, ZERO_SHOT_TRIALS),
    writes=(EVAL_SUMMARY, EVAL_TRIALS, EVAL_META, RESULTS),
    settings=(*MODEL_SETTINGS, "alpha", "n_eval", "allow_query_duplicates", "seed"),
    agrees=_agrees,
    per_layer=True,
    share=0.05,
)
