"""From final hidden states to the scores of one target token a prompt.

The vocabulary axis is by far the largest tensor of the sweep (25,600 rows x 128,256 tokens for an 8B model), so rows
go through it in chunks and only three numbers a row are kept. Logits and softmax are float32 whatever the model's
dtype: half-precision probabilities cannot resolve the effects that are measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from relfv.engine.arithmetic import kernels
from relfv.engine.arithmetic.products import Differences, product, takes_bf16
from relfv.engine.base import Backbone, TokenIds, last_hidden
from relfv.types import TokenScores

_LOGIT_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Memory for one chunk's float32 logits and their temporaries."""


def read_targets(backbone: Backbone, hidden: torch.Tensor, targets: Sequence[int]) -> TokenScores:
    """Score ``targets[n]`` in every copy of prompt n.

    ``hidden`` is (N, C, resid_dim), final and normed; the result's fields are (N, C) on the CPU.
    """
    n_prompts, n_copies, _ = hidden.shape
    wanted = torch.tensor(list(targets), device=hidden.device)
    score = _score_by_kernel if backbone.fusions is not None and kernels.usable(hidden) else _score_plainly
    base, chunks = _logits(backbone, hidden)
    scores = [score(backbone, raw, base, wanted, start, n_copies) for start, raw in chunks]
    logit, logprob, top = (torch.cat(parts).cpu().view(n_prompts, n_copies) for parts in zip(*scores, strict=True))
    return TokenScores(logit=logit, logprob=logprob, top_id=top)


_Chunks = Iterator[tuple[int, torch.Tensor]]


def _logits(backbone: Backbone, hidden: torch.Tensor) -> tuple[torch.Tensor, _Chunks]:
    """What ``lm_head`` makes of the copies, in two parts to be added: one of each prompt, (N, V) or (1, V) if it is one
    and the same, and chunks of rows, (start, (R, V)) in the order of the copies. float32."""
    head = backbone.arch.lm_head
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = _row_chunks(backbone, len(rows))
    nothing = torch.zeros(1, _vocabulary(backbone), device=hidden.device)
    if isinstance(head, nn.Linear) and head in backbone.split:
        differences = Differences(backbone.pieces)
        pieces = differences.split(hidden.float())
        return differences.base(pieces, head, len(hidden)), differences.products(pieces, head, len(rows), parts)
    if backbone.fusions is not None and hidden.dtype == torch.bfloat16 and takes_bf16(head):
        base = nothing if head.bias is None else head.bias.float()[None]  # type: ignore[union-attr]
        return base, ((part.start, product(rows[part], head.weight)) for part in parts)  # type: ignore[arg-type]
    return nothing, ((part.start, head(rows[part].float()).float()) for part in parts)


_Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _score_by_kernel(
    backbone: Backbone, raw: torch.Tensor, base: torch.Tensor, wanted: torch.Tensor, start: int, n_copies: int
) -> _Scores:
    arch = backbone.arch
    return kernels.read(
        raw, base, wanted, row_0=start, n_copies=n_copies, scale=arch.logit_scale, softcap=arch.logit_softcap
    )


def _score_plainly(
    backbone: Backbone, raw: torch.Tensor, base: torch.Tensor, wanted: torch.Tensor, start: int, n_copies: int
) -> _Scores:
    prompt = torch.arange(start, start + len(raw), device=raw.device) // n_copies
    logits = backbone.arch.final_logits(raw + base[prompt if len(base) > 1 else 0])
    target_logit = logits.gather(1, wanted[prompt, None])[:, 0]
    return target_logit, target_logit - logits.logsumexp(dim=1), logits.argmax(dim=1)


def score_prompts(backbone: Backbone, prompts: TokenIds, targets: Sequence[int]) -> TokenScores:
    """Scores of each prompt's target without any intervention; every field is (N,)."""
    with backbone.running():
        return TokenScores.cat(
            [
                read_targets(backbone, last_hidden(backbone, prompts[part])[:, None], targets[part])[:, 0]
                for part in backbone.passes(prompts, 32)
            ]
        )


def _row_chunks(backbone: Backbone, n_rows: int) -> list[slice]:
    budget = _LOGIT_BYTES.get(backbone.device.type, _LOGIT_BYTES["cpu"])
    size = max(1, budget // (_vocabulary(backbone) * 4 * 3))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _vocabulary(backbone: Backbone) -> int:
    return int(backbone.arch.lm_head.weight.shape[0])  # type: ignore[union-attr]
