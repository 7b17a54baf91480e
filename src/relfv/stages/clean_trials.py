"""One pass over the clean prompts, and what is kept of it: every stage that needs them has the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from relfv.engine.base import Backbone, TokenIds, capture_heads, reading_blocks
from relfv.engine.memory import shrinking
from relfv.engine.readout import read_targets
from relfv.language_model import LanguageModel
from relfv.types import MeanActivations, TokenScores

_PROMPTS_A_PASS = 25


@dataclass(frozen=True)
class CleanTrials:
    """What the model does with the clean prompts, in the precision of the sweep."""

    activations: torch.Tensor
    """float32 (trial, layer, head, head_dim): z at the last token."""
    hidden: torch.Tensor
    """float32 (layer, resid_dim): mean hidden state after each block, last token."""
    scores: TokenScores
    """(trial,): the target after the clean prompt."""

    def means(self) -> MeanActivations:
        """Mean over trials of z[layer, head] at the last token (Todd et al. 2024, eq. 2).

        Summed in float64, so that the order of the prompts does not matter to any digit that is kept.
        """
        return MeanActivations(self.activations.double().mean(0).float(), n_prompts=len(self.activations))


def run_clean_trials(model: LanguageModel, clean_prompts: Sequence[str], target_ids: Sequence[int]) -> CleanTrials:
    """Run the clean prompts once and keep what later stages need of them."""
    ids = [model.tokens.encode(prompt) for prompt in clean_prompts]
    with model.backbone.running():
        return shrinking(_PROMPTS_A_PASS, lambda size: _run(model.backbone, ids, target_ids, size))[0]


def _run(backbone: Backbone, ids: TokenIds, target_ids: Sequence[int], size: int) -> CleanTrials:
    activations, hidden, scores = [], [], []
    for part in backbone.passes(ids, size):
        with reading_blocks(backbone, ids[part]) as blocks:
            z, final = capture_heads(backbone, ids[part])
        activations.append(z)
        hidden.append(torch.stack([blocks[layer] for layer in range(backbone.arch.n_layers)]).cpu())
        scores.append(read_targets(backbone, final[:, None], target_ids[part])[:, 0])
    mean_hidden = torch.cat(hidden, dim=1).double().mean(1).float()
    return CleanTrials(torch.cat(activations), mean_hidden, TokenScores.cat(scores))
