"""Fewer prompts at a time where a device has no memory for more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from relfv.errors import RunError

if TYPE_CHECKING:
    from relfv.engine.base import Backbone, TokenIds

log = logging.getLogger(__name__)

T = TypeVar("T")


def shrinking(size: int, attempt: Callable[[int], T], *, release: Callable[[], None] | None = None) -> tuple[T, int]:
    """``attempt(size)``; after an out-of-memory error the whole attempt again with half as many prompts at a time, so
    that one number says how all of the result was made. -> the result and that number.

    ``release`` frees memory that outlives an attempt. Raises RunError if there is not enough for one prompt.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise RunError(
                    "out of memory with one prompt at a time; free memory on the device, or use "
                    "--precision fast, --quant 4bit or a larger device"
                ) from None
        # Outside the except clause, whose traceback keeps the failed attempt's tensors alive.
        size = max(1, size // 2)
        if release:
            release()
        torch.cuda.empty_cache()
        log.warning("out of memory: going on with %d prompts at a time", size)


def in_passes(backbone: Backbone, prompts: TokenIds, size: int, run: Callable[[slice], T]) -> tuple[list[T], int]:
    """``run`` on slices of at most ``size`` prompts, as ``Backbone.passes`` and ``shrinking``. -> the results of all
    slices, and how many prompts shared a pass."""
    return shrinking(size, lambda size: [run(part) for part in backbone.passes(prompts, size)])
