"""Families whose attention modules compute softmax over keys in their own code, not through ``AttentionInterface``.

Each ``_drive_*`` returns a replacement for one method of such a module. Everything the family does around the scores
(projections, rotary embedding, output projection) still runs in the module's parts; only softmax over keys is replaced,
by a function that the engine passes in. Families are told apart by the spec that fits the model, and the self-check on
opening judges the result, as it does for every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from relfv.models.architecture import Architecture

Attend = Callable[..., tuple[torch.Tensor, None]]
"""``shared_prefix_attention`` in engine/attention.py: query (N, heads, C, head_dim), key and value (N, kv_heads, C,
head_dim) -> (N, C, heads, head_dim)."""

Replacement = tuple[str, Callable[..., Any]]
"""Name of a method of the attention module, and the function that replaces it."""


def attends_itself(arch: Architecture) -> bool:
    """Whether the model is of a family that computes attention in its own code."""
    return arch.family in _DRIVERS


@contextmanager
def attending_by(arch: Architecture, attend: Attend, width: int) -> Iterator[None]:
    """While open, the attention modules of these families call ``attend``; models of other families are unchanged.

    ``width`` is the number of key positions, that of the last token included: ALiBi depends on the keys' positions.
    """
    with ExitStack() as stack:
        if drive := _DRIVERS.get(arch.family):
            for layer, module in arch.attentions.items():
                stack.enter_context(_replaced(module, *drive(module, layer, attend, width)))
        yield


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While open, an attribute of the instance hides the method of its class."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)


def _drive_gptj(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    """Replacement for GPT-J and CodeGen."""
    return _drive_attn(module, layer, attend, scaling=1.0 / float(module.scale_attn), window=None)


def _drive_gpt_neo(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    """Replacement for GPT-Neo, which does not scale its scores and attends within a window in some of its layers."""
    local = module.config.attention_layers[layer] == "local"
    return _drive_attn(module, layer, attend, scaling=1.0, window=module.config.window_size if local else None)


def _drive_attn(module: Any, layer: int, attend: Attend, scaling: float, window: int | None) -> Replacement:
    def attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        out = attend(module, query, key, value, None, layer=layer, scaling=scaling, sliding_window=window)[0]
        return out.transpose(1, 2), None

    return "_attn", attn


def _drive_falcon(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    scaling = 1.0 / math.sqrt(module.head_dim)

    def forward(
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> Any:
        parts = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in parts)
        bias = None
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[misc]
        else:
            # Falcon scales the sum of score and ALiBi; its build_alibi_tensor rounds ALiBi to bf16.
            bias = scaling * _alibi(build_alibi_tensor, module, width, query)
        out = attend(module, query, key, value, None, layer=layer, scaling=scaling, key_bias=bias)[0]
        return module.dense(out.flatten(2)), None

    return "forward", forward


def _drive_bloom(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> Any:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        bias = _alibi(build_alibi_tensor, module, width, query)
        scaling = module.inv_norm_factor
        out = attend(module, query, key, value, None, layer=layer, scaling=scaling, key_bias=bias)[0]
        return residual + module.dense(out.flatten(2)), None

    return "forward", forward


def _alibi(build: Callable[..., torch.Tensor], module: Any, width: int, query: torch.Tensor) -> torch.Tensor:
    """The family's ALiBi for keys at positions 0..width-1: (heads, width). Padding is on the right only."""
    return build(torch.ones(1, width, dtype=torch.long, device=query.device), module.num_heads, query.dtype)[:, 0]


_DRIVERS: dict[str, Callable[[Any, int, Attend, int], Replacement]] = {
    "gptj": _drive_gptj,
    "codegen": _drive_gptj,
    "gpt_neo": _drive_gpt_neo,
    "falcon": _drive_falcon,
    "bloom": _drive_bloom,
}
