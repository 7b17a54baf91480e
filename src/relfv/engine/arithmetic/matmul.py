"""Matrix products of bf16 numbers that come out in float32."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

_AT_A_TIME = 256 << 20
"""Bytes of products over ``depth`` inputs each that wait to be summed."""


def product(rows: torch.Tensor, weight: torch.Tensor, depth: int | None = None) -> torch.Tensor:
    """bf16 (R, in) and (out, in) -> float32 (R, out), accumulated in float32, over ``depth`` inputs at a time."""
    n_inputs = rows.shape[1]
    if not depth or depth >= n_inputs:
        return _multiplied(rows, weight)

    def summed(start: int, stop: int) -> torch.Tensor:
        each = min(depth, stop - start)
        return _multiplied(*(m[:, start:stop].unflatten(1, (-1, each)).transpose(0, 1) for m in (rows, weight))).sum(0)

    # Several in one call: on a GPU each takes less time than its launch.
    whole, step = n_inputs // depth * depth, depth * max(1, _AT_A_TIME // (4 * len(rows) * len(weight)))
    ends = pairwise(sorted({*range(0, whole, step), whole, n_inputs}))
    return functools.reduce(torch.Tensor.add_, (summed(*part) for part in ends))


def _multiplied(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., R, in) and (..., out, in) -> float32 (..., R, out); with a first axis, one product for each of it."""
    if not rows.is_cuda:
        return rows.float() @ weight.float().mT
    return (torch.mm if rows.dim() == 2 else torch.bmm)(rows, weight.mT, out_dtype=torch.float32)
