"""Tidy tables of a relation's results, from saved artifacts alone: one row for each unit, with q_id and model in every
row, and one column name for one thing in all of them. They are ``tables/*.csv`` of a run, and the frames of the Python
API.

A number with ``_base`` is without the vector and one with ``_with`` is with it; ``_ci_low`` and ``_ci_high`` are the
ends of the 95% interval of the column before them (docs/statistics.md). What is not known is an empty cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from relfv.stages.ability import majority_accuracy
from relfv.stages.ablation import ABLATION
from relfv.stages.answers import ANSWERS
from relfv.stages.cie import METRICS
from relfv.stages.controls import CONTROLS_FILE
from relfv.stages.function_vector import STEP_E_EVAL, TOP_HEADS
from relfv.stages.mlps import MLP_CIE
from relfv.stages.positions import POSITIONS
from relfv.stages.scores import AIE, COLUMNS
from relfv.stages.step6 import EVAL_META, EVAL_SUMMARY, EVAL_TRIALS
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.summary import SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.verdict import HELD_OUT
from relfv.stats import clustered_mean
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, read_jsonl
from relfv.store.status import QidStatus
from relfv.types import MEASURES

Row = dict[str, Any]

COMMON = ("q_id", "name", "model")
"""Columns of every row of every table. ``name`` is the relation's own, where it has one."""
_GAP = tuple(f"share_of_gap{which}{end}" for which in ("", "_held_out") for end in ("", "_ci_low", "_ci_high"))
_DELTA = ("mean_p_base", "mean_p_with", "mean_delta_p", "mean_delta_p_ci_low", "mean_delta_p_ci_high")
_ACCURACY = ("acc_base", "acc_with", "delta_acc")
_WHOLE = tuple(f"{what}_{half}" for what in ("exact_match", "begins_with_answer") for half in ("base", "with"))


def _summary(qid: QidFolder, status: QidStatus) -> Iterator[Row]:
    steps, reference = qid.read(STEP6_SUMMARY), qid.read(STEP_E_EVAL)["reference"]
    layer, trials = steps["best_layer"], qid.read(TRIALS)
    (best,), found = _of_layers(qid, [layer]), _if_there(qid, SUMMARY)
    shares = found.get("share_of_gap", {})
    yield {
        "n_trials": len(trials.questions),
        "n_queries": len(set(trials.clusters)),
        "n_layers": len(status.expected_layers),
        "n_heads": len(qid.read(TOP_HEADS)["heads"]),
        "n_heads_distinguishable": found.get("n_heads_distinguishable"),
        "score_key": status.settings.score_key,
        "acc_clean": reference["clean"]["acc"],
        "acc_majority": majority_accuracy(trials),
        "can_do": found.get("ability", {}).get("can_do"),
        "mean_p_clean": reference["clean"]["mean_p"],
        **best,
        **_if_there(qid, ANSWERS).get("summary", {}),
        **_share("share_of_gap", shares.get("fv")),
        **_share("share_of_gap_held_out", shares.get(HELD_OUT)),
        "verdict": found.get("verdict"),
    }


def _heads(qid: QidFolder, status: QidStatus) -> Iterator[Row]:
    top = {(head["layer"], head["head"]): head for head in qid.read(TOP_HEADS)["heads"]}
    for rank, scored in enumerate(qid.read(AIE), start=1):
        at = (scored.id.layer, scored.id.head)
        chosen = top.get(at, {})
        yield {
            "layer": at[0],
            "head": at[1],
            "rank": rank,
            "score_key": status.settings.score_key,
            "in_function_vector": at in top,
            "distinguishable": chosen.get("distinguishable"),
            "in_top_k": chosen.get("in_top_k"),
            **scored.scores,
        }


def _layers(qid: QidFolder, status: QidStatus) -> Iterator[Row]:
    best = qid.read(STEP6_SUMMARY)["best_layer"]
    for row in _of_layers(qid, status.expected_layers):
        yield {**row, "is_best": row["layer"] == best}


def _of_layers(qid: QidFolder, layers: Sequence[int]) -> list[Row]:
    """Summary of each layer, with intervals: the same prompts at every layer."""
    of_layers = [qid.read(EVAL_TRIALS, layer) for layer in layers]
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row["prompt"] for row in of_layers[0]))}
    delta = np.array([[row["delta_p"] for row in rows] for rows in of_layers]).T
    mean = clustered_mean(delta, [prompts[row["prompt"]] for row in of_layers[0]])
    found = []
    for i, layer in enumerate(layers):
        meta = qid.read(EVAL_META, layer)
        found.append(
            {
                "layer": layer,
                **{name: meta[name] for name in ("alpha", "fv_norm", "mean_norm_hidden", "share_of_hidden")},
                **qid.read(EVAL_SUMMARY, layer),
                "mean_delta_p_ci_low": finite(mean.low[i]),
                "mean_delta_p_ci_high": finite(mean.high[i]),
            }
        )
    return found


def _controls(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    document = _if_there(qid, CONTROLS_FILE)
    if not document:
        return
    shared = {
        "alpha": document["alpha"],
        "n_eval": document["n_eval"],
        "acc_base": document["zero_shot"]["acc"],
        "mean_p_base": document["zero_shot"]["mean_p"],
    }
    for layer, controls in [*document["per_layer"].items(), (None, document["at_once"]["numbers"])]:
        for control, numbers in controls.items():
            acc = numbers["acc"]
            yield {
                **shared,
                "control": control,
                "layer": None if layer is None else int(layer),
                "acc_with": acc,
                "delta_acc": None if acc is None else acc - shared["acc_base"],
                "mean_p_with": numbers["mean_p"],
                "mean_delta_p": numbers["mean_delta_p"],
                "mean_delta_p_ci_low": numbers["ci_low"],
                "mean_delta_p_ci_high": numbers["ci_high"],
                "n_draws": len(numbers.get("mean_p_of_draws", ())) or None,
            }


def _answers(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    document = _if_there(qid, ANSWERS)
    for row in document.get("rows", ()):
        yield {
            "layer": document["layer"],
            "alpha": document["alpha"],
            **row,
            **{f"{key}_{half}": bool(row[f"{key}_{half}"]) for key in ("begins", "exact") for half in ("base", "with")},
        }


def _trials(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    trials = qid.read(TRIALS)
    for question, clean, corrupted in zip(trials.questions, trials.clean_prompts, trials.prompts, strict=True):
        yield {
            "trial_idx": question.trial_idx,
            "query_source_index": question.query_source_index,
            "query": question.query.input,
            "answer": question.answer,
            "target_id": question.target.token_id,
            "clean_prompt": clean,
            "corrupted_prompt": corrupted,
        }


def _effects(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    yield from read_jsonl(qid.path(METRICS))


def _ablation(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    document = _if_there(qid, ABLATION)
    for what, done in [*document.get("heads", {}).items(), *document.get("directions", {}).items()]:
        ways = {how: numbers for how, numbers in done.items() if isinstance(numbers, dict) and "mean_p" in numbers}
        by_layer = [("alone", int(layer), numbers) for layer, numbers in done.get("per_layer", {}).items()]
        for how, layer, numbers in [*((how, None, numbers) for how, numbers in ways.items()), *by_layer]:
            yield {
                "without": what,
                "how": how,
                "layer": layer,
                "n_heads": done.get("n_heads"),
                "acc_base": document["clean"]["acc"],
                "acc_with": numbers["acc"],
                "delta_acc": numbers["acc"] - document["clean"]["acc"],
                "mean_p_base": document["clean"]["mean_p"],
                "mean_p_with": numbers["mean_p"],
                "mean_delta_p_ci_low": numbers["ci_low"],
                "mean_delta_p_ci_high": numbers["ci_high"],
                "mean_delta_logprob_ci_low": numbers["delta_logprob_ci_low"],
                "mean_delta_logprob_ci_high": numbers["delta_logprob_ci_high"],
                **{name: numbers[name] for name in ("mean_delta_p", "mean_delta_logprob")},
                **_share("share_of_gap", numbers["share_of_gap"]),
                "n_draws": len(numbers.get("mean_p_of_draws", ())) or None,
            }


def _mlps(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    yield from _if_there(qid, MLP_CIE).get("mlps", ())


def _positions(qid: QidFolder, _: QidStatus) -> Iterator[Row]:
    document = _if_there(qid, POSITIONS)
    for tokens in document.get("classes", {}):
        sets = [({"heads": heads}, numbers) for heads, numbers in document["together"][tokens].items()]
        alone = [({"layer": one["layer"], "head": one["head"]}, one[tokens]) for one in document["heads"]]
        for which, numbers in [*sets, *alone]:
            yield {
                "tokens": tokens,
                **which,
                "mean_delta_p": numbers["mean_delta_p"],
                "mean_delta_p_ci_low": numbers["ci_low"],
                "mean_delta_p_ci_high": numbers["ci_high"],
                **_share("share_of_gap", numbers.get("share_of_gap")),
            }


def _share(name: str, share: dict[str, float] | None) -> Row:
    if not share:
        return {}
    return {name: share["value"], f"{name}_ci_low": share["low"], f"{name}_ci_high": share["high"]}


def _if_there(qid: QidFolder, file: File[Any]) -> dict[str, Any]:
    """Read ``file``; empty if it is missing because extras were left out."""
    return qid.read(file) if qid.has(file) else {}


_RowsOf = Callable[[QidFolder, QidStatus], Iterator[Row]]
_PAIRS = tuple(f"{what}_{half}" for half in ("base", "with") for what in (
    "written", "begins", "exact", "logprob_answer", "rank_first_token",
))  # fmt: skip
_OF_MEASURES = tuple(
    column for m in MEASURES[1:] for column in (f"mean_{m}_base", f"mean_{m}_with", f"mean_delta_{m}", f"std_delta_{m}")
)

TABLES: dict[str, tuple[_RowsOf, tuple[str, ...]]] = {
    "summary": (_summary, (
        "status", "reason", "n_rows", "n_trials", "n_queries", "n_eval", "n_layers", "n_heads",
        "n_heads_distinguishable", "score_key", "layer", "alpha", *_ACCURACY, *_DELTA, "acc_clean", "mean_p_clean",
        "acc_majority", "can_do", *_WHOLE, *_GAP, "verdict",
    )),
    "heads": (_heads, (
        "layer", "head", "rank", "score_key", "in_function_vector", "distinguishable", "in_top_k", *COLUMNS,
    )),
    "layers": (_layers, (
        "layer", "is_best", "alpha", "n_eval", *_ACCURACY, *_DELTA, "std_delta_p", *_OF_MEASURES, "fv_norm",
        "mean_norm_hidden", "share_of_hidden",
    )),
    "controls": (_controls, ("control", "layer", "alpha", "n_eval", *_ACCURACY, *_DELTA, "n_draws")),
    "answers": (_answers, ("layer", "alpha", "query", "answer", "n_tokens", *_PAIRS)),
    "ablation": (_ablation, (
        "without", "how", "layer", "n_heads", *_ACCURACY, *_DELTA, "mean_delta_logprob", "mean_delta_logprob_ci_low",
        "mean_delta_logprob_ci_high", *_GAP[:3], "n_draws",
    )),
    "mlps": (_mlps, (
        "layer", "mean_delta_p", "mean_delta_logit", "mean_delta_logprob", "clean_mean_norm",
        *(column for column in COLUMNS if column.startswith("mean_delta_p_")),
    )),
    "positions": (_positions, (
        "tokens", "heads", "layer", "head", "mean_delta_p", "mean_delta_p_ci_low", "mean_delta_p_ci_high", *_GAP[:3],
    )),
    "trials": (_trials, (
        "trial_idx", "query_source_index", "query", "answer", "target_id", "clean_prompt", "corrupted_prompt",
    )),
    "effects": (_effects, (
        "trial_idx", "layer", "head", "target_id",
        *(column for m in MEASURES for column in (f"{m}_base", f"{m}_patch", f"delta_{m}")),
    )),
}  # fmt: skip
"""Tables by name: the function that makes the rows, and the columns after ``COMMON``. Tables of studies, which few runs
have, are not written to disk, nor are the last two: they are as large as the artifacts that they come from."""
WRITTEN = ("summary", "heads", "layers", "controls", "answers")
READ = (TRIALS, TOP_HEADS, STEP_E_EVAL, AIE, STEP6_SUMMARY, EVAL_TRIALS, EVAL_META, EVAL_SUMMARY, SUMMARY, ANSWERS,
        CONTROLS_FILE)  # fmt: skip
"""Files that the rows of the ``WRITTEN`` tables are made from, besides the status."""


def columns_of(table: str) -> tuple[str, ...]:
    """The columns of a table, in order."""
    return COMMON + TABLES[table][1]


def rows_of(table: str, status: QidStatus, qid: QidFolder | None = None) -> list[Row]:
    """The rows of one q_id; unless it is completed it has rows in ``summary`` only. Every row has every column. Several
    tables of one ``qid`` read each of its files once.

    Raises an exception of any kind where its files are of another shape than relfv writes.
    """
    common: Row = {"q_id": status.q_id, "name": status.name or None, "model": status.settings.model}
    if table == "summary":
        common |= {"status": status.status, "reason": status.reason, "n_rows": status.q_row_count}
    qid, columns = qid or QidFolder(status.artifacts_dir, status.q_id), columns_of(table)
    found: Sequence[Row] = list(TABLES[table][0](qid, status)) if status.status == "completed" else ()
    if table == "summary" and not found:
        found = ({},)
    whole = ({**row, **common} for row in found)
    return [{column: row.get(column) for column in columns} for row in whole]
