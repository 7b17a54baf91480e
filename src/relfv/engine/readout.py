"""Turning final hidden states into the scores of one target token for each prompt.

The vocabulary axis is by far the largest tensor of a head sweep (25,600 rows x 128,256 tokens for an 8B model), so rows
go through it in chunks and only three numbers a row are kept. Logits and softmax are float32 whatever the model's
dtype: half-precision probabilities cannot resolve the effects that are measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from relfv.engine.arithmetic import Likeliest
from relfv.engine.base import Backbone, sent
from relfv.types import TokenScores


def read_targets(backbone: Backbone, hidden: torch.Tensor, targets: Sequence[int]) -> TokenScores:
    """Score ``targets[n]`` in every copy of prompt n.

    ``hidden`` is (N, C, resid_dim), final and normed; the result's fields are (N, C) on the CPU.
    """
    return on_the_way(scores_of(backbone, hidden, targets))()


def scores_of(
    backbone: Backbone, hidden: torch.Tensor, targets: Sequence[int], likeliest: Likeliest | None = None
) -> TokenScores:
    """Score as ``read_targets`` does, on the device and without waiting for it; ``likeliest`` as in
    ``Arithmetic.read_out``."""
    logit, logprob, top = backbone.arithmetic.read_out(hidden, sent(list(targets), hidden.device), likeliest)
    return TokenScores(logit=logit, logprob=logprob, top_id=top)


def on_the_way(scores: TokenScores) -> Callable[[], TokenScores]:
    """Send ``scores`` to the CPU: -> a function that gives them once they are there, however much is queued on the
    device after them."""
    there = sent_back(scores.logit, scores.logprob, scores.top_id)
    return lambda: TokenScores(*there())


def sent_back(*tensors: torch.Tensor) -> Callable[[], Sequence[torch.Tensor]]:
    """Send ``tensors`` of one device to the CPU: -> a function that gives them once they are there."""
    device = tensors[0].device
    copies = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
    there = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def arrived() -> Sequence[torch.Tensor]:
        if there:
            there.synchronize()
        return copies

    return arrived


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """``parts`` one after the other along the first axis."""
    return TokenScores(
        logit=torch.cat([part.logit for part in parts]),
        logprob=torch.cat([part.logprob for part in parts]),
        top_id=torch.cat([part.top_id for part in parts]),
    )


def logprobs(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token after each of a few final, normed hidden states (R, resid_dim): float32 (R, V)."""
    arch = backbone.arch
    return arch.final_logits(arch.lm_head(hidden.float()).float()).log_softmax(-1)
