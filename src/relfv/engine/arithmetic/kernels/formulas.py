"""Functions that several kernels call."""

from __future__ import annotations

import triton
import triton.language as tl

SHAPES = ["n_prompts", "n_copies", "n_rows", "n_prefix", "row_0", "room", "window"]
"""Arguments that differ from pass to pass: a kernel specialised to one value would be compiled again for the next."""


@triton.jit
def tanh(x):
    # The quotient cancels near 0, where soft caps mostly are; the series is exact to float32 there.
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # noqa: RET505 (Triton compiles one branch)
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
