"""The real tokens of a batch: a tenth of a batch of one relation's prompts is padding, which need not be multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_real: tuple[tuple[int, int], dict[torch.device, torch.Tensor]] | None = None
"""The batch's shape, and its real tokens on each device that has asked."""


@contextmanager
def leaving_out_padding(shape: tuple[int, int], places: torch.Tensor) -> Iterator[None]:
    """While open, linear layers that multiply in pieces do so for the tokens at ``places`` (R,) of a batch (N, P)
    alone; for the others they give 0."""
    global _real
    outer = _real
    _real = (shape, {places.device: places}) if len(places) < shape[0] * shape[1] else None
    try:
        yield
    finally:
        _real = outer


def places_in(shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """The rows of inputs (N, P, d) that are real tokens, if not all are."""
    if _real is None or _real[0] != shape[:-1]:
        return None
    places = _real[1]
    if device not in places:
        places[device] = next(iter(places.values())).to(device)
    return places[device]
