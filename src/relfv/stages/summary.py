"""The conclusions on a q_id, in numbers (summary.json); verdict.py puts them into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relfv.shares import Gap
from relfv.stages.ability import ability_numbers, majority_accuracy, majority_share
from relfv.stages.answered_right import answered_right
from relfv.stages.answers import ANSWERS, accepted_answers
from relfv.stages.carrier import carrier_numbers
from relfv.stages.caveats import caveat_numbers
from relfv.stages.cie import METRICS
from relfv.stages.control_vectors import CONTROLS
from relfv.stages.controls import CONTROLS_FILE
from relfv.stages.function_vector import STEP_E_EVAL, TOP_HEADS, heads_of
from relfv.stages.head_stability import HEAD_STABILITY
from relfv.stages.judging import n_as_good
from relfv.stages.scores import measure_of
from relfv.stages.stage import Stage, Work
from relfv.stages.step6 import EVAL_TRIALS
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.verdict import HELD_OUT, in_short, verdict
from relfv.stats import FEW_QUERIES, LEVEL
from relfv.store.folder import File
from relfv.store.formats import finite, json_bytes, read_json


def conclusions(
    top_heads: Mapping[str, Any],
    controls: Mapping[str, Any],
    stability: Mapping[str, Any] | None,
    beside: Mapping[str, Any],
    *,
    layer: int,
    score_key: str = "mean_delta_p",
) -> dict[str, Any]:
    """The numbers that the verdict rests on, from top_heads.json, controls.json and head_stability.json, and the
    verdict.

    ``layer`` is the best by ``score_key`` of step6_all_layers_summary.json, and stands for the best in every file.
    ``beside`` are the numbers of ``caveat_numbers``, ``ability_numbers`` and ``answered_right``.
    """
    prompts, layers = controls["by_prompt"], list(controls["per_layer"])
    compared = [str(at) for at in controls.get("compared_layers", layers)]
    best = layers.index(str(layer))
    at_best = controls["per_layer"][layers[best]]
    there = {name: _effect(prompts, name, [layers[best]]) for name in controls["meaning"] if name in at_best}
    # Some controls are at the best layer alone, which may be one of the compared layers.
    everywhere = set(controls["meaning"]).intersection(*(controls["per_layer"][layer] for layer in compared))
    effects = {name: _effect(prompts, name, compared) for name in there if name in everywhere}
    zero, clean = np.array(prompts["p_zero_shot"]), np.array(prompts["p_clean"])
    gap = Gap(zero, clean, prompts["query_source_index"])
    # The function vector's share allows for its layer having been chosen.
    shares = {name: gap.share(effect, 0) for name, effect in there.items()}
    shares["fv"] = gap.share(_effect(prompts, "fv", layers), best)
    if "held_out" in effects:
        score = _by_layer(prompts, f"{measure_of(score_key)}_held_out", layers)
        held_out = _effect(prompts, "held_out", layers)
        shares[HELD_OUT] = gap.share_with_layer_chosen_by_others(held_out, score)
    document: dict[str, Any] = {
        "verdict": "",
        **_of_heads(top_heads, stability),
        "n_eval": controls["n_eval"],
        "n_queries": controls["n_queries"],
        "layer": layer,
        "p": {
            "zero_shot": float(zero.mean()),
            "clean": float(clean.mean()),
            **{name: finite((zero + effect[:, 0]).mean()) for name, effect in there.items()},
        },
        "acc": {"zero_shot": controls["zero_shot"]["acc"], **{name: at_best[name]["acc"] for name in effects}},
        "share_of_gap": {name: share and vars(share) for name, share in shares.items()},
        "share_of_gap_of_draws": {
            name: [(p - zero.mean()) / (clean - zero).mean() for p in numbers["mean_p_of_draws"]]
            for name, numbers in at_best.items()
            if shares.get(name) and "mean_p_of_draws" in numbers
        },
        "against_random": {
            name: _against(gap, effects, name, {at: controls["per_layer"][at] for at in compared})
            for name, control in CONTROLS.items()
            if control.rival and shares.get(name)
        },
        **carrier_numbers(controls, layer, gap, effects),
        **beside,
        "ci_level": LEVEL,
    }
    document["verdict"] = verdict(document)
    return document


def _of_heads(top_heads: Mapping[str, Any], stability: Mapping[str, Any] | None) -> dict[str, Any]:
    heads, meta = top_heads["heads"], top_heads["meta"]
    behind = [head.get("mean_delta_p_queries_behind_half") for head in heads]
    return {
        "n_heads": len(heads),
        "n_heads_distinguishable": meta.get("n_distinguishable"),
        "n_heads_called_at_once": meta.get("n_called_at_once"),
        "n_heads_of_few_queries": None if None in behind else sum(0 < n <= FEW_QUERIES for n in behind),
        "n_queries_of_trials": meta.get("n_queries"),
        "half_overlap_of_top_heads": stability and stability["half_overlap"],
        "chance_overlap_of_top_heads": stability and stability["chance_overlap"],
    }


def _against(gap: Gap, effects: Mapping[str, np.ndarray], name: str, per_layer: Mapping[str, Any]) -> dict[str, Any]:
    """The function vector against a control of random draws, both at the same few layers ``per_layer``: prompt by
    prompt where the vector is best of these, and its rank where each has the layer that is best for it."""
    above = gap.share(effects["fv"] - effects[name], int(np.nan_to_num(effects["fv"].mean(0), nan=-np.inf).argmax()))
    by_layer = [row[name].get("mean_p_of_draws", [row[name].get("mean_p")]) for row in per_layer.values()]
    own = np.array([row["fv"]["mean_p"] for row in per_layer.values()], dtype=np.float64)
    return {
        "share_of_gap_above": above and {"value": above.value, "low": above.low, "high": above.high},
        "n_draws": len(by_layer[0]),
        "n_draws_as_good": n_as_good(np.array(by_layer, dtype=np.float64), own),
    }


def _effect(prompts: Mapping[str, Any], name: str, layers: Sequence[str]) -> np.ndarray:
    """(prompt, layer): P with the vector minus P zero-shot."""
    return _by_layer(prompts, f"p_{name}", layers) - np.array(prompts["p_zero_shot"])[:, None]


def _by_layer(prompts: Mapping[str, Any], key: str, layers: Sequence[str]) -> np.ndarray:
    """(prompt, layer): the numbers of ``key``."""
    return np.array([prompts[key][layer] for layer in layers], dtype=np.float64).T


# --- files ---------------------------------------------------------------------------------------------------------

SUMMARY = File("summary.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _conclude(work: Work) -> str:
    best = work.read(STEP6_SUMMARY)
    numbers = conclusions(
        work.read(TOP_HEADS),
        work.read(CONTROLS_FILE),
        work.read(HEAD_STABILITY) if work.folder.has(HEAD_STABILITY) else None,
        {
            **_of_clean_prompts(work, best["best_layer"]),
            **caveat_numbers(work.read(TRIALS), work.read(STEP_E_EVAL)["reference"], work.read(ANSWERS)),
        },
        layer=best["best_layer"],
        score_key=best["score_key"],
    )
    document = {"q_id": work.q_id, **numbers}
    work.write(SUMMARY, json_bytes(document), content=document)
    return f"{work.name}: {in_short(document)}" if work.name else in_short(document)


def _of_clean_prompts(work: Work, layer: int) -> dict[str, Any]:
    """Numbers on whether the model can do the relation, and on what it answers right. Where scored tokens do not tell
    answers apart, the whole answers of answers.json decide what is right."""
    trials, whole = work.read(TRIALS), work.read(ANSWERS).get("clean_prompts")
    if whole:
        right = [max(row["begins"], row["exact"]) for row in whole]
        judged_by, majority = "whole_answers", majority_share(map(accepted_answers, trials.questions))
    else:
        right = work.read(STEP_E_EVAL)["reference"]["clean"]["right"]
        judged_by, majority = "scored_token", majority_accuracy(trials)
    deltas, heads = work.read(METRICS), heads_of(work.read(TOP_HEADS))
    return {
        "ability": ability_numbers(right, trials.clusters, majority, judged_by),
        "answered_right": answered_right(
            right,
            trials.clusters,
            deltas.of["p"][:, [deltas.heads.index(head) for head in heads]],
            heads,
            work.read(EVAL_TRIALS, layer),
            work.read(CONTROLS_FILE)["by_prompt"]["query_source_index"],
        ),
    }


STAGE = Stage(
    "summary",
    "What may be concluded, in numbers and in words.",
    _conclude,
    reads=(TRIALS, METRICS, TOP_HEADS, STEP_E_EVAL, EVAL_TRIALS, CONTROLS_FILE, STEP6_SUMMARY, ANSWERS, HEAD_STABILITY),
    writes=(SUMMARY,),
    extra=True,
    share=0.01,
)
