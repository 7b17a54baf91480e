"""The first calls on a card, made while a model's weights are on their way to it.

At its first call a library loads its code onto the card, and Triton reads what it has compiled before: together most of
a second, in which the card and the threads that read files have something else to do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from relfv.engine.arithmetic import kernels

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def first_used(device: torch.device) -> Iterator[None]:
    """While open, a thread makes first calls on ``device``, if that is a card; it ends with it. What fails in it is
    called again where it is needed, and is explained there."""
    thread = threading.Thread(target=_use, args=[device], daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield
    finally:
        if thread.ident:
            thread.join()


def _use(device: torch.device) -> None:
    """Of each kind of call one, on ones: nothing here may draw random numbers."""
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            for dtype in _DTYPES:
                x = torch.ones(1, 16, 64, device=device, dtype=dtype)
                if kernels.usable(x):
                    kernels.rms_norm(x, x[0, 0], 1e-6, 0.0)
                heads = x.view(1, 16, 2, 32).transpose(1, 2)
                F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
                F.silu(F.linear(x, x[0])).float().log_softmax(-1).norm().item()
    except Exception as problem:
        log.debug("first calls on %s: %s", device, problem)
