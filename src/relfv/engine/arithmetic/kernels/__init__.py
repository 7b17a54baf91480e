"""Fused Triton kernels for what is left of a pass when the matrix products are taken away.

On a GPU the products of a head sweep take a few hundred milliseconds, and elementwise PyTorch, one kernel and one trip
through memory per operation, would take as long again. Each kernel here does one module's elementwise work in one
trip. Triton compiles each in a fraction of a second and caches it on disk, so even a single q_id gains; torch.compile
of the same operations takes tens of seconds first, more than a dozen q_ids give back.

Whatever a kernel does can be done without it: by plain PyTorch beside its caller (products.py, attention.py, logits.py)
or by the module whose place it takes (fusion.py). That is what runs without CUDA or Triton, and what tests compare
with. Nothing here knows models or modules.
"""

from __future__ import annotations

import torch

try:
    import triton  # noqa: F401

    AVAILABLE = True
except ImportError:  # CPU builds of PyTorch come without Triton
    AVAILABLE = False

if AVAILABLE:
    from relfv.engine.arithmetic.kernels.attention import attend
    from relfv.engine.arithmetic.kernels.elementwise import add, add_norm, gate, rms_norm, rotate
    from relfv.engine.arithmetic.kernels.pieces import (
        gate_differences,
        join_differences,
        norm_differences,
        split_differences,
    )
    from relfv.engine.arithmetic.kernels.readout import read

__all__ = [
    "AVAILABLE", "add", "add_norm", "attend", "gate", "gate_differences", "join_differences", "norm_differences",
    "read", "rms_norm", "rotate", "split_differences", "usable",
]  # fmt: skip


def usable(tensor: torch.Tensor) -> bool:
    """True if kernels can run where ``tensor`` is."""
    return AVAILABLE and tensor.is_cuda
