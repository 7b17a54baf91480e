"""Both engines against the obvious way: one hooked, unpadded, whole forward pass per intervention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import llama, scale_up
from families_page import EVERY_MODEL, PAGE, first_table
from parity import (
    all_heads,
    assert_same,
    assert_same_scores,
    chosen_engine,
    gaps,
    injection_gaps,
    naive_base,
    naive_injections,
    naive_sweep,
    prompts_of_different_length,
    replacements,
    rounding,
    size,
    sweep_gaps,
    truth,
)
from relfv.engine import shared_prefix
from relfv.engine.clean import run_clean
from relfv.engine.interventions import MIN_EFFECT
from relfv.engine.passes import capture_heads
from relfv.engine.reference import ReferenceEngine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.models.architecture import text_config
from relfv.models.families import FAMILIES
from relfv.types import Prompts
from zoo import ZOO, backbone_of, plain_backbone

FAST = {name: animal.build for name, animal in ZOO.items() if animal.engine == "shared_prefix"}
SLOW = {name: animal.build for name, animal in ZOO.items() if animal.engine == "reference"}

LLAMA = "Llama 2, Llama 3: grouped keys"
WIDENED = [
    LLAMA,
    "GPT-2: Conv1D, learned positions",
    "Gemma 2: soft caps, window in some layers, norms after attention",
    "GPT-J: attends in its own code, partial rotary",
    "Falcon: ALiBi (rw)",
]


def each(names: Iterable[str]) -> list[Any]:
    """All of them, as parameters; ``make test-quick`` takes those in ``WIDENED``."""
    return [pytest.param(name, marks=() if name in WIDENED else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", each(FAST))
def test_shared_prefix_sweep_equals_one_hooked_forward_per_head(family: str) -> None:
    assert_same(sweep_gaps(family, "shared_prefix"))


@pytest.mark.parametrize("family", each(FAST))
def test_shared_prefix_injection_equals_one_hooked_forward_per_layer(family: str) -> None:
    assert_same(injection_gaps(family, "shared_prefix"))


@pytest.mark.parametrize("family", each(ZOO))
def test_reference_engine_equals_one_hooked_forward_per_intervention(family: str) -> None:
    assert_same(sweep_gaps(family, "reference"))
    assert_same(injection_gaps(family, "reference"))


@pytest.mark.parametrize("family", each(FAST))
def test_the_self_check_lets_the_fast_engine_through_where_it_is_right(family: str) -> None:
    engine, check = chosen_engine(family)
    assert engine.name == check.engine == "shared_prefix"
    assert check.max_error is not None
    assert check.max_error < 1e-3
    assert check.max_effect > MIN_EFFECT


@pytest.mark.parametrize("family", SLOW)
def test_the_self_check_falls_back_where_the_fast_engine_would_be_silently_wrong(family: str) -> None:
    engine, check = chosen_engine(family)
    assert engine.name == check.engine == "reference"
    assert check.reason


@pytest.mark.parametrize("engine_type", [SharedPrefixEngine, ReferenceEngine])
def test_some_heads_of_some_layers_are_the_same_numbers_as_all_heads(engine_type: Any) -> None:
    backbone = backbone_of(FAST[LLAMA])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    some = [head for head in heads if head.layer != 1 and head.head in (0, 3, 7)]
    engine = engine_type(backbone)
    whole = engine.sweep_heads(Prompts(prompts, targets), values, heads)
    part = engine.sweep_heads(Prompts(prompts, targets), values, some)
    columns = [heads.index(head) for head in some]
    assert_same_scores(part.edited, whole.edited[:, columns])


IDENTITY = [
    LLAMA,
    "Mistral: window",
    "Qwen3: query and key norms",
    "Phi-3, Phi-4: fused qkv, window",
    "GPT-NeoX, Pythia: fused qkv, parallel residual",
    "GPT-2: Conv1D, learned positions",
]
ARITHMETICS = {
    "fast bf16": (torch.bfloat16, "fast"),
    "exact, stored as bf16": (torch.bfloat16, "exact"),
    "exact": (torch.float32, "exact"),
    "float32 without TF32": (torch.float32, "float32"),
}


@pytest.mark.parametrize("how", ARITHMETICS)
@pytest.mark.parametrize("family", IDENTITY)
@pytest.mark.parametrize("engine_type", [SharedPrefixEngine, ReferenceEngine])
def test_a_head_replaced_by_its_own_value_has_an_effect_of_rounding_alone(
    family: str, how: str, engine_type: Any
) -> None:
    dtype, precision = ARITHMETICS[how]
    backbone = backbone_of(FAST[family], dtype)
    if precision == "float32":
        backbone = backbone.in_float32()
    else:
        backbone = replace(backbone, arithmetic=replace(backbone.arithmetic, precision=precision))
    found = engine_type(backbone).sweep_heads(Prompts(*prompts_of_different_length()), None, all_heads(backbone))
    base = found.base[:, None]
    if precision == "fast":
        # Where a sum lies between two bf16 numbers, rows may fall to different sides; most do not.
        assert_same_scores(found.edited, base, n=4, dtype=torch.bfloat16)
        assert float((found.edited.logprob - base.logprob).abs().median()) <= rounding(size(base))
    else:
        assert_same_scores(found.edited, base)


@pytest.mark.parametrize("family", each(ZOO))
def test_in_every_family_a_heads_own_value_has_an_effect_of_rounding_alone(family: str) -> None:
    backbone = truth(family).backbone
    prompts, targets = prompts_of_different_length()
    for engine_type in (SharedPrefixEngine, ReferenceEngine) if family in FAST else (ReferenceEngine,):
        found = engine_type(backbone).sweep_heads(Prompts(prompts, targets), None, all_heads(backbone))
        assert_same_scores(found.edited, found.base[:, None])


def test_a_heads_own_value_is_what_a_plain_forward_pass_captures() -> None:
    backbone = backbone_of(FAST[LLAMA])
    prompts, targets = prompts_of_different_length()
    with backbone.running():
        own = capture_heads(backbone, prompts[:1])[0][0]
    found = SharedPrefixEngine(backbone).sweep_heads(Prompts(prompts[:1], targets[:1]), own, all_heads(backbone))
    assert_same_scores(found.edited, found.base[:, None])


@pytest.mark.parametrize("engine_type", [SharedPrefixEngine, ReferenceEngine])
@pytest.mark.parametrize("per_pass", [None, 2])
def test_layers_and_prompts_may_have_their_own_vectors(engine_type: Any, per_pass: int | None) -> None:
    t = truth(LLAMA)
    layers, engine = [0, 2], engine_type(t.backbone)
    own = torch.randn(2, len(t.prompts), 3, t.backbone.arch.resid_dim, generator=torch.Generator().manual_seed(3))
    found = engine.inject(Prompts(t.prompts, t.targets), [own], layers, per_pass=per_pass)
    for i, layer in enumerate(layers):
        for n in range(len(t.prompts)):
            alone = engine.inject(Prompts(t.prompts[n : n + 1], t.targets[n : n + 1]), own[i, n], [layer])
            assert_same_scores(found.edited[n, 3 * i : 3 * i + 3], alone.edited[0])
    parts = [own[:, :, :1], own[:1, :, 1:2], own[:, :1, 2:], own[:1, :1, :2]]
    whole = torch.cat([part.expand(2, len(t.prompts), -1, -1) for part in parts], dim=2)
    one_by_one = engine.inject(Prompts(t.prompts, t.targets), parts, layers, per_pass=per_pass)
    together = engine.inject(Prompts(t.prompts, t.targets), [whole], layers, per_pass=per_pass)
    assert torch.equal(one_by_one.edited.logprob, together.edited.logprob)


def test_coming_back_to_prompts_gives_the_same_bits_without_running_their_prefix_again() -> None:
    t = truth(LLAMA)
    heads, engine, other = all_heads(t.backbone), SharedPrefixEngine(t.backbone), list(reversed(t.prompts))
    seen: list[int] = []
    count = t.backbone.decoder.register_forward_pre_hook(
        lambda _, __, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        first = engine.sweep_heads(Prompts(t.prompts, t.targets), t.values, heads)
        engine.sweep_heads(Prompts(other, t.targets), t.values, heads)
        anew = engine.inject(Prompts(t.prompts, t.targets), t.vectors, [1])
        kept = engine.inject(Prompts(t.prompts, t.targets), t.vectors, [1])
        again = engine.sweep_heads(Prompts(t.prompts, t.targets), t.values, heads)
    finally:
        count.remove()
    longest = max(len(prompt) for prompt in t.prompts)
    assert seen == [longest - 1, 1, longest - 1, 1, longest - 1, 1, 1, 1]
    assert torch.equal(again.edited.logprob, first.edited.logprob)
    assert torch.equal(kept.edited.logprob, anew.edited.logprob)


def test_the_prefixes_of_all_passes_are_run_at_once_unless_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trip through the model, where each pass had its own; what comes out is what each pass made of its own."""
    t = truth(LLAMA)
    engine, seen = SharedPrefixEngine(t.backbone), list[tuple[int, ...]]()
    prompts, heads = Prompts(t.prompts, t.targets), sorted(20 * all_heads(t.backbone))
    count = t.backbone.decoder.register_forward_pre_hook(
        lambda _, __, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        together = engine.sweep_heads(prompts, t.values, heads, per_pass=1)
        n, longest = len(prompts), max(len(prompt) for prompt in t.prompts)
        assert seen == [(n, longest - 1), *[(1, 1)] * n]
        seen.clear()
        monkeypatch.setattr(shared_prefix, "_PREFIXES", 0)
        apart = SharedPrefixEngine(t.backbone).sweep_heads(prompts, t.values, heads, per_pass=1)
        assert seen == [shape for ids in t.prompts for shape in ((1, len(ids) - 1), (1, 1))]
    finally:
        count.remove()
    assert_same_scores(together.edited, apart.edited)


def test_prompts_do_not_depend_on_what_shares_their_batch() -> None:
    backbone = backbone_of(FAST["Mistral: window"])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    engine = SharedPrefixEngine(backbone)
    together = engine.sweep_heads(Prompts(prompts, targets), values, heads)
    for i in range(len(prompts)):
        alone = engine.sweep_heads(Prompts(prompts[i : i + 1], targets[i : i + 1]), values, heads)
        assert_same_scores(together.edited[i], alone.edited[0])


@pytest.mark.parametrize("family", WIDENED)
def test_a_bf16_checkpoint_in_exact_precision_gives_the_float32_numbers_of_its_weights(family: str) -> None:
    stored = backbone_of(FAST[family], torch.bfloat16)
    wide_model = scale_up(FAST[family]()).to(torch.bfloat16).float()
    wide = plain_backbone(wide_model)
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(wide, prompts), all_heads(wide)
    targets = naive_base(wide, prompts, targets).top_id.tolist()
    found = SharedPrefixEngine(stored).sweep_heads(Prompts(prompts, targets), values, heads)
    assert_same(gaps(found, naive_sweep(wide, prompts, targets, values)))
    assert all(p.dtype == torch.bfloat16 for p in stored.model.parameters())


def test_fast_precision_computes_in_the_checkpoints_dtype() -> None:
    exact = backbone_of(FAST[LLAMA], torch.bfloat16)
    fast = plain_backbone(exact.model, "fast")
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(exact, prompts), all_heads(exact)
    a = SharedPrefixEngine(exact).sweep_heads(Prompts(prompts, targets), values, heads).edited.logprob
    b = SharedPrefixEngine(fast).sweep_heads(Prompts(prompts, targets), values, heads).edited.logprob
    gap = (a - b).abs().max()
    assert 1e-4 < gap < 1.0


def test_every_model_type_that_has_a_spec_is_tested() -> None:
    promised = {model_type for spec in FAMILIES.values() for model_type in spec.model_types}
    assert promised <= {text_config(animal.build().config).model_type for animal in ZOO.values()}


@pytest.mark.parametrize("family", [name for name, animal in ZOO.items() if animal.family in ("Nemotron", "Helium")])
def test_an_architecture_that_no_spec_names_is_measured_all_the_same(family: str) -> None:
    assert truth(family).backbone.arch.family == "generic"
    assert_same(sweep_gaps(family, "shared_prefix"))


ROTARIES = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTARIES)
@pytest.mark.parametrize("lengths", [(15, 9), (17, 9), (23, 21), (16, 17)])
def test_rotary_frequencies_that_depend_on_the_length_of_the_call(kind: str, lengths: tuple[int, int]) -> None:
    rotary = {"rope_theta": 10000.0, "original_max_position_embeddings": 16, **ROTARIES[kind]}
    backbone = backbone_of(lambda: llama(300, head_dim=12, max_position_embeddings=16, rope_parameters=rotary))
    assert backbone.arch.steady_up_to == 16
    prompts = [[(7 * i + n) % 290 for i in range(n)] for n in lengths]
    targets = naive_base(backbone, prompts, [5, 5]).top_id.tolist()
    values = replacements(backbone, [prompts[0], prompts[0]])
    found = SharedPrefixEngine(backbone).sweep_heads(Prompts(prompts, targets), values, all_heads(backbone))
    assert_same_scores(found.edited, naive_sweep(backbone, prompts, targets, values).edited)
    vector = torch.ones(1, backbone.arch.resid_dim)
    layers = range(backbone.arch.n_layers)
    found = SharedPrefixEngine(backbone).inject(Prompts(prompts, targets), vector, layers)
    assert_same_scores(found.edited, naive_injections(backbone, prompts, targets, vector).edited)
    assert_same_scores(found.base, run_clean(backbone, Prompts(prompts, targets)).scores)


@pytest.mark.slow
def test_the_page_of_families_is_what_was_found(request: pytest.FixtureRequest) -> None:
    """Here, where the process knows it from the tests above. The page's second table is that of test_every_lm.py."""
    there, title, rest = PAGE.read_text(encoding="utf-8").partition(EVERY_MODEL)
    if request.config.getoption("--write-families"):
        PAGE.write_text(first_table() + title + rest, encoding="utf-8")
    else:
        assert there == first_table()
