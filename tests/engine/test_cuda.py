"""Kernels and pieces at work in whole models on a GPU, against hooks in plain float32."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import scale_up
from parity import all_heads, naive_base, naive_injections, naive_sweep, prompts_of_different_length, replacements
from relfv.engine.answers import score_answers
from relfv.engine.arithmetic import Arithmetic, Precision, kernels
from relfv.engine.arithmetic.products import Pieces
from relfv.engine.attention import Prefix
from relfv.engine.base import Backbone
from relfv.engine.prefix import Prefill
from relfv.engine.selfcheck import choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.models.architecture import resolve
from relfv.types import Effects, Prompts
from zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAST = [name for name, animal in ZOO.items() if animal.engine == "shared_prefix"]
LLAMA = "Llama 2, Llama 3: grouped keys"
PROMPTS, _ = prompts_of_different_length()


def on_gpu(name: str, precision: Precision = "exact") -> Backbone:
    """The zoo's model, stored in bf16."""
    model = scale_up(ZOO[name].build()).to("cuda", torch.bfloat16)
    arch = resolve(model, "auto")
    return Backbone(model, arch, torch.device("cuda"), Arithmetic.with_kernels(model, arch, precision))


class Truth:
    """Head sweep and injections by hooks in plain float32."""

    def __init__(self, name: str) -> None:
        self.backbone = on_gpu(name)
        self.targets = naive_base(self.backbone, PROMPTS, [0] * len(PROMPTS)).top_id.tolist()
        self.values = replacements(self.backbone, PROMPTS)
        self.sweep = naive_sweep(self.backbone, PROMPTS, self.targets, self.values)
        generator = torch.Generator().manual_seed(2)
        self.vectors = 2.0 * torch.randn(2, self.backbone.arch.resid_dim, generator=generator)
        self.injection = naive_injections(self.backbone, PROMPTS, self.targets, self.vectors)

    def sweep_error(self, backbone: Backbone) -> float:
        engine = SharedPrefixEngine(backbone)
        return error(engine.sweep_heads(Prompts(PROMPTS, self.targets), self.values, all_heads(backbone)), self.sweep)

    def injection_error(self, backbone: Backbone) -> float:
        layers = range(backbone.arch.n_layers)
        return error(
            SharedPrefixEngine(backbone).inject(Prompts(PROMPTS, self.targets), self.vectors, layers), self.injection
        )


truth = cache(Truth)


def error(found: Effects, true: Effects) -> float:
    """Root mean square error of delta_logprob, as a share of its root mean square."""
    deltas = [torch.from_numpy(of.delta("logprob")) for of in (found, true)]
    assert deltas[1].abs().max() > 0.2
    return float((deltas[0] - deltas[1]).norm() / deltas[1].norm())


@pytest.mark.parametrize("family", FAST)
def test_kernels_with_three_pieces_equal_plain_hooks(family: str) -> None:
    t = truth(family)
    assert t.sweep_error(t.backbone.in_float32()) < 1e-4
    assert t.injection_error(t.backbone.in_float32()) < 1e-4


@pytest.mark.parametrize("family", FAST)
def test_exact_is_closer_to_float32_than_the_checkpoints_own_dtype(family: str) -> None:
    t, fast = truth(family), on_gpu(family, "fast")
    assert t.sweep_error(t.backbone) < min(0.02, t.sweep_error(fast))
    assert t.injection_error(t.backbone) < min(0.02, t.injection_error(fast))


@pytest.mark.parametrize("family", FAST)
def test_the_self_check_accepts_the_kernels(family: str) -> None:
    engine, check = choose_engine(truth(family).backbone, PROMPTS)
    assert engine.name == "shared_prefix"
    assert engine.backbone.arithmetic.fusions is not None, check.reason


def test_a_kernel_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, *rest: right(x, *rest) * 1.01)
    engine, _ = choose_engine(on_gpu(LLAMA), PROMPTS)
    assert engine.name == "shared_prefix"
    assert engine.backbone.arithmetic.fusions is None


def test_more_pieces_come_closer() -> None:
    t = truth(LLAMA)
    made = [replace(t.backbone.arithmetic, pieces=Pieces(3, 3, n)) for n in (1, 2)]
    one, two = (t.sweep_error(replace(t.backbone, arithmetic=arithmetic)) for arithmetic in made)
    assert two < one / 10


@pytest.mark.parametrize("family", [LLAMA, "Mistral: window", "Phi-3, Phi-4: fused qkv, window"])
def test_a_prefix_by_the_kernel_is_what_the_model_caches(family: str) -> None:
    backbone = on_gpu(family)
    found, cached = (made(backbone.in_float32()) for made in (prefix, lambda one: prefix(one.plain())))
    for layers, expected in ((found.keys, cached.keys), (found.values, cached.values)):
        for layer, of_layer in layers.items():
            assert of_layer.untyped_storage().nbytes() == of_layer.nbytes
            for n, prompt in enumerate(PROMPTS):
                rows = slice(len(prompt) - 1)
                torch.testing.assert_close(of_layer[n, :, rows], expected[layer][n, :, rows], rtol=1e-4, atol=1e-4)


def prefix(backbone: Backbone) -> Prefix:
    with backbone.running():
        return Prefill(backbone, PROMPTS).run()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    "family", [LLAMA, "Mistral: window", "Qwen3: query and key norms", "GPT-2: Conv1D, learned positions"]
)
def test_a_head_given_its_own_value_has_an_effect_of_exactly_zero(family: str, precision: Precision) -> None:
    backbone = on_gpu(family, precision)
    for variant in (backbone, backbone.plain(), backbone.plain().in_float32()):
        found = SharedPrefixEngine(variant).sweep_heads(Prompts(PROMPTS, [5, 17, 123]), None, all_heads(backbone))
        assert torch.equal(found.edited.logprob, found.base.logprob[:, None].expand_as(found.edited.logprob))


@pytest.mark.parametrize("family", [LLAMA, "Mistral: window", "Qwen3: query and key norms"])
def test_whole_answers_by_the_kernels_are_those_of_plain_pytorch(family: str) -> None:
    backbone, answers = on_gpu(family).in_float32(), [[5, 9, 7], [11], [3, 30]]
    found, expected = (score_answers(some, PROMPTS, answers) for some in (backbone, backbone.plain()))
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-3)


def test_heads_are_projected_without_waiting_for_the_gpu() -> None:
    arch = on_gpu(LLAMA).arch
    z = torch.ones(2, 2, arch.head_dim)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = arch.project_heads(1, [0, 2], z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sum(arch.project_head(1, head, z[:, 0]) for head in (0, 2))
    torch.testing.assert_close(found.cpu(), expected)
