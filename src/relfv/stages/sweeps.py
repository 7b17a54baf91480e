"""Other strengths and other numbers of heads than the spec's, on request: how much hangs on ``alpha`` and ``k``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from relfv.models.architecture import Architecture
from relfv.stages.function_vector import build_function_vector, select_heads
from relfv.types import MeanActivations, ScoredHead

CAUTION = (
    "The best of several alphas, k and layers on the same prompts is better than it would be on new ones; a choice made here has "
    "to be tested on other prompts."
)


def sweep_vectors(
    arch: Architecture,
    means: MeanActivations,
    ranked: Sequence[ScoredHead],
    *,
    topk: int,
    alpha: float,
    alphas: Sequence[float],
    ks: Sequence[int],
) -> torch.Tensor:
    """float32 (alphas then ks, resid_dim), ready to be added: the ``topk`` heads' vector at each of ``alphas``, then the
    vector of each of ``ks`` best heads at ``alpha``. Raises InputError for a k of more heads than were scored."""
    of_k = {k: build_function_vector(arch, means, [h.id for h in select_heads(ranked, k)]).total for k in {topk, *ks}}
    return torch.stack([*(a * of_k[topk] for a in alphas), *(alpha * of_k[k] for k in ks)])


def tabulate(
    per_layer: dict[str, dict[str, Any]], names: Sequence[str], values: Sequence[float], vectors: torch.Tensor
) -> list[dict[str, Any]]:
    """One entry for each of ``values``: its vector's length as added, its best layer by P, and its numbers at every layer.

    ``per_layer`` are the numbers by layer and name; ``names`` and ``vectors`` (value, resid_dim) go with ``values``.
    """
    entries = []
    for name, value, vector in zip(names, values, vectors, strict=True):
        own = {layer: numbers[name] for layer, numbers in per_layer.items()}
        layer = max(own, key=lambda layer: own[layer]["mean_p"] or 0.0)  # None: the vector overflows
        entries.append(
            {
                "value": value,
                "norm_added": float(vector.double().norm()),
                "best_layer": int(layer),
                **{key: own[layer][key] for key in ("acc", "mean_p")},
                "per_layer": own,
            }
        )
    return entries
