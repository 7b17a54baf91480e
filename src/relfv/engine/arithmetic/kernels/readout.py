"""Logit, log-probability and largest logit of rows of the vocabulary, in one trip through memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from relfv.engine.arithmetic.kernels.formulas import SHAPES, tanh


@triton.jit(do_not_specialize=SHAPES)
def _read_kernel(
    raw, base, targets, logit, logprob, top, row_0, vocabulary, n_copies, base_prompt, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    prompt = (row_0 + row) // n_copies
    raw += row * vocabulary
    base += prompt * base_prompt
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < vocabulary
        value = tl.load(raw + index, mask=mask, other=0.0) + tl.load(base + index, mask=mask, other=0.0)
        value *= scale
        if CAPPED:
            value = softcap * tanh(value / softcap)
        value = tl.where(mask, value, float("-inf"))
        higher = tl.maximum(best, value)
        # A lane that has seen nothing has -inf on both sides; its sum stays 0.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(best - higher) + tl.exp(value - higher))
        where = tl.where(value > best, index, where)
        best = higher
    highest = tl.max(best, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(best - highest), 0))
    target = tl.load(targets + prompt)
    value = (tl.load(raw + target) + tl.load(base + target)) * scale
    if CAPPED:
        value = softcap * tanh(value / softcap)
    tl.store(logit + row, value)
    tl.store(logprob + row, value - lse)
    tl.store(top + row, tl.min(tl.where(best == highest, where, 2147483647), 0).to(tl.int64))


def read(
    raw: torch.Tensor,
    base: torch.Tensor,
    targets: torch.Tensor,
    *,
    row_0: int,
    n_copies: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row r of ``raw`` (R, V): logits = cap(scale * (raw[r] + base[n])), n = (row_0 + r) // n_copies; ``base`` is
    (N, V), or (1, V) for all.

    -> float32 logit and logprob of targets[n], int64 id of the largest logit (the lowest id of equals); each (R,).
    """
    rows, vocabulary = raw.shape
    logit = torch.empty(rows, dtype=torch.float32, device=raw.device)
    logprob = torch.empty_like(logit)
    top = torch.empty(rows, dtype=torch.int64, device=raw.device)
    _read_kernel[(rows,)](
        raw, base, targets, logit, logprob, top, row_0, vocabulary, n_copies,
        vocabulary if len(base) > 1 else 0, scale, softcap or 0.0, softcap is not None, 4096, num_warps=8,
    )  # fmt: skip
    return logit, logprob, top
