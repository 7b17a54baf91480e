"""Attribution patching: what every head's patch would do, to first order, from one forward and one backward pass.

Patching z[l, h] := a changes a measure m by about (a - z[l, h]) . dm/dz[l, h], the gradient taken on the untouched
prompt (Nanda 2023; Syed et al. 2023): all heads at once, where the exact sweep computes each.

Of AtP* (Kramar et al. 2024) the part that applies to a head's output is GradDrop: where a head's direct effect and the
one through a later layer cancel, the gradient is small and what is left out matters. So the backward pass is repeated
with the gradient kept from passing through one block at a time, and the estimates' sizes are averaged: no cancellation
is the same in all of them. The QK fix is left out because it corrects patches of queries and keys, whose effect goes
through the patched head's own softmax; z comes after it.

Everything is float32, whatever the checkpoint's dtype, by PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from relfv.engine.base import Backbone
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.memory import in_passes
from relfv.engine.passes import last_hidden
from relfv.types import Prompts

_PROMPTS_A_PASS = 8
"""Most prompts in a pass, by default: a backward pass keeps every layer's activations of all tokens."""


@dataclass(frozen=True)
class Attribution:
    """Estimated effects; float64 (prompt, layer, head), 0 in layers without attention."""

    first_order: torch.Tensor
    dropped: torch.Tensor
    """GradDrop's estimates: averages of sizes, so never negative."""
    per_pass: int
    """Prompts that shared a pass."""


def attribute(
    backbone: Backbone, prompts: Prompts, means: torch.Tensor, measure: str, *, per_pass: int | None = None
) -> Attribution:
    """The estimated change of ``measure`` (one of MEASURES) at each prompt's target, of setting each head, one at a
    time, to ``means`` (layer, head, head_dim) at the last token.

    Raises RunError if memory is too small for one prompt.
    """
    with backbone.arithmetic.with_gradients():
        estimates, size = in_passes(
            backbone,
            prompts.ids,
            per_pass or _PROMPTS_A_PASS,
            lambda part: _estimates(backbone, prompts[part], means, measure),
        )
    first, dropped = map(torch.cat, zip(*estimates, strict=True))
    return Attribution(first, dropped, size)


def _estimates(
    backbone: Backbone, prompts: Prompts, means: torch.Tensor, measure: str
) -> tuple[torch.Tensor, torch.Tensor]:
    arch, passes = backbone.arch, [1.0] * backbone.arch.n_layers
    with _last_tokens_apart(backbone, prompts) as (z, moved), _gates(backbone, passes):
        total, factor = _measured(backbone, prompts, measure)
    away = {layer: means[layer].flatten().to(z[layer]) - z[layer] for layer in z}

    def estimate() -> torch.Tensor:
        gradients = torch.autograd.grad(total, [*moved.values()], retain_graph=True, materialize_grads=True)
        found = torch.zeros(len(prompts), arch.n_layers, arch.n_heads, dtype=torch.float64)
        for layer, gradient in zip(moved, gradients, strict=True):
            by_head = (away[layer].double() * gradient.double()).unflatten(-1, (arch.n_heads, arch.head_dim))
            found[:, layer] = by_head.sum(-1).cpu() * factor[:, None]
        return found

    first, sizes = estimate(), torch.zeros(len(prompts), arch.n_layers, arch.n_heads, dtype=torch.float64)
    for layer in range(arch.n_layers):
        passes[layer] = 0.0
        sizes += estimate().abs()
        passes[layer] = 1.0
    # A head's own layer lets nothing through when it is the one that is dropped: the rest are n_layers - 1.
    return first, sizes / max(1, arch.n_layers - 1)


def _measured(backbone: Backbone, prompts: Prompts, measure: str) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (what is differentiated, summed over prompts, which do not touch one another; (prompt,) what its gradient is
    times to be that of ``measure``: dP = P dlogP)."""
    hidden = last_hidden(backbone, prompts.ids)
    logits = backbone.arch.final_logits(backbone.arch.lm_head(hidden))
    targets = torch.tensor(list(prompts.targets), device=logits.device)[:, None]
    scored = (logits if measure == "logit" else logits.log_softmax(-1)).gather(-1, targets)[:, 0]
    factor = scored.detach().double().exp() if measure == "p" else torch.ones_like(scored, dtype=torch.float64)
    return scored.sum(), factor.cpu()


@contextmanager
def _last_tokens_apart(
    backbone: Backbone, prompts: Prompts
) -> Iterator[tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]:
    """While open, forward passes add a zero to z at the last token -> by layer z there (prompt, heads * head_dim), and
    the zero, whose gradient is that of z."""
    # On the CPU, since each layer may be on a card of its own.
    rows, last = torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts.ids])
    z: dict[int, torch.Tensor] = {}
    moved: dict[int, torch.Tensor] = {}

    def adding(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(values: torch.Tensor) -> torch.Tensor:
            z[layer] = values[rows, last].detach()
            moved[layer] = torch.zeros_like(z[layer]).requires_grad_()
            return values.index_put((rows, last), moved[layer], accumulate=True)

        return add

    with editing_inputs([(projection, adding(layer)) for layer, projection in backbone.arch.out_projs.items()]):
        yield z, moved


@contextmanager
def _gates(backbone: Backbone, passes: list[float]) -> Iterator[None]:
    """While open, forward passes are made so that a backward pass takes the share ``passes`` (layer,), as it is at that
    time, of the gradient through each block, and the rest past it."""
    entered: dict[int, torch.Tensor] = {}

    def entering(layer: int) -> Callable[[torch.Tensor], None]:
        def enter(hidden: torch.Tensor) -> None:
            entered[layer] = hidden

        return enter

    def leaving(layer: int) -> Callable[[torch.Tensor], Any]:
        return lambda hidden: _Gate.apply(entered[layer], hidden, passes, layer)

    blocks = list(enumerate(backbone.arch.blocks))
    with ExitStack() as stack:
        stack.enter_context(editing_inputs([(block, entering(layer)) for layer, block in blocks]))
        stack.enter_context(editing_outputs([(block, leaving(layer)) for layer, block in blocks]))
        yield


class _Gate(torch.autograd.Function):
    """A block's output as it is; its gradient goes in shares through the block and past it."""

    @staticmethod
    def forward(ctx: Any, entered: torch.Tensor, left: torch.Tensor, passes: list[float], layer: int) -> torch.Tensor:
        ctx.passes, ctx.layer = passes, layer
        return left.view_as(left)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        share = ctx.passes[ctx.layer]
        return (1 - share) * gradients[0], share * gradients[0], None, None
