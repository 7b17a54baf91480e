"""From copies' final hidden states through the vocabulary to three numbers a copy, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from relfv.engine.arithmetic import kernels
from relfv.engine.arithmetic.products import Differences, Pieces, product, takes_bf16
from relfv.models.architecture import Architecture

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Memory for one chunk's float32 logits and their temporaries."""

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logit and log-probability of the target, and the most probable token."""

_Chunks = Iterator[tuple[int, torch.Tensor]]


def score(
    arch: Architecture, hidden: torch.Tensor, targets: torch.Tensor, *, pieces: Pieces | None, may_use_kernels: bool
) -> Scores:
    """As ``Arithmetic.read_out``. ``pieces`` is None where ``lm_head`` does not multiply in pieces."""
    n_prompts, n_copies, _ = hidden.shape
    by_kernel = may_use_kernels and kernels.usable(hidden)
    base, chunks = _raw_logits(arch, hidden, pieces, may_use_kernels)
    scores = [
        _score_by_kernel(arch, raw, base, targets, start, n_copies)
        if by_kernel
        else _score_plainly(arch, raw, base, targets, start, n_copies)
        for start, raw in chunks
    ]
    logit, logprob, top = (torch.cat(parts).view(n_prompts, n_copies) for parts in zip(*scores, strict=True))
    return logit, logprob, top


def _raw_logits(
    arch: Architecture, hidden: torch.Tensor, pieces: Pieces | None, may_use_kernels: bool
) -> tuple[torch.Tensor, _Chunks]:
    """What ``lm_head`` makes of the copies, as two float32 parts to be added: one of each prompt, (N, V), or (1, V) if
    it is the same for all, and chunks of rows, (start, (R, V)), in the order of the copies."""
    head = arch.lm_head
    rows = hidden.reshape(-1, hidden.shape[-1])
    vocabulary = int(head.weight.shape[0])  # type: ignore[union-attr]
    chunks = _row_chunks(len(rows), vocabulary, hidden.device.type)
    if pieces is not None and isinstance(head, nn.Linear):
        differences = Differences(pieces)
        split = differences.split(hidden.float())
        return differences.base(split, head, len(hidden)), differences.products(split, head, len(rows), chunks)
    nothing = torch.zeros(1, vocabulary, device=hidden.device)
    if may_use_kernels and hidden.dtype == torch.bfloat16 and takes_bf16(head):
        base = nothing if head.bias is None else head.bias.float()[None]  # type: ignore[union-attr]
        return base, ((part.start, product(rows[part], head.weight)) for part in chunks)
    return nothing, ((part.start, head(rows[part].float()).float()) for part in chunks)


def _score_by_kernel(
    arch: Architecture, raw: torch.Tensor, base: torch.Tensor, targets: torch.Tensor, start: int, n_copies: int
) -> Scores:
    return kernels.read(
        raw, base, targets, row_0=start, n_copies=n_copies, scale=arch.logit_scale, softcap=arch.logit_softcap
    )


def _score_plainly(
    arch: Architecture, raw: torch.Tensor, base: torch.Tensor, targets: torch.Tensor, start: int, n_copies: int
) -> Scores:
    prompt = torch.arange(start, start + len(raw), device=raw.device) // n_copies
    logits = arch.final_logits(raw + base[prompt if len(base) > 1 else 0])
    target_logit = logits.gather(1, targets[prompt, None])[:, 0]
    return target_logit, target_logit - logits.logsumexp(dim=1), logits.argmax(dim=1)


def _row_chunks(n_rows: int, vocabulary: int, device: str) -> list[slice]:
    size = max(1, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"]) // (vocabulary * 4 * 3))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
