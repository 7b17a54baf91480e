"""Finding a model's MLPs: the module of each block that makes what its MLP adds to the residual stream."""

from __future__ import annotations

import inspect

from torch import nn

from relfv.models.architecture import Architecture


def mlps_of(arch: Architecture) -> dict[int, nn.Module]:
    """Layer -> its MLP, experts and router included; layers whose MLP is no module that takes a hidden state and gives
    one (OPT's is spread over its block, Bloom's adds the residual itself, Llama 4's flattens tokens) are not there.

    Where the family norms what an MLP writes (Gemma 2 and 3, OLMo 2), that comes after this module's output.
    """
    found = {layer: getattr(block, "mlp", None) for layer, block in enumerate(arch.blocks)}
    return {layer: mlp for layer, mlp in found.items() if isinstance(mlp, nn.Module) and _takes_one(mlp)}


def _takes_one(module: nn.Module) -> bool:
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is inspect.Parameter.empty]
    return len([p for p in needed if p.kind is not inspect.Parameter.VAR_KEYWORD]) == 1
