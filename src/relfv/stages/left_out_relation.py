"""Leave one relation out: heads that the *other* relations' AIE chooses, with this relation's mean activations. Do they
carry it as well as its own heads do, and better than random heads?"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.stages.control_vectors import compared_layers, matched_draws
from relfv.stages.function_vector import build_function_vector
from relfv.stages.judging import Tried, best_layer, judge_vectors, mean_over_draws, n_as_good, p_of_draws
from relfv.stats import clustered_mean
from relfv.store.formats import finite
from relfv.types import Effects, HeadId, MeanActivations, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

MEANING = {
    "own": "the relation's own top heads, chosen by their effects on these very trials, which favours them",
    "others": "as many heads, the top by AIE over the other relations alone",
    "random": "heads drawn at random, as many of each layer as others has; mean over draws",
    "vector": "with this relation's clean means the function vector of each, times alpha, added to its zero-shot "
    "prompts: own and others after every layer, random after compared_layers",
    "in_place": "the heads themselves set to this relation's clean means, all in one pass, no vector added",
    "others_minus_own": "paired by prompt; of the vector at Step6's best layer, which is the own one's best",
    "n_draws_as_good": "draws whose mean P is no smaller than others', each at the best of compared_layers",
}
"""Name -> what it is."""


def leave_out(
    model: LanguageModel,
    prompts: Prompts,
    means: MeanActivations,
    own: Sequence[HeadId],
    others: Sequence[HeadId],
    swept: Sequence[HeadId],
    own_layer: int,
    alpha: float,
    *,
    seed: str,
) -> dict[str, Any]:
    """The numbers of one relation, left out: ``vector`` and ``in_place``. ``own_layer`` is Step6's best layer."""
    draws = matched_draws(swept, others, random.Random(f"relfv-left-out:{seed}"))
    sets, names = [own, others, *draws], ["own", "others", *["random"] * len(draws)]
    vectors = np.stack([build_function_vector(model.arch, means, heads).total for heads in sets])
    exact, compared = model.engine, compared_layers(model.arch.n_layers)
    brief = exact.over_likeliest_tokens()  # draws are many, and each has little weight
    layers = range(model.arch.n_layers)
    tried = [Tried(exact.inject(prompts, np.float32(alpha) * vectors[:2], layers), layers, names[:2])]
    together = [(exact.edit_together(prompts, _in_place(sets[:2], means)), names[:2])]
    if draws:
        added = brief.inject(prompts, np.float32(alpha) * vectors[2:], compared)
        tried.append(Tried(added, compared, names[2:]))
        together.append((brief.edit_together(prompts, _in_place(draws, means)), names[2:]))
    return {
        "compared_layers": compared,
        "n_draws": len(draws),
        "prompts_per_pass": [one.effects.per_pass for one in tried] + [effects.per_pass for effects, _ in together],
        "vector": judge_left_out(tried, prompts, compared, own_layer),
        "in_place": judge_in_place(together, prompts),
    }


def _in_place(sets: Sequence[Sequence[HeadId]], means: MeanActivations) -> list[Any]:
    import torch

    from relfv.engine.base import Together

    values = torch.from_numpy(means.values)[None]
    return [Together.setting([heads], values) for heads in sets]


def judge_left_out(tried: Sequence[Tried], prompts: Prompts, compared: Sequence[int], own_layer: int) -> dict[str, Any]:
    """The numbers of the vectors. The first of ``tried`` has own and others at every layer, the second, where there is
    one, the random draws at ``compared``."""
    judged = [judge_vectors(one.effects, prompts, one.names, one.layers) for one in tried]
    per_layer = judged[0]["per_layer"]
    for more in judged[1:]:
        for layer, numbers in more["per_layer"].items():
            per_layer[layer] |= numbers
    there = best_layer(tried[:1], "others", compared)
    reached = mean_over_draws(tried[0].effects, tried[0].names)
    as_good = 0
    if len(tried) > 1:
        draws = p_of_draws(tried[1:], "random", compared)
        as_good = n_as_good(draws, p_of_draws(tried[:1], "others", compared)[:, 0])
    return {
        "own_layer": own_layer,
        "others_layer": best_layer(tried[:1], "others", range(len(per_layer))),
        "compared_layer": there,
        "zero_shot": judged[0]["zero_shot"],
        "others_minus_own": _difference(reached["others"][:, own_layer], reached["own"][:, own_layer], prompts),
        "n_draws_as_good": as_good,
        "per_layer": per_layer,
    }


def judge_in_place(together: Sequence[tuple[Effects, Sequence[str]]], prompts: Prompts) -> dict[str, Any]:
    """The numbers of the heads put in place. The first of ``together`` (effects, names) has own and others, the second,
    where there is one, the random draws."""
    numbers: dict[str, Any] = {}
    for effects, names in together:
        numbers |= judge_vectors(effects, prompts, names)["per_layer"]["0"]
    reached = {name: p[:, 0] for name, p in mean_over_draws(*together[0]).items()}
    draws = np.array([numbers.get("random", {}).get("mean_p_of_draws", [])], float)
    return {
        "others_minus_own": _difference(reached["others"], reached["own"], prompts),
        "n_draws_as_good": n_as_good(draws, reached["others"].mean(0, keepdims=True)),
        **numbers,
    }


def _difference(others: np.ndarray, own: np.ndarray, prompts: Prompts) -> dict[str, float | None]:
    paired = clustered_mean(np.nan_to_num(others - own)[:, None], prompts.clusters)
    return _interval(paired.mean[0], paired.low[0], paired.high[0])


def _interval(mean: float, low: float, high: float) -> dict[str, float | None]:
    return {"mean": finite(mean), "ci_low": finite(low), "ci_high": finite(high)}


def over_targets(targets: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Over relations, each counting once: mean change in P with own, others' and random heads, and others minus own
    and minus random with Student's interval over relations; for the ``vector`` (own and others at the own one's best
    layer, random and what it is held against at the best of the compared layers for others) and ``in_place``."""
    found: dict[str, list[dict[str, float]]] = {"vector": [], "in_place": []}
    for target in targets:
        vector, placed = target["vector"], target["in_place"]
        at_own, compared = (vector["per_layer"][str(vector[f"{at}_layer"])] for at in ("own", "compared"))
        found["vector"].append(_row(at_own["own"], at_own["others"], compared["others"], compared.get("random")))
        found["in_place"].append(_row(placed["own"], placed["others"], placed["others"], placed.get("random")))
    return {kind: _means(rows) for kind, rows in found.items()}


def _row(own: Any, others: Any, beside_random: Any, drawn: Any) -> dict[str, float]:
    """Changes in P; NaN where there is none."""
    own, others, beside, drawn = (
        np.nan if one is None or one["mean_delta_p"] is None else one["mean_delta_p"]
        for one in (own, others, beside_random, drawn)
    )
    return {
        "own": own,
        "others": others,
        "random": drawn,
        "others_minus_own": others - own,
        "others_minus_random": beside - drawn,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    means: dict[str, Any] = {"n_relations": len(rows)}
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
        mean = clustered_mean(values[:, None], range(len(values)))
        means[name] = _interval(mean.mean[0], mean.low[0], mean.high[0])
    return means
