"""What is recognised as fusible, on real modules of transformers; the kernels themselves are tested elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from relfv.engine.arithmetic.fusion import as_activation, as_gated_mlp, as_norm, recognise, rotates_halves
from relfv.models.architecture import resolve

LLAMA = tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
GEMMA = tf.GemmaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
CPU = torch.device("cpu")


def with_random_weights(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_told_apart_by_what_they_compute(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        llama = as_norm(with_random_weights(modeling_llama.LlamaRMSNorm(32, eps=1e-5)).to(dtype), CPU)
        assert (llama.eps, llama.offset) == (1e-5, 0.0)
        gemma = as_norm(with_random_weights(GemmaRMSNorm(32)).to(dtype), CPU)
        assert gemma.offset == 1.0
        assert as_norm(nn.LayerNorm(32), CPU) is None
        assert as_norm(nn.Linear(32, 32), CPU) is None


def test_a_norm_with_another_formula_keeps_its_own_code() -> None:
    class Lookalike(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 0.01

    class OtherEpsilon(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return (
                self.weight
                * hidden_states
                / (hidden_states.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
            )

    class Raising(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    with torch.inference_mode():
        assert as_norm(with_random_weights(Lookalike(32)), CPU) is None
        assert as_norm(with_random_weights(OtherEpsilon(32)), CPU) is None
        assert as_norm(with_random_weights(Raising(32)), CPU) is None


def test_gated_mlps_are_told_apart_by_their_activation() -> None:
    with torch.inference_mode():
        assert as_gated_mlp(with_random_weights(modeling_llama.LlamaMLP(LLAMA)), CPU).activation == "silu"
        assert as_gated_mlp(with_random_weights(GemmaMLP(GEMMA)), CPU).activation == "gelu_tanh"
        assert as_gated_mlp(modeling_llama.LlamaAttention(LLAMA, 0), CPU) is None


def test_a_gated_mlp_with_another_formula_keeps_its_own_code() -> None:
    class Clamped(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    class ClampedLate(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=50.0)) * self.up_proj(x))

    relu = tf.LlamaConfig(**{**LLAMA.to_dict(), "hidden_act": "relu"})
    with torch.inference_mode():
        assert as_gated_mlp(with_random_weights(Clamped(LLAMA)), CPU) is None
        assert as_gated_mlp(with_random_weights(ClampedLate(LLAMA)), CPU) is None
        assert as_gated_mlp(with_random_weights(modeling_llama.LlamaMLP(relu)), CPU) is None


def test_activations_are_told_apart_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    expected = {
        "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "gelu_10": None, "quick_gelu": None, "relu2": None,  # noqa: E501
    }  # fmt: skip
    assert {name: as_activation(ACT2FN[name], "cpu") for name in expected} == expected
    assert as_activation(nn.Tanh(), "cpu") is None


def test_rotary_functions_are_told_apart_by_what_they_compute() -> None:
    arch = resolve(tf.LlamaForCausalLM(LLAMA), "auto")
    assert rotates_halves(modeling_llama, arch)
    assert rotates_halves(modeling_gpt_neox, arch)
    assert not rotates_halves(modeling_glm4, arch)  # pairs neighbours
    assert not rotates_halves(SimpleNamespace(), arch)


def test_without_a_gpu_nothing_is_replaced() -> None:
    model = tf.LlamaForCausalLM(LLAMA)
    assert recognise(model, resolve(model, "auto")) is None
