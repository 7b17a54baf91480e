"""Fewer prompts at a time where a device has no room for more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from relfv.errors import RunError

log = logging.getLogger(__name__)

T = TypeVar("T")


def shrinking(size: int, attempt: Callable[[int], T], *, release: Callable[[], None] | None = None) -> tuple[T, int]:
    """``attempt(size)``, after each out-of-memory error all of it again with half as many prompts at a time, so that one
    number says how the whole result was made. -> the result and that number.

    ``release`` gives up memory that outlives an attempt. Raises RunError if there is no room for one prompt.
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
