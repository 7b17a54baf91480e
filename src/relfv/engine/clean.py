"""One pass over prompts without interventions, and what is kept of it: all stages that need it use the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from relfv.engine.base import Backbone
from relfv.engine.memory import shrinking
from relfv.engine.passes import capture_heads, reading_blocks
from relfv.engine.readout import joined, read_targets
from relfv.engine.writing import Writing, WritingRecorder
from relfv.types import HeadId, Prompts, TokenScores

_PROMPTS_A_PASS = 25


@dataclass(frozen=True)
class CleanRun:
    """Values read in one pass without interventions, in the precision of the head sweep."""

    activations: torch.Tensor
    """float32 (prompt, layer, head, head_dim): z at the last token."""
    hidden: torch.Tensor
    """float32 (layer, resid_dim): mean over prompts of the hidden state after each block, last token."""
    writing: Writing | None
    """Steps between W_O z and the residual stream; None where they are not known (writing_check.py)."""
    scores: TokenScores
    """(prompt,): scores of the target after the prompt."""

    def of_heads(self, heads: Sequence[HeadId], *, written: bool = False) -> torch.Tensor:
        """float64 (prompt, head, head_dim): z of some heads, or, where that is known, what is ``written`` of it."""
        layers = [head.layer for head in heads]
        z = self.activations[:, layers, [head.head for head in heads]].double()
        return self.writing.factors[:, layers, None] * z if written and self.writing else z

    @cached_property
    def written(self) -> torch.Tensor:
        """float64 (prompt, layer, head, head_dim): z times the factor of that prompt, where ``writing`` is known."""
        assert self.writing
        return self.writing.factors[..., None, None] * self.activations


def run_clean(backbone: Backbone, prompts: Prompts) -> CleanRun:
    """Run ``prompts`` once and keep what later stages need. Raises RunError if memory is too small for one prompt."""
    with backbone.running():
        return shrinking(_PROMPTS_A_PASS, lambda size: _run(backbone, prompts, size))[0]


def _run(backbone: Backbone, prompts: Prompts, size: int) -> CleanRun:
    activations, hidden, scores, recorder = [], [], [], WritingRecorder(backbone)
    for part in backbone.passes(prompts.ids, size):
        some = prompts[part]
        with reading_blocks(backbone, some.ids) as blocks, recorder.reading(some.ids):
            z, final = capture_heads(backbone, some.ids)
        activations.append(z)
        hidden.append(torch.stack([blocks[layer] for layer in range(backbone.arch.n_layers)]))
        scores.append(read_targets(backbone, final[:, None], some.targets)[:, 0])
    of_prompts = torch.cat(hidden, dim=1)
    of_prompts = of_prompts if of_prompts.is_cuda else of_prompts.cpu()  # not every device has float64
    return CleanRun(
        activations=torch.cat(activations),
        hidden=of_prompts.double().mean(1).float().cpu(),
        writing=recorder.result(),
        scores=joined(scores),
    )
