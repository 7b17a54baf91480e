"""Several edits in one pass, by both engines, against one hooked, unpadded, whole forward pass each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import llama
from parity import ENGINES, Truth, all_heads, assert_same, assert_same_scores, gaps, truth
from relfv.engine.base import Together
from relfv.engine.passes import capture_mlps
from relfv.engine.readout import joined
from relfv.engine.reference import naive_together
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.engine.together import _adding, _removing, _setting, _setting_mlp, first_edited
from relfv.models.cards import Cards
from relfv.types import Effects, HeadId, Prompts
from zoo import ZOO, backbone_of

LLAMA = "Llama 2, Llama 3: grouped keys"
QUICK = [
    LLAMA,
    "GPT-2: Conv1D, learned positions",
    "Gemma 2: soft caps, window in some layers, norms after attention",
    "Falcon: ALiBi (rw)",
]

MLPS = [
    "GPT-NeoX, Pythia: fused qkv, parallel residual",
    "Mixtral: window, experts",
    "GPT-OSS: sinks, window in some layers, experts",
]


def versions_and_truth(t: Truth) -> tuple[list[Together], Effects]:
    """Four versions: some heads set, for all prompts alike; other heads and values for each prompt; both, with vectors
    after two blocks; directions taken out after two blocks, with a vector added after one of them."""
    arch, heads = t.backbone.arch, all_heads(t.backbone)
    sets = [[heads[(5 * n + i) % len(heads)] for i in (0, 4, 9)] for n in range(len(t.prompts))]
    own = torch.stack([(1 + n) * t.values for n in range(len(t.prompts))])
    added = torch.zeros(1, arch.n_layers, arch.resid_dim)
    added[0, 0], added[0, 2] = t.vectors
    some = Together.setting([heads[::3]], t.values[None])
    each_its_own = Together.setting(sets, own)
    removed = torch.nn.functional.normalize(t.vectors.flip(0), dim=1)
    taken_out = Together(added=added * torch.tensor([1.0, 0, 0])[:, None], removed=torch.zeros_like(added))
    assert taken_out.removed is not None
    taken_out.removed[0, :2] = removed
    versions = [some, each_its_own, replace(each_its_own, added=added), taken_out]
    edited, base = [], t.injection.base

    def of(chosen: list[HeadId], values: torch.Tensor) -> dict[HeadId, torch.Tensor]:
        return {head: values[head.layer, head.head] for head in chosen}

    backbone = t.backbone.in_float32()
    with backbone.running():
        for n, (prompt, target) in enumerate(zip(t.prompts, t.targets, strict=True)):
            vectors = {0: t.vectors[0], 2: t.vectors[1]}
            rows = [
                naive_together(backbone, prompt, target, of(heads[::3], t.values), {}),
                naive_together(backbone, prompt, target, of(sets[n], own[n]), {}),
                naive_together(backbone, prompt, target, of(sets[n], own[n]), vectors),
                naive_together(backbone, prompt, target, {}, {0: t.vectors[0]}, dict(enumerate(removed))),
            ]
            edited.append(joined(rows)[None])
    return versions, Effects(base, joined(edited))


def cases() -> list[Any]:
    """Every model of the zoo by each engine that can run it; ``make test-quick`` takes some."""
    return [
        pytest.param(name, engine, marks=() if name in QUICK else pytest.mark.slow)
        for name, animal in ZOO.items()
        for engine in ENGINES
        if engine in ("reference", animal.engine)
    ]


@pytest.mark.parametrize(("family", "engine"), cases())
def test_several_edits_at_once_do_what_plain_hooks_do(family: str, engine: str) -> None:
    t = truth(family)
    versions, true = versions_and_truth(t)
    assert_same(gaps(ENGINES[engine](t.backbone).edit_together(Prompts(t.prompts, t.targets), versions), true))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("per_pass", [1, 2])
def test_each_prompt_has_its_own_edits_whatever_shares_its_pass(engine: str, per_pass: int) -> None:
    t = truth(LLAMA)
    versions, true = versions_and_truth(t)
    found: Any = ENGINES[engine](t.backbone).edit_together(Prompts(t.prompts, t.targets), versions, per_pass=per_pass)
    assert_same(gaps(found, true))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_head_and_one_vector_are_what_sweeps_and_injections_do(engine: str) -> None:
    t = truth(LLAMA)
    prompts, head = Prompts(t.prompts, t.targets), HeadId(1, 3)
    added = torch.zeros(1, t.backbone.arch.n_layers, t.backbone.arch.resid_dim)
    added[0, 1] = t.vectors[0]
    found = ENGINES[engine](t.backbone).edit_together(
        prompts, [Together.setting([[head]], t.values[None]), Together(added=added)]
    )
    one_head = all_heads(t.backbone).index(head)
    truth_of_both = joined([t.sweep.edited[:, one_head], t.injection.edited[:, 2]])
    expected = Effects(t.sweep.base, truth_of_both[torch.arange(6).view(2, 3).T])
    assert_same(gaps(found, expected))


def test_prompts_that_must_not_be_split_are_run_whole() -> None:
    rotary = {"rope_theta": 10000.0, "original_max_position_embeddings": 16, "rope_type": "dynamic", "factor": 4.0}
    backbone = backbone_of(lambda: llama(300, head_dim=12, max_position_embeddings=16, rope_parameters=rotary))
    prompt, head = [(7 * i) % 290 for i in range(20)], HeadId(1, 3)
    values = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    found = SharedPrefixEngine(backbone).edit_together(Prompts([prompt], [5]), [Together.setting([[head]], values)])
    with backbone.running():
        true = naive_together(backbone, prompt, 5, {head: values[0, 1, 3]}, {})
    assert_same_scores(found.edited[0], true)


@pytest.mark.parametrize(
    ("family", "engine"),
    [case for case in cases() if case.values[0] in (*QUICK, *MLPS)],
)
def test_mlps_are_set_as_plain_hooks_set_them(family: str, engine: str) -> None:
    t = truth(family)
    with t.backbone.running():
        written = capture_mlps(t.backbone, t.prompts)
    assert [*written] == [0, 1, 2]
    own = torch.stack([written[layer] for layer in written], dim=1)
    values = 3.0 * own.flip(0).mean(0)
    versions = [Together(mlps=torch.full((1, *values.shape), torch.nan)) for _ in values]
    for layer, version in enumerate(versions):
        assert version.mlps is not None
        version.mlps[0, layer] = values[layer]
    backbone = t.backbone.in_float32()
    with backbone.running():
        edited = [
            joined([naive_together(backbone, p, y, {}, {}, mlps={layer: values[layer]}) for layer in range(3)])[None]
            for p, y in zip(t.prompts, t.targets, strict=True)
        ]
    true = Effects(t.injection.base, joined(edited))
    assert_same(gaps(ENGINES[engine](t.backbone).edit_together(Prompts(t.prompts, t.targets), versions), true))
    same = ENGINES[engine](t.backbone).edit_together(Prompts(t.prompts, t.targets), [Together(mlps=own)])
    assert_same_scores(same.edited, t.injection.base[:, None])


@pytest.mark.parametrize("kind", [_setting, _setting_mlp, _removing, _adding])
def test_an_edit_is_where_its_layer_computes(kind: Any) -> None:
    """Of two cards the second, for which a device stands in on which nothing is computed."""
    backbone, away = backbone_of(llama), torch.device("meta")
    arch = backbone.arch
    backbone = replace(backbone, cards=Cards((torch.device("cpu"), away), (torch.device("cpu"), away, away)))
    per_layer = torch.ones(1, arch.n_layers, arch.resid_dim)
    heads = torch.ones(1, arch.n_layers, arch.n_heads, arch.head_dim)
    version = Together(heads[..., 0] > 0, heads, added=per_layer, removed=per_layer, mlps=per_layer)
    edit = kind(backbone, [version], 1, slice(0, 1))
    width = arch.n_heads * arch.head_dim if kind is _setting else arch.resid_dim
    assert edit(torch.zeros(1, 2, width, device=away)).device == away


def test_the_first_layer_that_is_edited_is_found_whatever_the_edit() -> None:
    vectors = torch.zeros(2, 4, 8)
    vectors[1, 3] = 1.0  # of one prompt alone
    mlps = torch.full((1, 4, 8), torch.nan)
    mlps[0, 2] = 0.0  # set to zeros
    late = Together(added=vectors)
    assert first_edited([late]) == 3
    assert first_edited([late, Together(mlps=mlps)]) == 2
    assert first_edited([late, Together.setting([[HeadId(1, 0)]], torch.zeros(1, 4, 2, 4))]) == 1
    assert first_edited([Together()]) == 0
