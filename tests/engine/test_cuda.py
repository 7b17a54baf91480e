"""Kernels and pieces at work in whole models on a GPU, against plain hooks in strict float32."""

from __future__ import annotations

import pytest
import torch
from test_parity import FAST, all_heads, naive_injections, naive_sweep, prompts_of_different_length, replacements

from conftest import scale_up
from relfv.engine.base import Backbone
from relfv.engine.products import Pieces
from relfv.engine.selfcheck import choose_engine
from relfv.engine.sweep import SharedPrefixEngine
from relfv.models.families import resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(family: str, precision: str = "exact") -> Backbone:
    model = scale_up(FAST[family]()).to("cuda", torch.bfloat16)
    return Backbone.fastest(model, resolve(model, "auto"), torch.device("cuda"), precision)  # type: ignore[arg-type]


def gap(found, base, edited) -> float:  # type: ignore[no-untyped-def]
    """Largest error of delta_logprob, as a share of the largest effect."""
    true = edited.logprob - base.logprob[:, None]
    assert true.abs().max() > 0.5
    return float((found.edited.logprob - found.base.logprob[:, None] - true).abs().max() / true.abs().max())


@pytest.mark.parametrize("family", FAST)
def test_kernels_with_careful_pieces_equal_plain_hooks(family: str) -> None:
    backbone = on_gpu(family)
    assert backbone.split or "gpt2" in family  # GPT-2's Conv1D is no linear layer
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    careful = SharedPrefixEngine(backbone.careful())
    base, edited = naive_sweep(backbone, prompts, targets, values, heads)
    assert gap(careful.sweep_heads(prompts, targets, values, heads), base, edited) < 1e-4
    vectors = 0.5 * torch.randn(2, backbone.arch.resid_dim, generator=torch.Generator().manual_seed(2))
    base, edited = naive_injections(backbone, prompts, targets, vectors)
    found = careful.inject(prompts, targets, vectors, range(backbone.arch.n_layers))
    assert gap(found, base, edited) < 1e-4


@pytest.mark.parametrize("family", FAST)
def test_exact_is_closer_to_float32_than_the_checkpoints_own_dtype(family: str) -> None:
    exact, fast = on_gpu(family), on_gpu(family, "fast")
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(exact, prompts), all_heads(exact)
    truth = naive_sweep(exact, prompts, targets, values, heads)
    errors = [gap(SharedPrefixEngine(b).sweep_heads(prompts, targets, values, heads), *truth) for b in (exact, fast)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1]


@pytest.mark.parametrize("family", ["llama", "gemma3, window", "qwen3", "phi3", "gpt_neox"])
def test_the_self_check_accepts_the_kernels(family: str) -> None:
    engine, check = choose_engine(on_gpu(family), prompts_of_different_length()[0])
    assert engine.name == "shared_prefix"
    assert engine.backbone.fusions is not None, check.reason


def test_a_kernel_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from relfv.engine import kernels

    right = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, *rest: right(x, *rest) * 1.01)
    engine, _ = choose_engine(on_gpu("llama"), prompts_of_different_length()[0])
    assert engine.name == "shared_prefix"
    assert engine.backbone.fusions is None


def test_more_pieces_come_closer() -> None:
    from dataclasses import replace

    backbone = on_gpu("llama")
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    truth = naive_sweep(backbone, prompts, targets, values, heads)
    one, two = (
        gap(
            SharedPrefixEngine(replace(backbone, pieces=Pieces(3, 3, n))).sweep_heads(prompts, targets, values, heads),
            *truth,
        )
        for n in (1, 2)
    )
    assert two < one / 10
