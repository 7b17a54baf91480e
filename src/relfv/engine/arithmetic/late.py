"""Queries, keys and values of copies that are joined and rotated late: by attention's kernel, which reads them anyway.

Between the projections and attention they would be written and read twice more, which at the shape of an 8B model takes
as long as half of attention. Both steps may wait where attention does nothing else with what it is given. That is seen,
as everything is, by what it does (``what_may_wait`` in blocks.py), and is so while ``waiting`` is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relfv.engine.arithmetic import kernels


@dataclass
class _Waiting:
    """Steps that wait in the attention that runs now."""

    linears: Set[int]
    bases: dict[int, torch.Tensor] = field(default_factory=dict)
    """Bases, (N, width), by the address of the differences that they belong to."""
    angles: tuple[torch.Tensor, torch.Tensor] | None = None


_now: _Waiting | None = None


@contextmanager
def waiting(linears: Set[int]) -> Iterator[None]:
    """While open, for one attention, rotation waits for the kernel, and so does joining what these linear layers, by
    id, give."""
    global _now
    _now = _Waiting(linears)
    try:
        yield
    finally:
        _now = None


def waits_for(linear: nn.Linear) -> bool:
    """Whether bases and differences of ``linear``'s outputs are to stay apart."""
    return _now is not None and id(linear) in _now.linears


def apart(differences: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``differences`` (N, C, width) as they are; attention will ask for ``base`` (N, width)."""
    assert _now
    _now.bases[differences.data_ptr()] = base
    return differences


def rotates(cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether rotation by ``cos`` and ``sin``, (N or 1, 1, head_dim), waits for attention's kernel; if so, they are
    kept for it."""
    if _now is None:
        return False
    assert cos.shape[1] == 1  # all copies are of one token
    _now.angles = cos, sin
    return True


def taken(*heads: torch.Tensor) -> dict[str, Any]:
    """Arguments for the steps that attention's kernel does first on query, key and value (N, heads, C, head_dim)."""
    if _now is None:
        return {}
    assert _now.angles or not _now.bases, "differences alone would pass for heads"
    if not _now.bases:
        return {"angles": _now.angles} if _now.angles else {}
    bases = [_now.bases[x.data_ptr()].view(*x.shape[:2], 1, -1) for x in heads]
    assert _now.angles
    bases[:2] = kernels.rotate(bases[0], bases[1], *_now.angles)
    return {"angles": _now.angles, "bases": bases}
