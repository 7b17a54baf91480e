"""Families whose attention modules do the attending themselves instead of asking ``AttentionInterface``.

Each ``_drive_*`` gives one attention module a function in place of one of its methods, with everything the family
does around the scores (projections, rotary embedding, output projection) done by the module's own parts. What is
replaced is only ever softmax over keys, by the function that ``attention.py`` hands in. Families are known by the spec
that fitted the model; the self-check on opening judges the result, as it does for every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from relfv.models.families import Architecture

Attend = Callable[..., tuple[torch.Tensor, None]]
"""``shared_prefix_attention``: query, key, value as (N, heads, C, head_dim) -> (N, C, heads, head_dim)."""

Replacement = tuple[str, Callable[..., Any]]
"""Name of a method of the attention module, and what takes its place."""


@contextmanager
def attending_by(arch: Architecture, attend: Attend, width: int) -> Iterator[None]:
    """While open, the attention modules of such a family call ``attend``; every other family is left alone.

    ``width`` is the number of key positions, the last token's own among them: ALiBi needs to know where keys are.
    """
    with ExitStack() as stack:
        if drive := _DRIVERS.get(arch.spec_name):
            for layer, module in enumerate(arch.attentions):
                stack.enter_context(_replaced(module, *drive(module, layer, attend, width)))
        yield


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The instance's attribute hides its class's method, and goes away again."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)


def _drive_gptj(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    """GPT-J and CodeGen."""
    return _drive_attn(module, layer, attend, scaling=1.0 / float(module.scale_attn), window=None)


def _drive_gpt_neo(module: Any, layer: int, attend: Attend, width: int) -> Replacement:
    """GPT-Neo does not scale its scores, and in some layers sees a window only."""
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
            # Falcon scales the sum of score and ALiBi, whose numbers are rounded to bf16 by its own function.
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
    """The family's own ALiBi for keys at positions 0..width-1: (heads, width). Prompts are padded on the right only."""
    return build(torch.ones(1, width, dtype=torch.long, device=query.device), module.num_heads, query.dtype)[:, 0]


_DRIVERS: dict[str, Callable[[Any, int, Attend, int], Replacement]] = {
    "gptj": _drive_gptj,
    "codegen": _drive_gptj,
    "gpt_neo": _drive_gpt_neo,
    "falcon": _drive_falcon,
    "bloom": _drive_bloom,
}
