"""Host memory that the processes of one run have in common, for weights that stream: each layer is there once.

It is a file in memory without a name, so that it is gone with the last process that has it open, however that ends.
Whoever comes to a layer first puts its weights there while others wait; should it die meanwhile, the next does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PAGE = 2 << 20
"""Bytes of a huge page. Each layer's weights begin on one; the first page has a byte for each layer: whether it is
there."""

_file: int | None = None


def new_file() -> int | None:
    """File descriptor of shared memory, for processes that are yet to start; None where the system has none."""
    return os.memfd_create("relfv weights") if hasattr(os, "memfd_create") else None


def share(file: int | None) -> None:
    """Put what this process keeps in memory for streaming into ``file`` from now on, unless it is there."""
    global _file
    _file = file


def bytes_shared() -> int | None:
    """Bytes that all processes together have put there; None in a process that shares nothing."""
    return None if _file is None else 512 * os.fstat(_file).st_blocks


def shared_layers(n_bytes: Sequence[int]) -> Callable[[int, Callable[[torch.Tensor], None]], torch.Tensor] | None:
    """A function that gives a layer's bytes, uint8, for a model with layers of ``n_bytes``. It is passed the layer and
    a function that fills the bytes, called if no process has done so. None in a process that shares nothing."""
    if _file is None:
        return None
    import torch

    file = _file
    *starts, end = accumulate((-(-n // _PAGE) * _PAGE for n in n_bytes), initial=_PAGE)
    os.ftruncate(file, end)
    is_there = mmap.mmap(file, _PAGE)

    def of_layer(layer: int, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        memory = mmap.mmap(file, n_bytes[layer], offset=starts[layer])
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, layer)  # a lock of the process, which its end takes away
        try:
            if not is_there[layer]:
                fill(buffer)
                is_there[layer] = 1
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, layer)
        return buffer

    return of_layer
