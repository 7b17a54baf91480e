"""The function vector: the output projection of the best heads' mean activations, summed (Todd et al. 2024, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relfv.errors import InputError
from relfv.models.architecture import Architecture
from relfv.types import FunctionVector, HeadId, MeanActivations, ScoredHead


def select_heads(ranked: Sequence[ScoredHead], k: int) -> list[ScoredHead]:
    """The first ``k`` of ranked heads. Raises InputError if there are fewer."""
    if not 1 <= k <= len(ranked):
        raise InputError(f"--k/--topk {k}: only {len(ranked)} heads were scored; expected 1 to {len(ranked)}")
    return list(ranked[:k])


def build_function_vector(arch: Architecture, means: MeanActivations, heads: Sequence[HeadId]) -> FunctionVector:
    """Sum over ``heads`` of W_O[layer][:, slice of head] @ mean activation, without the output bias.

    Summed in float64 and kept as float32 (resid_dim,), as a whole and split by layer.
    """
    by_layer: dict[int, torch.Tensor] = {}
    for head in sorted(heads):
        part = arch.project_head(head.layer, head.head, means.values[head.layer, head.head])
        by_layer[head.layer] = by_layer.get(head.layer, torch.zeros_like(part)) + part
    total = torch.stack(list(by_layer.values())).sum(0)
    return FunctionVector(
        total=total.float(),
        by_layer={layer: part.float() for layer, part in by_layer.items()},
        heads=tuple(heads),
    )
