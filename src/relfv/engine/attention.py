"""Attention of many copies of the last token, each to its prompt's prefix and to itself alone.

Registered with transformers' ``AttentionInterface``, so that it runs inside unmodified Hugging Face modules: query,
key and value arrive after the family's own projections, norms and rotary embedding.

For one copy, softmax over [prefix | itself] splits exactly into two parts. With lse the log-sum-exp of the prefix
scores, o_prefix their softmax-weighted values, and s the copy's score of its own key,

    o = o_prefix + w * (v_own - o_prefix),   w = sigmoid(s - lse),

and an attention sink of logit c (GPT-OSS) shrinks o by sigmoid(logaddexp(lse, s) - c). Computing the parts apart
matters: under one [prefix | diagonal] mask each copy's own key sits in another column, the summation order differs
between copies, and patches that change nothing come out as effects. The arithmetic is ``Arithmetic.attend``; this
module brings it the model's queries, keys and values, and refuses what it does not know.

Where kernels run, whole prompts attend by the same one (``attending_within``): token c is a copy that sees the c tokens
before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from relfv.engine.arithmetic import Arithmetic
from relfv.engine.base import Backbone
from relfv.errors import RunError
from relfv.models.own_attention import attending_by, attends_itself

NAME = "relfv_shared_prefix"


@dataclass(frozen=True)
class Prefix:
    """Keys and values of all tokens but the last of each prompt, as the model itself cached them."""

    keys: Mapping[int, torch.Tensor]
    """Keys by layer, (N, kv_heads, P, head_dim), P the longest prefix; shorter ones are padded on the right."""
    values: Mapping[int, torch.Tensor]
    lengths: torch.Tensor
    """int64 (N,): real prefix tokens, which is also the position of the last token."""
    lengths_on: Mapping[torch.device, torch.Tensor]
    """``lengths`` on each device that has keys."""

    def __getitem__(self, part: slice) -> Prefix:
        """The prefixes of some of the prompts, no less padded."""
        keys, values = ({i: of[part] for i, of in layers.items()} for layers in (self.keys, self.values))
        return Prefix(keys, values, self.lengths[part], {place: n[part] for place, n in self.lengths_on.items()})

    def of_layer(self, layer: int) -> Prefix:
        """The prefix in one layer, for its block alone."""
        return replace(self, keys={layer: self.keys[layer]}, values={layer: self.values[layer]})


@dataclass(frozen=True)
class _Pass:
    arithmetic: Arithmetic
    prefix: Prefix | None = None
    """Prefix that copies attend to; None in passes over whole prompts, whose tokens attend to those before them."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Receives keys and values by layer in passes over whole prompts; None where nobody asks for them."""


_active: _Pass | None = None

# Keyword arguments that transformers' models pass along and that cannot change the result of this computation: there
# is one query position, dropout is off in eval mode, and causality is the prefix itself.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_causal",
        "layer_idx",
        "head_mask",
        "num_items_in_batch",
        "logits_to_keep",
    }
)


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    layer: int | None = None,
    key_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: query (N, heads, C, head_dim); key, value (N, kv_heads, C, head_dim) -> (N,
    C, heads, head_dim).

    ``layer`` and ``key_bias`` come from own_attention.py alone: ALiBi as (heads, P + 1), by the key's position.
    """
    active = _require_active(kwargs)
    _require_same_window(attention_mask, sliding_window)
    _require_usual_shapes(query, key, value)
    layer = int(module.layer_idx) if layer is None else layer  # type: ignore[arg-type]
    prefix = active.prefix
    if active.kept is not None:
        active.kept[layer] = _alone(key), _alone(value)
    out = active.arithmetic.attend(
        query,
        key,
        value,
        prefix.keys[layer] if prefix else key,
        prefix.values[layer] if prefix else value,
        prefix.lengths_on[query.device] if prefix else None,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        key_bias=key_bias,
    )
    return out, None


def _alone(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it if it is a part of something larger, which would stay in memory."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def _require_active(kwargs: dict[str, Any]) -> _Pass:
    if _active is None:
        raise RunError(f"attention {NAME!r} ran outside a shared-prefix pass")
    unknown = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and given is not None)
    if unknown:
        raise UnsupportedAttention(f"the model's attention passes {', '.join(unknown)}, unknown to {NAME}")
    return _active


class UnsupportedAttention(RunError):
    """This family's attention has a feature that ``shared_prefix_attention`` does not know."""


def _window_as_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """Mask that carries only the window or chunk that the model asks for, as a tensor without dimensions: there is one
    query position, and the attention function decides what it may see."""
    return None if local_size is None else torch.tensor(local_size)


def _require_same_window(attention_mask: torch.Tensor | None, sliding_window: int | None) -> None:
    """Refuse a model that limits attention by its mask alone (chunks), on prompts shorter than the limit, too."""
    if attention_mask is not None and attention_mask.dim() == 0 and int(attention_mask) != sliding_window:
        raise UnsupportedAttention(
            f"the model's mask limits attention to {int(attention_mask)} tokens, in a way unknown to {NAME}"
        )


def _require_usual_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse keys and values of other widths (latent caches), which would be read past their ends."""
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise UnsupportedAttention(
            f"queries, keys and values of shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} "
            f"are unknown to {NAME}"
        )


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _window_as_mask)


@contextmanager
def attending_to(prefix: Prefix, backbone: Backbone) -> Iterator[None]:
    """While open, the model's attention is ``shared_prefix_attention`` over ``prefix``."""
    width = 1 + next(iter(prefix.keys.values())).shape[2]
    active = _Pass(backbone.arithmetic, prefix)
    with attending_by(backbone.arch, shared_prefix_attention, width), _attending(active, backbone):
        yield


def attends_by_kernel(backbone: Backbone) -> bool:
    """Whether attention of whole prompts may be the kernel's: where there are kernels, and the model has no attention
    of its own."""
    return backbone.arithmetic.fusions is not None and not attends_itself(backbone.arch)


@contextmanager
def attending_within(
    backbone: Backbone, kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
) -> Iterator[None]:
    """While open, passes are over whole prompts, padded on the right. Attention is the kernel's where it may be: it
    needs no mask, and ``kept`` receives each layer's keys and values, if it is given."""
    with _attending(_Pass(backbone.arithmetic, kept=kept), backbone) if attends_by_kernel(backbone) else nullcontext():
        yield


@contextmanager
def _attending(active: _Pass, backbone: Backbone) -> Iterator[None]:
    global _active
    outer, before = _active, [(config, config._attn_implementation) for config in backbone.configs]
    for config in backbone.configs:
        config._attn_implementation = NAME
    _active = active
    try:
        yield
    finally:
        _active = outer
        for config, implementation in before:
            config._attn_implementation = implementation
