"""Attribution patching beside finite differences by plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from conftest import llama
from relfv.engine.base import Backbone
from relfv.engine.gradients import attribute
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.passes import capture_heads
from relfv.engine.reference import naive_baseline, naive_head_patch
from relfv.types import HeadId, Prompts
from zoo import ZOO, backbone_of, plain_backbone

PROMPTS = Prompts([[5, 9, 17, 4, 8, 21], [3, 50, 7, 12], [40, 2, 2, 31, 6, 9, 14]], [11, 25, 60], (0, 1, 2))
FAMILIES = [
    "Llama 2, Llama 3: grouped keys",
    "GLM-4: partial rotary, norms after attention",
    "Gemma 2: soft caps, window in some layers, norms after attention",
    "Phi-1, Phi-2: parallel residual",
    "Granite: scaled logits, scores, embeddings and residuals",
    "GPT-2: Conv1D, learned positions",
    "Falcon: grouped keys (40b)",
]
STEP = 1e-3


def means_of(backbone: Backbone) -> torch.Tensor:
    arch = backbone.arch
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(arch.n_layers, arch.n_heads, arch.head_dim, generator=generator)


def heads_of(backbone: Backbone) -> list[HeadId]:
    return [HeadId(layer, head) for layer in backbone.arch.out_projs for head in range(backbone.arch.n_heads)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_slope_of_the_patch_in_float64(family: str) -> None:
    backbone = backbone_of(ZOO[family].build, torch.float64)
    means = means_of(backbone)
    for measure in ("p", "logit"):
        found = attribute(backbone, PROMPTS, means, measure).first_order
        largest = float(found.abs().max())
        assert largest > 1e-5
        for n, (ids, target) in enumerate(zip(PROMPTS.ids, PROMPTS.targets, strict=True)):
            with backbone.running():
                z = capture_heads(backbone, [ids])[0][0].double()
                for head in heads_of(backbone)[::3]:
                    here = z[head.layer, head.head]
                    away = means[head.layer, head.head] - here
                    ends = [scored(backbone, ids, target, head, here + step * away, measure) for step in (STEP, -STEP)]
                    slope = (ends[0] - ends[1]) / (2 * STEP)
                    # Some norms compute in float32 whatever they are given: a difference by the step makes that larger.
                    room = 2e-3 * largest + 1e-7 / STEP
                    assert float(found[n, head.layer, head.head]) == pytest.approx(slope, abs=room)


def scored(
    backbone: Backbone, ids: Sequence[int], target: int, head: HeadId, activation: torch.Tensor, measure: str
) -> float:
    """By a plain hook, in the model's own dtype."""
    arch = backbone.arch

    def put(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[:, -1].view(-1, arch.n_heads, arch.head_dim)[:, head.head] = activation
        return values

    with editing_inputs([(arch.out_projs[head.layer], put)]):
        hidden = backbone.decoder(input_ids=torch.tensor([list(ids)]), use_cache=False)[0][0, -1]
    logits = arch.final_logits(arch.lm_head(hidden))
    return float(logits[target] if measure == "logit" else logits.softmax(-1)[target])


def test_where_the_logit_is_linear_in_z_it_is_the_exact_effect() -> None:
    model = llama()
    model.model.norm = nn.Identity()
    model.model.layers[-1].mlp.down_proj.weight.data.zero_()
    backbone = plain_backbone(model)
    means, last = means_of(backbone), backbone.arch.n_layers - 1
    found = attribute(backbone, PROMPTS, means, "logit").first_order
    with backbone.running():
        for n, (ids, target) in enumerate(zip(PROMPTS.ids, PROMPTS.targets, strict=True)):
            base = float(naive_baseline(backbone, ids, target).logit)
            for head in range(backbone.arch.n_heads):
                patched = naive_head_patch(backbone, ids, target, HeadId(last, head), means[last, head])
                exact = float(patched.logit) - base
                assert float(found[n, last, head]) == pytest.approx(exact, rel=1e-4, abs=1e-4)


def test_each_drop_is_the_gradient_with_that_blocks_output_held_fixed() -> None:
    backbone = plain_backbone(llama())
    arch, means = backbone.arch, means_of(backbone)
    found = attribute(backbone, PROMPTS, means, "logprob").dropped
    ids, target = PROMPTS.ids[1], PROMPTS.targets[1]
    sizes = torch.zeros(arch.n_layers, arch.n_heads, dtype=torch.float64)
    for dropped in range(arch.n_layers):
        sizes += _by_hand(backbone, ids, target, means, dropped).abs()
    assert torch.allclose(found[1], sizes / (arch.n_layers - 1), rtol=1e-4, atol=1e-6)


def _by_hand(backbone: Backbone, ids: list[int], target: int, means: torch.Tensor, dropped: int) -> torch.Tensor:
    arch = backbone.arch
    moved, z, entered = {}, {}, []

    def adding(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(values: torch.Tensor) -> torch.Tensor:
            z[layer] = values[0, -1].detach()
            moved[layer] = torch.zeros_like(z[layer]).requires_grad_()
            return torch.cat([values[:, :-1], (values[:, -1] + moved[layer])[:, None]], 1)

        return add

    def enter(hidden: torch.Tensor) -> None:
        entered.append(hidden)

    block: Any = arch.blocks[dropped]
    with (
        torch.enable_grad(),
        editing_inputs([(arch.out_projs[layer], adding(layer)) for layer in arch.out_projs] + [(block, enter)]),
        editing_outputs([(block, lambda out: entered[0] + (out - entered[0]).detach())]),
    ):
        hidden = backbone.decoder(input_ids=torch.tensor([ids]), use_cache=False)[0][0, -1]
        score = arch.final_logits(arch.lm_head(hidden)).log_softmax(-1)[target]
    gradients = torch.autograd.grad(score, [*moved.values()], materialize_grads=True)
    return torch.stack(
        [
            ((means[layer].flatten() - z[layer]) * gradient).double().unflatten(0, (arch.n_heads, -1)).sum(-1)
            for layer, gradient in zip(moved, gradients, strict=True)
        ]
    )


def test_a_checkpoint_in_bf16_is_differentiated_in_float32_and_left_as_it_was() -> None:
    model = llama().bfloat16()
    same = llama().bfloat16().float()
    means = means_of(plain_backbone(same))
    low = attribute(plain_backbone(model), PROMPTS, means, "p")
    assert torch.allclose(low.first_order, attribute(plain_backbone(same), PROMPTS, means, "p").first_order)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) or all(p.grad is None for p in model.parameters())
    one = attribute(plain_backbone(same), PROMPTS, means, "p", per_pass=1)
    assert torch.allclose(one.first_order, low.first_order, rtol=1e-3, atol=1e-6)
    assert one.per_pass == 1
