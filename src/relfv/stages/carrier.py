"""Numbers for summary.json on what carries the relation: the heads put in place, the vector as written, the vector's
length beside the hidden state's; and the verdict's sentences on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from relfv.shares import Gap, Share
from relfv.words import percent, with_interval

SHORT = 0.05
"""Share of the hidden state's length: if a vector is a smaller one, the verdict says so."""
NOTHING = 0.05
"""Share of the gap: a vector or heads whose mean share is surely smaller do nothing."""


def carrier_numbers(
    controls: Mapping[str, Any], layer: int, gap: Gap, effects: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Numbers from controls.json and the ``effects`` (prompt, layer) of its vectors on P at its ``compared_layers``.
    ``share_of_hidden`` is the length of what is added divided by the hidden state's, at the ``layer`` that the verdict
    speaks of; ``carriers`` has P, accuracy and share of the gap of each edit at once, and of the vector as written at
    its own best layer."""
    at_once, written, zero = controls["at_once"], controls["as_written"], controls["by_prompt"]["p_zero_shot"]

    def share_of(name: str) -> Share | None:
        reached = np.array(at_once["by_prompt"][name], dtype=np.float64)
        return gap.share((reached - np.array(zero))[:, None], 0)

    carriers = {
        name: _carrier(numbers, share_of(name), controls["by_prompt"]) for name, numbers in at_once["numbers"].items()
    }
    if "as_written" in effects:
        carriers |= _as_written(controls, gap, effects)
    shares = {
        at: controls["mean_norm_added"]["fv"] / hidden for at, hidden in controls["mean_norm_hidden"].items() if hidden
    }
    return {
        "share_of_hidden": shares.get(str(layer)),
        "share_of_hidden_at_the_median_layer": float(np.median([*shares.values()])) if shares else None,
        "notes": controls["notes"],
        "fv_is_as_written": written["same_as_fv"] if written["known"] else None,
        "carriers": carriers,
    }


def _as_written(controls: Mapping[str, Any], gap: Gap, effects: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Numbers of the vector as written at the layer where it is best; held out, at the layer that is best for the other
    queries."""
    layers = [str(layer) for layer in controls.get("compared_layers", controls["per_layer"])]
    best = int(np.nan_to_num(effects["as_written"].mean(0)).argmax())
    shares = {"as_written": gap.share(effects["as_written"], best)}
    at_best, prompts = controls["per_layer"][layers[best]], controls["by_prompt"]
    if "random_heads_as_written" in at_best:
        reached = np.array(prompts["p_random_heads_as_written"][layers[best]], dtype=np.float64)
        shares["random_heads_as_written"] = gap.share((reached - np.array(prompts["p_zero_shot"]))[:, None], 0)
    found = {
        name: {"layer": int(layers[best]), **_carrier(at_best[name], share, controls["by_prompt"])}
        for name, share in shares.items()
    }
    if "as_written_held_out" in effects:
        held_out = effects["as_written_held_out"]
        share = gap.share_with_layer_chosen_by_others(held_out, held_out)
        found["as_written_held_out, layer_chosen_by_others"] = {"share_of_gap": share and vars(share)}
    return found


def _carrier(numbers: Mapping[str, Any], share: Share | None, prompts: Mapping[str, Any]) -> dict[str, Any]:
    zero, clean = np.mean(prompts["p_zero_shot"]), np.mean(prompts["p_clean"])
    draws = numbers.get("mean_p_of_draws", []) if share else []
    return {
        "p": numbers["mean_p"],
        "acc": numbers["acc"],
        "share_of_gap": share and vars(share),
        "share_of_gap_of_draws": [float((p - zero) / (clean - zero)) for p in draws if p is not None],
    }


# --- sentences -------------------------------------------------------------------------------------------------------


def carrier_sentences(numbers: Mapping[str, Any]) -> str:
    """Sentences of the verdict on the heads and on other carriers than the vector as defined. Empty where there is no
    share of a gap to speak of."""
    fv = numbers["share_of_gap"].get("fv")
    if not fv:
        return ""
    parts = [_length(numbers), _heads(numbers["carriers"]), _conclusion(numbers, fv), _written(numbers["carriers"])]
    return " ".join(part for part in parts if part)


def heads_in_short(numbers: Mapping[str, Any]) -> str:
    """Sentence on heads that carry more of the relation than the vector does; empty where that is not shown."""
    share, fv = _in_place(numbers["carriers"])[0], numbers["share_of_gap"]["fv"]
    if not share or not fv or not _is_more(share, fv) or _random_heads_reach(numbers["carriers"], share):
        return ""
    return f"Its heads put in place close {with_interval(share)}: they carry more of the relation than the vector."


def _length(numbers: Mapping[str, Any]) -> str:
    there, median = numbers["share_of_hidden"], numbers["share_of_hidden_at_the_median_layer"]
    if there is None or min(there, median) >= SHORT:
        return ""
    return (
        f"What is added is {100 * there:.2g}% as long as the hidden state there, "
        f"{100 * median:.2g}% at the median layer."
    )


def _heads(carriers: Mapping[str, Any]) -> str:
    """Sentence on what the heads themselves do when put in place."""
    share, held_out = _in_place(carriers)
    if not share:
        return ""
    how = "their mean activations instead of a vector, held out" if held_out else "their mean activations, no vector"
    words = f"The heads themselves put in place ({how}) close {with_interval(share)} of the gap"
    rival = carriers.get("random_heads_in_place")
    return words + (f", random heads of the same layers {_share(rival)}." if rival and rival["share_of_gap"] else ".")


def _conclusion(numbers: Mapping[str, Any], fv: Mapping[str, float]) -> str:
    """Sentence on what it means that the heads do better than the vector, or that neither does anything."""
    carriers = numbers["carriers"]
    share, _ = _in_place(carriers)
    if not share or not _is_more(share, fv):
        none = share and max(share["high_of_mean"], fv["high_of_mean"]) < NOTHING
        return "So neither the vector nor its heads carry the relation here." if none else ""
    if _random_heads_reach(carriers, share):
        return "Random heads put in place may do as much: that these heads carry the relation is not shown."
    between = numbers["fv_is_as_written"] is False
    where = "in this family, which norms or scales what attention writes" if between else "here"
    return (
        "So the heads carry more of the relation than the vector: as defined, and of this length, it is the wrong "
        f"carrier {where} (--alpha_sweep_relative tries other lengths)."
    )


def _is_more(share: Mapping[str, float], fv: Mapping[str, float]) -> bool:
    return share["low"] > max(fv["high"], NOTHING)


def _random_heads_reach(carriers: Mapping[str, Any], share: Mapping[str, float]) -> bool:
    return bool(_highest(carriers.get("random_heads_in_place")) >= share["low"])


def _written(carriers: Mapping[str, Any]) -> str:
    """Sentence on the vector as written, where it differs from the vector as defined."""
    own = carriers.get("as_written")
    if not own or not own["share_of_gap"]:
        return ""
    held_out = carriers.get("as_written_held_out, layer_chosen_by_others") or {"share_of_gap": None}
    by_layer = carriers.get("as_written_by_layer_held_out") or carriers["as_written_by_layer"]
    rival = carriers.get("random_heads_as_written")
    words = f"What they really write, added at layer {own['layer']}, closes {with_interval(own['share_of_gap'])}"
    if held_out["share_of_gap"]:
        words += f" ({_share(held_out)} held out)"
    words += f"; each layer's part at its own layer {_share(by_layer)}"
    if rival and rival["share_of_gap"]:
        words += f"; what random heads write {_share(rival)}"
        if _highest(rival) >= own["share_of_gap"]["low"]:
            words += ", which reaches the former's interval"
    return words + "."


def _in_place(carriers: Mapping[str, Any]) -> tuple[dict[str, float] | None, bool]:
    """The share of the gap that the heads put in place close, and whether it is held out."""
    held_out = carriers.get("heads_in_place_held_out")
    chosen = held_out or carriers.get("heads_in_place") or {"share_of_gap": None}
    return chosen["share_of_gap"], held_out is not None


def _highest(rival: Mapping[str, Any] | None) -> float:
    """The share of the gap that a random control may reach: the upper end of its interval, or its best draw."""
    if not rival or not rival["share_of_gap"]:
        return -np.inf
    return max([rival["share_of_gap"]["high"], *rival["share_of_gap_of_draws"]])


def _share(carrier: Mapping[str, Any]) -> str:
    share = carrier["share_of_gap"]
    return percent(share["value"]) if share else "an unknown share"
