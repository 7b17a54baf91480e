"""Weights that bitsandbytes packed into 8 or 4 bits, and the numbers they stand for.

Its own products round more than the weights: in 8 bit each input too, by a percent or so and depending on
what shares the batch, in 4 bit differently for one token than for many. Most heads' effects drown in that. The weights
themselves are numbers like any others, so relfv reads a layer's weights in 16 bits while it runs and multiplies as for
any other model: same memory at rest, same arithmetic, same engine.
"""

from __future__ import annotations

from copy import copy
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_readable(module: Any) -> TypeGuard[nn.Linear]:
    """True for a linear layer whose weight bitsandbytes packed, and in an order that can be read."""
    weight = getattr(module, "weight", None)
    kind, state = type(weight).__name__, getattr(weight, "quant_state", None)
    # On some CPUs the layer's own forward, which relfv does not use, reorders the weight for its product.
    in_order = state is not None and not getattr(state, "packing_format_for_cpu", False)
    return isinstance(module, nn.Linear) and (kind == "Int8Params" or (kind == "Params4bit" and in_order))


def weight_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype of ``weight_of``: in 4 bit the checkpoint's, in 8 bit bfloat16."""
    if not is_readable(linear):
        return linear.weight.dtype
    state: Any = getattr(linear.weight, "quant_state", None)
    return torch.bfloat16 if state is None else state.dtype


def weight_of(linear: nn.Linear) -> torch.Tensor:
    """The weight, (out, in): the layer's own tensor, or what its packed one stands for."""
    if not is_readable(linear):
        return linear.weight
    weight: Any = linear.weight
    if type(weight).__name__ == "Params4bit":
        return _read_4bit(weight)
    state: Any = linear.state
    scale = weight.SCB if state.SCB is None else state.SCB
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    return torch.mul(weight.data, (scale / 127)[:, None], out=out)


def _read_4bit(weight: Any) -> torch.Tensor:
    """What a weight in 4 bit stands for: one row after another in blocks, each with a scale of its own.

    Told that there is one row: bitsandbytes (0.50) begins a block with each row on a CPU with AVX-512, and there reads
    rows that no whole number of blocks fills as other numbers.
    """
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

    state = weight.quant_state
    if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        state = copy(state)
        state.shape = torch.Size((1, weight.quant_state.shape.numel()))
    return dequantize_4bit(weight.data, state).reshape(weight.quant_state.shape)


def unpacked_product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Output of a readable layer, (..., in) -> (..., out), in the dtype of ``x``."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, weight_of(linear).to(x.dtype), bias)


def is_opaque(model: nn.Module) -> bool:
    """Whether some of a quantised model's weights can be used by its own code alone."""
    if not getattr(model, "is_quantized", False):
        return False
    if getattr(model, "hf_quantizer", None) is None:  # not known to be unpacked
        return True
    others = (module for module in model.modules() if not is_readable(module))
    own = (tensor for m in others for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
    return any(t.dtype not in (*_FLOATS, torch.bool) and t.dim() > 1 and len(t) > 1 for t in own)
