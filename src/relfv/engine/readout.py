"""From final hidden states to the scores of one target token a prompt.

The vocabulary axis is by far the largest tensor of the sweep (25,600 rows x 128,256 tokens for an 8B model), so rows
go through it in chunks and only three numbers a row are kept. Logits and softmax are float32 whatever the model's
dtype: half-precision probabilities cannot resolve the effects that are measured here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relfv.engine.base import Backbone, Prompts, last_hidden, prompt_chunks
from relfv.types import TokenScores

_LOGIT_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Memory for one chunk's float32 logits and their temporaries."""


def read_targets(backbone: Backbone, hidden: torch.Tensor, targets: Sequence[int]) -> TokenScores:
    """Score ``targets[n]`` in every copy of prompt n.

    ``hidden`` is (N, C, resid_dim), final and normed; the result's fields are (N, C) on the CPU.
    """
    n_prompts, n_copies, width = hidden.shape
    rows = hidden.reshape(-1, width)
    wanted = torch.tensor(list(targets), device=hidden.device).repeat_interleave(n_copies)
    chunk = _rows_per_chunk(backbone)
    logit, logprob, top = [], [], []
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = backbone.arch.final_logits(backbone.arch.lm_head(rows[part].float())).float()
        target_logit = logits.gather(1, wanted[part, None])[:, 0]
        logit.append(target_logit)
        logprob.append(target_logit - logits.logsumexp(dim=1))
        top.append(logits.argmax(dim=1))
    shape = (n_prompts, n_copies)
    return TokenScores(
        logit=torch.cat(logit).cpu().view(shape),
        logprob=torch.cat(logprob).cpu().view(shape),
        top_id=torch.cat(top).cpu().view(shape),
    )


def score_prompts(backbone: Backbone, prompts: Prompts, targets: Sequence[int]) -> TokenScores:
    """Scores of each prompt's target without any intervention; every field is (N,)."""
    with backbone.running():
        return TokenScores.cat(
            [
                read_targets(backbone, last_hidden(backbone, prompts[part])[:, None], targets[part])[:, 0]
                for part in prompt_chunks(prompts, 32)
            ]
        )


def _rows_per_chunk(backbone: Backbone) -> int:
    vocabulary = int(backbone.arch.lm_head.weight.shape[0])  # type: ignore[union-attr]
    budget = _LOGIT_BYTES.get(backbone.device.type, _LOGIT_BYTES["cpu"])
    return max(1, budget // (vocabulary * 4 * 3))
