"""How the effect of a head's patch changes with what is patched in, to first order: where several patches of a head
hardly differ, one pass over copies with a backward pass stands for a copy of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relfv.engine.attention import Prefix, attending_to
from relfv.engine.base import Array, Backbone, Engine, sent, values_of
from relfv.engine.copies import last_tokens, run_last_tokens, setting_heads
from relfv.engine.memory import shrinking
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.types import HeadId, Prompts

_PROMPTS_A_PASS = 8
"""A backward pass keeps every layer's activations of all copies."""


def patch_slopes(
    engine: Engine, prompts: Prompts, replacement: Array, heads: Sequence[HeadId], *, per_pass: int | None = None
) -> tuple[torch.Tensor, int] | None:
    """float64 (prompt, head, head_dim): the gradient of the target's probability by z of each of ``heads``, sorted, at
    its ``replacement``, all as ``Engine.sweep_heads`` takes them; and the prompts that shared a pass.

    None where it would not be cheaper than the patches themselves: off the CPU, where a few more copies cost nothing,
    and where a backward pass needs weights that are not there as it reads them.
    """
    backbone, values = engine.over_likeliest_tokens().backbone, values_of(replacement, heads, engine.backbone.device)
    if not isinstance(engine, SharedPrefixEngine) or backbone.streaming or backbone.depends_on_company(prompts.ids):
        return None
    if values is None or not backbone.arithmetic.gradients_are_cheap:
        return None
    with backbone.running():
        prefix = engine.kept.of(backbone, prompts.ids)

    def attempt(size: int) -> torch.Tensor:
        parts = backbone.passes(prompts.ids, size)
        return torch.cat([_slopes(backbone, prompts[p], _differentiable(prefix[p]), values, heads) for p in parts])

    with backbone.arithmetic.with_gradients():
        return shrinking(per_pass or _PROMPTS_A_PASS, attempt)


def _slopes(
    backbone: Backbone, prompts: Prompts, prefix: Prefix, values: torch.Tensor, heads: Sequence[HeadId]
) -> torch.Tensor:
    patched = values.expand(len(prompts), -1, -1).clone().requires_grad_()
    with attending_to(prefix, backbone), setting_heads(backbone, heads, patched):
        hidden = run_last_tokens(backbone, last_tokens(backbone, prompts.ids), prefix.lengths)
    copies = torch.cat([hidden[:, :1].detach(), hidden[:, 1:]], dim=1)  # the unpatched one depends on none of them
    logprob = backbone.arithmetic.read_out(copies, sent(list(prompts.targets), copies.device))[1]
    (slopes,) = torch.autograd.grad(logprob[:, 1:].exp().sum(), patched)  # copies do not touch one another
    return slopes.double()


def _differentiable(prefix: Prefix) -> Prefix:
    """Copies, since tensors of inference mode cannot be kept for a backward pass."""
    keys, values = ({layer: of.clone() for layer, of in layers.items()} for layers in (prefix.keys, prefix.values))
    lengths_on = {place: lengths.clone() for place, lengths in prefix.lengths_on.items()}
    return Prefix(keys, values, prefix.lengths.clone(), lengths_on)
