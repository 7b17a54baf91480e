"""What may be concluded of a q_id, in numbers and in one verdict that is never stronger than they are: summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relfv.stages.carrier import carrier_numbers, carrier_sentences
from relfv.stages.controls import CONTROLS, CONTROLS_FILE
from relfv.stages.function_vector import TOP_HEADS
from relfv.stages.head_stability import HEAD_STABILITY
from relfv.stages.stage import Stage, Work
from relfv.stats import LEVEL, Interval, layer_chosen_by_others, share_of_gap
from relfv.store.folder import File
from relfv.store.formats import finite, json_bytes, read_json

_HELD_OUT = "held_out, layer_chosen_by_others"


def conclusions(
    top_heads: Mapping[str, Any], controls: Mapping[str, Any], stability: Mapping[str, Any] | None
) -> dict[str, Any]:
    """From top_heads.json, controls.json and head_stability.json the numbers that the verdict rests on, and the
    verdict.

    The layer is the best by P of the vector itself, as in step6_all_layers_summary.json; ``layer_chosen_by_others``
    repeats the held-out result with each query's layer chosen on the other queries.
    """
    prompts, layers = controls["by_prompt"], list(controls["per_layer"])
    by_layer = {name: _by_layer(prompts, name, layers) for name in controls["meaning"]}
    best = int(by_layer["fv"].mean(0).argmax())
    at_best = controls["per_layer"][layers[best]]
    zero, clean = np.array(prompts["p_zero_shot"]), np.array(prompts["p_clean"])
    shares = _shares(prompts, by_layer, best)
    gap = clean.mean() - zero.mean()
    of_draws = {
        name: [(p - zero.mean()) / gap for p in numbers["mean_p_of_draws"]]
        for name, numbers in at_best.items()
        if shares.get(name) and "mean_p_of_draws" in numbers
    }
    document: dict[str, Any] = {
        "verdict": "",
        "n_heads": len(top_heads["heads"]),
        "n_heads_distinguishable": top_heads["meta"].get("n_distinguishable"),
        "half_overlap_of_top_heads": stability and stability["half_overlap"],
        "chance_overlap_of_top_heads": stability and stability["chance_overlap"],
        "n_eval": controls["n_eval"],
        "n_queries": controls["n_queries"],
        "layer": int(layers[best]),
        "p": {
            "zero_shot": float(zero.mean()),
            "clean": float(clean.mean()),
            **{name: finite(reached[:, best].mean()) for name, reached in by_layer.items()},
        },
        "acc": {"zero_shot": controls["zero_shot"]["acc"], **{name: at_best[name]["acc"] for name in by_layer}},
        "share_of_gap": {name: share and vars(share) for name, share in shares.items()},
        "share_of_gap_of_draws": of_draws,
        "ci_level": LEVEL,
        **carrier_numbers(controls, int(layers[best])),
    }
    document["verdict"] = _verdict(document)
    return document


def _shares(prompts: Mapping[str, Any], by_layer: Mapping[str, np.ndarray], best: int) -> dict[str, Interval | None]:
    """What share of the gap between zero-shot and clean prompts each vector closes at the ``best`` layer."""
    zero, clean, queries = np.array(prompts["p_zero_shot"]), np.array(prompts["p_clean"]), prompts["query_source_index"]

    def share(reached: np.ndarray) -> Interval | None:
        return None if np.isnan(reached).any() else share_of_gap(zero, clean, reached, queries)

    shares = {name: share(reached[:, best]) for name, reached in by_layer.items()}
    if "held_out" in by_layer:
        shares[_HELD_OUT] = share(layer_chosen_by_others(by_layer["held_out"], queries))
    return shares


def _by_layer(prompts: Mapping[str, Any], name: str, layers: Sequence[str]) -> np.ndarray:
    """(prompt, layer)"""
    return np.array([prompts[f"p_{name}"][layer] for layer in layers], dtype=np.float64).T


def _verdict(numbers: Mapping[str, Any]) -> str:
    """A few sentences. What a number does not allow is not said."""
    parts = (_of_heads(numbers), _of_vector(numbers), _of_controls(numbers), carrier_sentences(numbers))
    return " ".join(part for part in parts if part)


def _of_heads(numbers: Mapping[str, Any]) -> str:
    n, called, overlap = numbers["n_heads"], numbers["n_heads_distinguishable"], numbers["half_overlap_of_top_heads"]
    if called is None:
        return ""
    words = f"{called} of the top {n} heads are distinguishable from noise"
    if overlap is not None:
        chance = numbers["chance_overlap_of_top_heads"]
        words += f"; two halves of the queries agree on {overlap:.0%} of them (by chance {chance:.0%})"
    return words + "."


def _of_vector(numbers: Mapping[str, Any]) -> str:
    p, share = numbers["p"], numbers["share_of_gap"]
    where = f"layer {numbers['layer']}, the best of all on these very prompts ({numbers['n_queries']} distinct queries)"
    if share["fv"] is None:
        if p["clean"] - p["zero_shot"] <= 0:
            return (
                f"Demos do not help this model here (P {p['zero_shot']:.2f} without them, {p['clean']:.2f} with): "
                "there is no gap for a function vector to close."
            )
        return (
            f"The gap between zero-shot (P {p['zero_shot']:.2f}) and clean prompts with demos ({p['clean']:.2f}) is "
            "too small or too uncertain to say what share of it the function vector closes."
        )
    words = (
        f"The function vector closes {_percent(share['fv'])} of the gap between zero-shot and clean prompts at {where}"
        f"{_unless_shown(share['fv'])}"
    )
    held_out = share.get(_HELD_OUT)
    if held_out:
        left_out = "with each query's own trials left out of means, ranking and choice of layer"
        words += f"; {_percent(held_out)} {left_out}{_unless_shown(held_out)}"
    return words + "."


def _unless_shown(share: Mapping[str, float]) -> str:
    return "" if share["low"] > 0 else ", so that it closes any of it is not shown"


def _of_controls(numbers: Mapping[str, Any]) -> str:
    share = numbers["share_of_gap"]
    parts = [
        f"{control.in_verdict} {_rounded(share[name]['value'])}"
        for name, control in CONTROLS.items()
        if control.in_verdict and share.get(name)
    ]
    if not parts:
        return ""
    words = f"Controls at that layer: {', '.join(parts)}."
    rivals = [name for name, control in CONTROLS.items() if control.rival and share.get(name)]
    highest = [max([share[name]["high"], *numbers["share_of_gap_of_draws"].get(name, [])]) for name in rivals]
    if share["fv"] and any(reached >= share["fv"]["low"] for reached in highest):
        words += (
            " A random control, or one draw of it, reaches the vector's interval: that the effect is the relation's "
            "own is not shown."
        )
    return words


def _percent(share: Mapping[str, float]) -> str:
    return f"{_rounded(share['value'])} ({LEVEL:.0%} CI {_rounded(share['low'])} to {_rounded(share['high'])})"


def _rounded(share: float) -> str:
    return f"{round(100 * share) + 0}%"


# --- files ---------------------------------------------------------------------------------------------------------

SUMMARY = File("summary.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _conclude(work: Work) -> str:
    stability = work.read(HEAD_STABILITY) if work.folder.has(HEAD_STABILITY) else None
    numbers = conclusions(work.read(TOP_HEADS), work.read(CONTROLS_FILE), stability)
    document = {"q_id": work.q_id, **numbers}
    work.write(SUMMARY, json_bytes(document), content=document)
    return document["verdict"]


STAGE = Stage(
    "summary",
    "What may be concluded, in numbers and in words.",
    _conclude,
    reads=(TOP_HEADS, CONTROLS_FILE, HEAD_STABILITY),
    writes=(SUMMARY,),
)
