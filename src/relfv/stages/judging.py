"""Numbers from the effects of several vectors at every layer: accuracy, mean P, and the change of P with its
interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.stats import LEVEL, clustered_mean
from relfv.store.formats import finite
from relfv.types import Effects, Prompts, TokenScores, WordPair

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun


@dataclass(frozen=True)
class Tried:
    """Effects of vectors added to some prompts after some layers."""

    effects: Effects
    """Scores without and with the vectors: ``edited`` is (prompt, layer * vector)."""
    layers: Sequence[int]
    names: Sequence[str]
    """Name of each vector; several draws share one name."""

    def beside(self, more: Tried) -> Tried:
        """These vectors together with ``more`` that were added after the same layers."""
        import torch

        def joined(field: str) -> torch.Tensor:
            parts = (by_layer(getattr(some.effects.edited, field), some.names) for some in (self, more))
            return torch.cat([*parts], dim=2).flatten(1)

        edited = TokenScores(joined("logit"), joined("logprob"), joined("top_id"))
        return Tried(replace(self.effects, edited=edited), self.layers, [*self.names, *more.names])


def n_as_good(draws: np.ndarray, own: np.ndarray) -> int:
    """How many of ``draws``, mean P (layer, draw), are not known to do worse than ``own`` (layer,), each at its best
    layer."""
    return int((~(draws.max(0) < np.nanmax(own))).sum())


def p_of_draws(tried: Sequence[Tried], name: str, layers: Sequence[int]) -> np.ndarray:
    """(layer, draw): mean P with each vector of ``name`` after ``layers``."""
    some = next(some for some in tried if name in some.names)
    reached = by_layer(some.effects.edited.measure("p"), some.names).mean(0)
    columns = [other == name for other in some.names]
    return reached[[[*some.layers].index(layer) for layer in layers]][:, columns]


def judge_vectors(
    effects: Effects, prompts: Prompts, names: Sequence[str], layers: Iterable[int] = ()
) -> dict[str, Any]:
    """``effects`` of every vector of ``names`` after each of ``layers``, or all -> ``ci_level``, ``zero_shot`` and
    ``per_layer``.

    Vectors of one name are draws of one thing: numbers are means over them. None stands for what is not finite.
    """
    base = effects.base.measure("p")
    correct = by_layer(effects.edited.correct(prompts.right), names)
    # Sum over prompts in one order for all vectors, so that a vector drawn twice gives the same mean twice.
    reached = by_layer(effects.edited.measure("p"), names).mean(0)
    at = [str(layer) for layer in layers or range(correct.shape[1])]
    per_layer: dict[str, dict[str, Any]] = {layer: {} for layer in at}
    for name, of_name in mean_over_draws(effects, names).items():
        draws = [i for i, other in enumerate(names) if other == name]
        delta = clustered_mean(of_name - base[:, None], prompts.clusters)
        for layer in range(len(at)):
            numbers = per_layer[at[layer]][name] = {
                "acc": float(correct[:, layer, draws].mean()),
                "mean_p": finite(reached[layer, draws].mean()),
                "mean_delta_p": finite(delta.mean[layer]),
                "ci_low": finite(delta.low[layer]),
                "ci_high": finite(delta.high[layer]),
            }
            if len(draws) > 1:
                numbers["mean_p_of_draws"] = [finite(p) for p in reached[layer, draws]]
    zero_shot = {"acc": float(effects.base.correct(prompts.right).mean()), "mean_p": float(base.mean())}
    return {"ci_level": LEVEL, "zero_shot": zero_shot, "per_layer": per_layer}


def judge_candidates(
    tried: Sequence[Tried],
    prompts: Prompts,
    asked: Sequence[WordPair],
    clean: CleanRun,
    asked_clean: Sequence[WordPair],
    measure: str = "p",
) -> dict[str, Any]:
    """The numbers of controls.json. The first of ``tried`` has every layer, and the untouched prompts' scores.

    ``clean`` are the clean prompts' scores; ``asked`` and ``asked_clean`` are the rows, input and answer, that prompts
    and clean prompts ask. A prompt's reference is the mean of the clean prompts that ask the same. ``measure`` is what
    layers are compared by: prompt by prompt it is kept beside P.
    """
    p_clean: dict[WordPair, list[float]] = defaultdict(list)
    for pair, p in zip(asked_clean, clean.scores.measure("p").tolist(), strict=True):
        p_clean[pair].append(p)
    by_prompt = {
        f"{m}_{name}": {
            str(layer): [finite(value) for value in values]
            for layer, values in zip(some.layers, of_name.T, strict=True)
        }
        for m in dict.fromkeys(("p", measure))
        for some in tried
        for name, of_name in mean_over_draws(some.effects, some.names, m).items()
    }
    judged = [judge_vectors(some.effects, prompts, some.names, some.layers) for some in tried]
    for more in judged[1:]:
        for layer, numbers in more["per_layer"].items():
            judged[0]["per_layer"][layer] |= numbers
    return {
        **judged[0],
        "by_prompt": {
            "query_source_index": list(prompts.clusters),
            "p_zero_shot": tried[0].effects.base.measure("p").tolist(),
            "p_clean": [float(np.mean(p_clean[pair])) for pair in asked],
            **by_prompt,
        },
    }


def best_layer(tried: Sequence[Tried], name: str, layers: Sequence[int]) -> int:
    """The layer, of ``layers``, after which the vector of ``name`` reaches the largest mean P."""
    reached = np.nan_to_num(p_of_draws(tried, name, layers).mean(1))
    return max(zip(reached, layers, strict=True), key=lambda one: (one[0], -one[1]))[1]


def mean_over_draws(effects: Effects, names: Sequence[str], measure: str = "p") -> dict[str, np.ndarray]:
    """Name -> (prompt, layer): ``measure`` with the vector, over the draws of that name."""
    reached = by_layer(effects.edited.measure(measure), names)
    return {name: reached[:, :, [other == name for other in names]].mean(2) for name in dict.fromkeys(names)}


def by_layer(values: Any, names: Sequence[str]) -> Any:
    """Reshape ``values`` (prompt, layer * vector) -> (prompt, layer, vector)."""
    return values.reshape(len(values), -1, len(names))
