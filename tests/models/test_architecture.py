from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from conftest import llama, scale_up
from parity import assert_close
from relfv.models.architecture import resolve

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


def gpt2():  # type: ignore[no-untyped-def]
    config = tf.GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    return scale_up(tf.GPT2LMHeadModel(config))


def test_head_dim_comes_from_the_projection_and_not_from_hidden_size() -> None:
    arch = resolve(llama(300), "llama3")
    assert (arch.n_layers, arch.n_heads, arch.head_dim, arch.resid_dim) == (3, 8, 10, 48)


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (lambda: llama(300), 64),
        (
            lambda: tf.OPTForCausalLM(tf.OPTConfig(vocab_size=300, hidden_size=48, ffn_dim=56, num_attention_heads=4)),
            56,
        ),
        (gpt2, 4 * 48),
    ],
)
def test_the_width_of_the_mlp_is_known_under_each_of_its_names_and_four_times_the_stream_without_one(
    build: Callable[[], Any], width: int
) -> None:
    assert resolve(build(), "auto").intermediate_size == width


@pytest.mark.parametrize("build", [lambda: llama(300), gpt2])
def test_projected_heads_and_the_bias_once_make_the_projections_output(build) -> None:  # type: ignore[no-untyped-def]
    arch = resolve(build(), "auto")
    projection = arch.out_projs[1]
    z = torch.randn(1, 1, arch.n_heads * arch.head_dim)
    heads = z.view(arch.n_heads, arch.head_dim)
    total = torch.stack([arch.project_head(1, h, heads[h]) for h in range(arch.n_heads)]).sum(0)
    bias = getattr(projection, "bias", None)
    with torch.no_grad():
        expected = projection(z)[0, 0].double() - (0 if bias is None else bias.double())
    assert_close(total, expected)
    if bias is not None:
        assert bias.abs().max() > 0.01


@pytest.mark.parametrize("build", [lambda: llama(300), gpt2])
@pytest.mark.parametrize("packed", [False, True])
def test_several_heads_are_projected_as_one_after_the_other(build, packed: bool) -> None:  # type: ignore[no-untyped-def]
    arch = resolve(build(), "auto")
    if packed:  # what has no weight that can be read goes through the module
        weightless = torch.nn.Sequential(arch.out_projs[1])
        arch = replace(arch, out_projs={**arch.out_projs, 1: weightless})
    z = torch.randn(2, 3, arch.head_dim)
    expected = torch.stack([arch.project_head(1, head, z[:, i]) for i, head in enumerate([3, 0, 2])]).sum(0)
    assert_close(arch.project_heads(1, [3, 0, 2], z), expected)
    assert expected.abs().max() > 0.01


def test_an_architecture_without_a_spec_is_found_by_its_shape() -> None:
    config = tf.BioGptConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    arch = resolve(tf.BioGptForCausalLM(config), "auto")
    assert arch.family == "generic"
    assert (arch.n_layers, arch.n_heads, arch.head_dim) == (3, 4, 12)
    assert arch.notes


def test_final_logits_repeat_what_the_model_does() -> None:
    config = tf.Gemma2Config(**SMALL, head_dim=16)
    model = scale_up(tf.Gemma2ForCausalLM(config))
    arch = resolve(model, "auto")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        raw = arch.lm_head(model.base_model(input_ids=ids)[0])
        assert_close(arch.final_logits(raw), model(input_ids=ids).logits)
        assert (arch.final_logits(raw) - raw).abs().max() > 0.01


def test_a_float8_weight_is_projected_by_its_module_and_never_as_raw_codes() -> None:
    """Its scale is kept beside it: this module stores codes a hundred times too large and a scale that undoes it."""

    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = inner.in_features, inner.out_features, None
            self.weight = torch.nn.Parameter((inner.weight.detach() * 100).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.float() / 100).T

    model = llama(300)
    plain = resolve(model, "auto")
    z = torch.randn(10)
    expected = plain.project_head(1, 3, z)
    model.model.layers[1].self_attn.o_proj = Scaled(model.model.layers[1].self_attn.o_proj)
    found = resolve(model, "auto").project_head(1, 3, z)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_families_that_norm_or_scale_what_attention_writes_say_so() -> None:
    config = tf.Olmo2Config(**SMALL)
    assert "norms what attention writes" in resolve(tf.Olmo2ForCausalLM(config), "auto").notes[0]
    config = tf.GraniteConfig(**SMALL, residual_multiplier=0.22)
    assert "multiplies by 0.22" in resolve(tf.GraniteForCausalLM(config), "auto").notes[0]
    assert resolve(llama(300), "auto").notes == ()


def test_soft_caps_and_embeddings_whose_scale_is_rounded_are_noted() -> None:
    config: dict[str, Any] = {**SMALL, "hidden_size": 40, "head_dim": 12, "pad_token_id": 0}
    (_, capped) = resolve(tf.Gemma2ForCausalLM(tf.Gemma2Config(**config)), "auto").notes
    assert "caps its logits softly at 30" in capped
    model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**config))
    assert len(resolve(model, "auto").notes) == 1
    (_, rounded) = resolve(model.to(torch.bfloat16), "auto").notes
    assert "scales its embeddings by 6.32456, which its weights' torch.bfloat16 rounds to 6.3125" in rounded


def test_the_norm_after_attention_is_found_and_the_one_before_the_mlp_is_not_taken_for_it() -> None:
    arch = resolve(tf.Olmo2ForCausalLM(tf.Olmo2Config(**SMALL)), "auto")
    assert arch.attention_norms == {i: block.post_attention_layernorm for i, block in enumerate(arch.blocks)}
    assert resolve(llama(300), "auto").attention_norms is None
