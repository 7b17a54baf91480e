"""Both engines against the obvious way: one hooked, unpadded, whole forward pass per intervention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from conftest import llama, scale_up
from relfv.engine.base import Backbone, capture_heads
from relfv.engine.reference import ReferenceEngine, naive_baseline, naive_head_patch, naive_injection
from relfv.engine.selfcheck import MIN_EFFECT, choose_engine
from relfv.engine.sweep import SharedPrefixEngine
from relfv.models.families import resolve
from relfv.types import HeadId

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
# bos/eos defaults of these configs lie outside a tiny vocabulary; they are not used here
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAST: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(300),
    "llama, sharing no keys": lambda: llama(300, num_key_value_heads=8),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2_LIKE)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, intermediate_size=64)),
    "mistral, window shorter than the prompt": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**GROUPED, sliding_window=6)
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=20)),
    "gemma2, soft caps and window": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, head_dim=20, sliding_window=6)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, pad_token_id=0)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "granite, scaled logits": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**GROUPED, logits_scaling=2.0)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, head_dim=20)),
    "gemma3, window": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=20, sliding_window=6)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**GROUPED, head_dim=20, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**GROUPED)),
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**GROUPED)),
    "cohere, scaled logits": lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED, logit_scale=0.5)),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**GROUPED)),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**GROUPED, partial_rotary_factor=0.5)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(
        tf.SmolLM3Config(**GROUPED, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    ),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**GROUPED, head_dim=12, pad_token_id=0, eos_token_id=0)),
    "gpt_oss, sinks and window": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**GROUPED, head_dim=12, sliding_window=6, num_local_experts=4, pad_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=48, max_position_embeddings=64)
    ),
}
SLOW: dict[str, Callable[[], Any]] = {
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT2_LIKE, rotary_dim=4)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**GPT2_LIKE, rotary_dim=4)),
    "gpt_neo, local window": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=300,
            hidden_size=48,
            num_layers=3,
            num_heads=4,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=6,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=3, n_head=4)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL)),
}


def backbone_of(build: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Backbone:
    model = scale_up(build()).to(dtype)
    return Backbone(model, resolve(model, "auto"), torch.device("cpu"), "exact")


def prompts_of_different_length() -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in (23, 9, 17)]
    return prompts, [5, 17, 123]


def replacements(backbone: Backbone, prompts: list[list[int]]) -> torch.Tensor:
    """What the heads do on other prompts, enlarged."""
    backbone = backbone.strict()
    with backbone.running():
        return 3.0 * capture_heads(backbone, prompts)[0].flip(0).mean(0)


def assert_same_effects(found, base, edited) -> None:  # type: ignore[no-untyped-def]
    """1e-5 in delta_p, 1e-4 in delta_logprob, and effects that could have been missed."""
    delta_p = found.edited.p - found.base.p[:, None]
    true_delta_p = edited.p - base.p[:, None]
    assert (delta_p - true_delta_p).abs().max() < 1e-5
    delta_logprob = found.edited.logprob - found.base.logprob[:, None]
    true_delta_logprob = edited.logprob - base.logprob[:, None]
    assert (delta_logprob - true_delta_logprob).abs().max() < 1e-4
    assert true_delta_logprob.abs().max() > 0.5
    assert (found.edited.top_id == edited.top_id).float().mean() > 0.99


def naive_sweep(backbone: Backbone, prompts, targets, values, heads):  # type: ignore[no-untyped-def]
    from relfv.types import TokenScores

    backbone = backbone.strict()
    with backbone.running():
        base = TokenScores.cat([naive_baseline(backbone, p, t) for p, t in zip(prompts, targets, strict=True)])
        rows = [
            TokenScores.cat([naive_head_patch(backbone, p, t, h, values[h.layer, h.head]) for h in heads])[None]
            for p, t in zip(prompts, targets, strict=True)
        ]
    return base, TokenScores.cat(rows)


def naive_injections(backbone: Backbone, prompts, targets, vectors):  # type: ignore[no-untyped-def]
    from relfv.types import TokenScores

    layers = range(backbone.arch.n_layers)
    backbone = backbone.strict()
    with backbone.running():
        base = TokenScores.cat([naive_baseline(backbone, p, t) for p, t in zip(prompts, targets, strict=True)])
        rows = [
            TokenScores.cat([naive_injection(backbone, p, t, layer, v) for layer in layers for v in vectors])[None]
            for p, t in zip(prompts, targets, strict=True)
        ]
    return base, TokenScores.cat(rows)


def all_heads(backbone: Backbone) -> list[HeadId]:
    return [HeadId(layer, head) for layer in range(backbone.arch.n_layers) for head in range(backbone.arch.n_heads)]


@pytest.mark.parametrize("family", FAST)
def test_shared_prefix_sweep_equals_one_hooked_forward_per_head(family: str) -> None:
    backbone = backbone_of(FAST[family])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    found = SharedPrefixEngine(backbone).sweep_heads(prompts, targets, values, heads)
    assert_same_effects(found, *naive_sweep(backbone, prompts, targets, values, heads))


@pytest.mark.parametrize("family", FAST)
def test_shared_prefix_injection_equals_one_hooked_forward_per_layer(family: str) -> None:
    backbone = backbone_of(FAST[family])
    prompts, targets = prompts_of_different_length()
    vectors = 8.0 * torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
    found = SharedPrefixEngine(backbone).inject(prompts, targets, vectors, range(3))
    assert_same_effects(found, *naive_injections(backbone, prompts, targets, vectors))


@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_reference_engine_equals_one_hooked_forward_per_intervention(family: str) -> None:
    backbone = backbone_of((FAST | SLOW)[family])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    vectors = 8.0 * torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
    engine = ReferenceEngine(backbone)
    assert_same_effects(
        engine.sweep_heads(prompts, targets, values, heads), *naive_sweep(backbone, prompts, targets, values, heads)
    )
    assert_same_effects(
        engine.inject(prompts, targets, vectors, range(3)), *naive_injections(backbone, prompts, targets, vectors)
    )


@pytest.mark.parametrize("family", FAST)
def test_the_self_check_lets_the_fast_engine_through_where_it_is_right(family: str) -> None:
    prompts, _ = prompts_of_different_length()
    engine, check = choose_engine(backbone_of(FAST[family]), prompts)
    assert engine.name == check.engine == "shared_prefix"
    assert check.max_error is not None
    assert check.max_error < 1e-3
    assert check.max_effect > MIN_EFFECT


@pytest.mark.parametrize("family", SLOW)
def test_the_self_check_falls_back_where_the_fast_engine_would_be_silently_wrong(family: str) -> None:
    prompts, _ = prompts_of_different_length()
    engine, check = choose_engine(backbone_of(SLOW[family]), prompts)
    assert engine.name == check.engine == "reference"
    assert check.reason


@pytest.mark.parametrize("engine_type", [SharedPrefixEngine, ReferenceEngine])
def test_some_heads_of_some_layers_are_the_same_numbers_as_all_heads(engine_type: Any) -> None:
    backbone = backbone_of(FAST["llama"])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    some = [head for head in heads if head.layer != 1 and head.head in (0, 3, 7)]
    engine = engine_type(backbone)
    whole = engine.sweep_heads(prompts, targets, values, heads)
    part = engine.sweep_heads(prompts, targets, values, some)
    columns = [heads.index(head) for head in some]
    assert torch.allclose(part.edited.logprob, whole.edited.logprob[:, columns], atol=1e-5)


def test_a_head_patched_with_its_own_value_has_no_effect() -> None:
    backbone = backbone_of(FAST["llama"])
    prompts, targets = prompts_of_different_length()
    with backbone.running():
        own = capture_heads(backbone, prompts[:1])[0][0]
    found = SharedPrefixEngine(backbone).sweep_heads(prompts[:1], targets[:1], own, all_heads(backbone))
    assert (found.edited.logprob - found.base.logprob[:, None]).abs().max() < 2e-5


def test_prompts_do_not_depend_on_what_shares_their_batch() -> None:
    backbone = backbone_of(FAST["mistral, window shorter than the prompt"])
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(backbone, prompts), all_heads(backbone)
    engine = SharedPrefixEngine(backbone)
    together = engine.sweep_heads(prompts, targets, values, heads)
    for i in range(len(prompts)):
        alone = engine.sweep_heads(prompts[i : i + 1], targets[i : i + 1], values, heads)
        assert torch.allclose(alone.edited.logprob[0], together.edited.logprob[i], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2, soft caps and window"])
def test_a_bf16_checkpoint_in_exact_precision_gives_the_float32_numbers_of_its_weights(family: str) -> None:
    stored = backbone_of(FAST[family], torch.bfloat16)
    wide_model = scale_up(FAST[family]()).to(torch.bfloat16).float()
    wide = Backbone(wide_model, resolve(wide_model, "auto"), torch.device("cpu"), "exact")
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(wide, prompts), all_heads(wide)
    found = SharedPrefixEngine(stored).sweep_heads(prompts, targets, values, heads)
    assert_same_effects(found, *naive_sweep(wide, prompts, targets, values, heads))
    assert all(p.dtype == torch.bfloat16 for p in stored.model.parameters())


def test_fast_precision_computes_in_the_checkpoints_dtype() -> None:
    exact = backbone_of(FAST["llama"], torch.bfloat16)
    fast = Backbone(exact.model, exact.arch, exact.device, "fast")
    prompts, targets = prompts_of_different_length()
    values, heads = replacements(exact, prompts), all_heads(exact)
    a = SharedPrefixEngine(exact).sweep_heads(prompts, targets, values, heads).edited.logprob
    b = SharedPrefixEngine(fast).sweep_heads(prompts, targets, values, heads).edited.logprob
    gap = (a - b).abs().max()
    assert 1e-4 < gap < 1.0
