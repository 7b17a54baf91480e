"""From effects and their controls to what may be concluded, in numbers and in one sentence never stronger than they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from relfv.stats import LEVEL, Interval, clustered_mean, layer_chosen_by_others, share_of_gap
from relfv.types import Effects, TokenScores


def judge_candidates(
    effects: Effects,
    target_ids: Sequence[int],
    queries: Sequence[int],
    names: Sequence[str],
    clean: TokenScores,
    clean_queries: Sequence[int],
) -> dict[str, Any]:
    """``effects`` of every vector of ``names`` after every layer -> the numbers of controls.json.

    ``queries`` (prompt,) are the prompts' query rows, ``clean`` (trial,) the clean prompts' scores with theirs.
    """
    of_query = {query: clean.p.numpy()[np.asarray(clean_queries) == query].mean() for query in set(clean_queries)}
    by_prompt = {
        f"p_{name}": {str(layer): _finite_list(values) for layer, values in enumerate(of_name.T)}
        for name, of_name in _mean_p(effects, names).items()
    }
    return {
        **judge_vectors(effects, target_ids, queries, names),
        "by_prompt": {
            "query_source_index": list(queries),
            "p_zero_shot": effects.base.p.tolist(),
            "p_clean": [float(of_query[query]) for query in queries],
            **by_prompt,
        },
    }


def judge_vectors(
    effects: Effects, target_ids: Sequence[int], queries: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    """``effects`` of every vector of ``names`` after every layer -> accuracy, mean P, and the change of P with its interval.

    Vectors of one name are draws of one thing: numbers are means over them.
    """
    n_prompts, wanted = len(target_ids), np.asarray(target_ids)
    base, mean_p = effects.base.p.numpy(), _mean_p(effects, names)
    correct = effects.edited.top_id.numpy().reshape(n_prompts, -1, len(names)) == wanted[:, None, None]
    reached = effects.edited.p.numpy().reshape(correct.shape)
    per_layer: dict[str, dict[str, Any]] = {str(layer): {} for layer in range(correct.shape[1])}
    for name, of_name in mean_p.items():
        draws = [i for i, other in enumerate(names) if other == name]
        delta = clustered_mean(of_name - base[:, None], queries)
        for layer in range(correct.shape[1]):
            found = per_layer[str(layer)][name] = {
                "acc": float(correct[:, layer, draws].mean()),
                "mean_p": _finite(of_name[:, layer].mean()),
                "mean_delta_p": _finite(delta.mean[layer]),
                "ci_low": _finite(delta.low[layer]),
                "ci_high": _finite(delta.high[layer]),
            }
            if len(draws) > 1:
                found["mean_p_of_draws"] = _finite_list(reached[:, layer, draws].mean(0))
    return {
        "ci_level": LEVEL,
        "zero_shot": {"acc": float((effects.base.top_id.numpy() == wanted).mean()), "mean_p": float(base.mean())},
        "per_layer": per_layer,
    }


def _mean_p(effects: Effects, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> (prompt, layer): P with the vector, over the draws of that name."""
    reached = effects.edited.p.numpy()
    reached = reached.reshape(len(reached), -1, len(names))
    return {name: reached[:, :, [other == name for other in names]].mean(2) for name in dict.fromkeys(names)}


def conclusions(
    top_heads: dict[str, Any], controls: dict[str, Any], stability: dict[str, Any] | None
) -> dict[str, Any]:
    """From top_heads.json, controls.json and head_stability.json the numbers that the verdict rests on, and the verdict.

    The layer is the best by P of the vector itself, as in step6_all_layers_summary.json; ``layer_chosen_by_others``
    repeats the held-out result with each query's layer chosen on the other queries.
    """
    prompts = controls["by_prompt"]
    queries = prompts["query_source_index"]
    layers = list(controls["per_layer"])
    by_layer = {name: _by_layer(prompts, name, layers) for name in controls["meaning"]}
    best = int(by_layer["fv"].mean(0).argmax())
    zero, clean = np.array(prompts["p_zero_shot"]), np.array(prompts["p_clean"])

    def share(reached: np.ndarray) -> Interval | None:
        return None if np.isnan(reached).any() else share_of_gap(zero, clean, reached, queries)

    shares = {name: share(reached[:, best]) for name, reached in by_layer.items()}
    if "held_out" in by_layer:
        shares["held_out, layer_chosen_by_others"] = share(layer_chosen_by_others(by_layer["held_out"], queries))
    gap = clean.mean() - zero.mean()
    of_draws = {
        name: [(p - zero.mean()) / gap for p in numbers["mean_p_of_draws"]]
        for name, numbers in controls["per_layer"][layers[best]].items()
        if shares.get(name) and "mean_p_of_draws" in numbers
    }
    heads = top_heads["heads"]
    document: dict[str, Any] = {
        "verdict": "",
        "n_heads": len(heads),
        "n_heads_distinguishable": top_heads["meta"].get("n_distinguishable"),
        "half_overlap_of_top_heads": stability and stability["half_overlap"],
        "chance_overlap_of_top_heads": stability and stability["chance_overlap"],
        "n_eval": controls["n_eval"],
        "n_queries": controls["n_queries"],
        "layer": int(layers[best]),
        "p": {
            "zero_shot": float(zero.mean()),
            "clean": float(clean.mean()),
            **{name: _finite(reached[:, best].mean()) for name, reached in by_layer.items()},
        },
        "acc": {
            "zero_shot": controls["zero_shot"]["acc"],
            **{name: controls["per_layer"][layers[best]][name]["acc"] for name in by_layer},
        },
        "share_of_gap": {name: found and vars(found) for name, found in shares.items()},
        "share_of_gap_of_draws": of_draws,
        "ci_level": LEVEL,
    }
    document["verdict"] = _verdict(document)
    return document


def _by_layer(prompts: dict[str, Any], name: str, layers: Sequence[str]) -> np.ndarray:
    """(prompt, layer)"""
    return np.array([prompts[f"p_{name}"][layer] for layer in layers], dtype=np.float64).T


def _verdict(found: dict[str, Any]) -> str:
    """One to three sentences. What a number does not allow is not said."""
    return " ".join(part for part in (_of_heads(found), _of_vector(found), _of_controls(found)) if part)


def _of_heads(found: dict[str, Any]) -> str:
    n, called, overlap = found["n_heads"], found["n_heads_distinguishable"], found["half_overlap_of_top_heads"]
    if called is None:
        return ""
    words = f"{called} of the top {n} heads are distinguishable from noise"
    if overlap is not None:
        chance = found["chance_overlap_of_top_heads"]
        words += f"; two halves of the queries agree on {overlap:.0%} of them (by chance {chance:.0%})"
    return words + "."


def _of_vector(found: dict[str, Any]) -> str:
    p, share = found["p"], found["share_of_gap"]
    where = f"layer {found['layer']}, the best of all on these very prompts ({found['n_queries']} distinct queries)"
    if share["fv"] is None:
        if p["clean"] - p["zero_shot"] <= 0:
            return (
                f"Demos do not help this model here (P {p['zero_shot']:.2f} without them, {p['clean']:.2f} with): there is "
                "no gap for a function vector to close."
            )
        return (
            f"The gap between zero-shot (P {p['zero_shot']:.2f}) and clean prompts with demos ({p['clean']:.2f}) is too small "
            "or too uncertain to say what share of it the function vector closes."
        )
    words = (
        f"The function vector closes {_percent(share['fv'])} of the gap between zero-shot and clean prompts at {where}"
        f"{_unless_shown(share['fv'])}"
    )
    held_out = share.get("held_out, layer_chosen_by_others")
    if held_out:
        left_out = "with each query's own trials left out of means, ranking and choice of layer"
        words += f"; {_percent(held_out)} {left_out}{_unless_shown(held_out)}"
    return words + "."


def _unless_shown(share: dict[str, float]) -> str:
    return "" if share["low"] > 0 else ", so that it closes any of it is not shown"


def _of_controls(found: dict[str, Any]) -> str:
    share = found["share_of_gap"]
    parts = [
        f"{words} {_rounded(share[name]['value'])}"
        for name, words in (
            ("random_heads", "other heads' vectors"),
            ("random_heads_scaled", "the same stretched to its length"),
            ("random_direction", "random directions of its length"),
            ("mean_hidden", "the mean hidden state"),
        )
        if share.get(name)
    ]
    if not parts:
        return ""
    words = f"Controls at that layer: {', '.join(parts)}."
    rivals = [name for name in ("random_heads", "random_heads_scaled", "random_direction") if share.get(name)]
    highest = [max(share[name]["high"], *found["share_of_gap_of_draws"].get(name, [])) for name in rivals]
    if share["fv"] and any(reached >= share["fv"]["low"] for reached in highest):
        words += " A random control, or one draw of it, reaches the vector's interval: that the effect is the relation's own is not shown."
    return words


def _percent(share: dict[str, float]) -> str:
    return f"{_rounded(share['value'])} ({LEVEL:.0%} CI {_rounded(share['low'])} to {_rounded(share['high'])})"


def _rounded(share: float) -> str:
    return f"{round(100 * share) + 0}%"


def _finite(value: float) -> float | None:
    """None, which JSON has, for infinities and NaN, which it has not: an interval of one query, a vector that overflows."""
    return float(value) if np.isfinite(value) else None


def _finite_list(values: np.ndarray) -> list[float | None]:
    return [_finite(value) for value in values]
