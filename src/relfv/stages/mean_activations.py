"""Mean clean activation of every attention head (Todd et al. 2024, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relfv.engine.base import capture_heads
from relfv.engine.language_model import LanguageModel
from relfv.types import MeanActivations

_PROMPTS_A_PASS = 25


def mean_head_activations(model: LanguageModel, clean_prompts: Sequence[str]) -> MeanActivations:
    """Mean over ``clean_prompts`` of z[layer, head] at the last token, in the precision of the sweep.

    Summed in float64, so that the order of the prompts does not matter to any digit that is kept.
    """
    ids = [model.tokens.encode(prompt) for prompt in clean_prompts]
    arch = model.arch
    total = torch.zeros(arch.n_layers, arch.n_heads, arch.head_dim, dtype=torch.float64)
    with model.backbone.running():
        for part in model.backbone.passes(ids, _PROMPTS_A_PASS):
            activations, _ = capture_heads(model.backbone, ids[part])
            total += activations.double().sum(0)
    return MeanActivations(values=(total / len(ids)).float(), n_prompts=len(ids))
