"""A tiny random model of every family, with the features that could go wrong: what docs/families.md is made from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from conftest import llama, scale_up
from relfv.engine.arithmetic import Arithmetic, Precision
from relfv.engine.base import Backbone
from relfv.models.architecture import resolve

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
# bos/eos/pad defaults of some configs lie outside a tiny vocabulary; they are not used here
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2_LIKE: dict[str, Any] = {"vocab_size": 300, "n_embd": 48, "n_layer": 3, "n_head": 4, **IDS}
# The tests' prompts have 9 to 23 tokens.
WINDOW: dict[str, Any] = {"sliding_window": 6}
ALTERNATING: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Tied to embeddings this large, a random Gemma's head is always certain of the token that it has just read.
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Animal:
    """One tiny model."""

    family: str
    """Its row in docs/families.md."""
    build: Callable[[], Any]
    special: str = ""
    """What it tests beside the family's plain form."""
    engine: str = "shared_prefix"
    """The engine that the self-check must choose."""

    @property
    def name(self) -> str:
        """``Family`` or ``Family: what is special``."""
        return f"{self.family}: {self.special}" if self.special else self.family


def _gpt_neo() -> Any:
    layers: dict[str, Any] = {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]}
    return tf.GPTNeoForCausalLM(tf.GPTNeoConfig(vocab_size=300, hidden_size=48, window_size=6, **layers, **IDS))


def _opt(**changes: Any) -> Any:
    config = {"ffn_dim": 64, "word_embed_proj_dim": 48, "max_position_embeddings": 64, **changes}
    return tf.OPTForCausalLM(tf.OPTConfig(**SMALL, **config, **IDS))


def _falcon(**changes: Any) -> Any:
    return tf.FalconForCausalLM(tf.FalconConfig(**{**SMALL, **IDS, **changes}))


def _stablelm(**changes: Any) -> Any:
    return tf.StableLmForCausalLM(tf.StableLmConfig(**GROUPED, **IDS, partial_rotary_factor=0.5, **changes))


def _neox(**changes: Any) -> Any:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, **IDS, intermediate_size=64, **changes))


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# Configs write into what they are given, hence the copies below.
MULTI_AXIS: dict[str, Any] = {
    **GROUPED,
    **IDS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
}


def _gemma3_with_vision() -> Any:
    text = tf.Gemma3TextConfig(**GROUPED, **IDS, **ALTERNATING, **UNTIED, head_dim=20)
    config = tf.Gemma3Config(text_config=text, vision_config=VISION, **UNTIED, mm_tokens_per_image=1)
    return tf.Gemma3ForConditionalGeneration(config)


def _llava() -> Any:
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**GROUPED), vision_config=tf.CLIPVisionConfig(**VISION))
    return tf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 8}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=copy.deepcopy(MULTI_AXIS), vision_config=vision)
    )


def _qwen2_5_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 8}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=copy.deepcopy(MULTI_AXIS), vision_config=vision)
    )


_ANIMALS = (
    Animal("Llama 2, Llama 3", lambda: llama(300), "grouped keys"),
    Animal("Llama 2, Llama 3", lambda: llama(300, num_key_value_heads=8), "ungrouped keys"),
    Animal("Llama 2, Llama 3", lambda: llama(300, attention_bias=True, mlp_bias=True), "biases"),
    Animal(
        "Mistral",
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, **WINDOW, head_dim=20)),
        "window",
    ),
    Animal(
        "Ministral",
        lambda: tf.MinistralForCausalLM(tf.MinistralConfig(**GROUPED, **ALTERNATING, head_dim=20)),
        "window in some layers",
    ),
    Animal(
        "Mixtral",
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, **WINDOW, num_local_experts=4)),
        "window, experts",
    ),
    Animal("Qwen2", lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, **IDS)), "query and key biases"),
    Animal(
        "Qwen2",
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, **IDS, **ALTERNATING, use_sliding_window=True)),
        "window in some layers",
    ),
    Animal(
        "Qwen2-MoE",
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(**GROUPED, **IDS, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32)
        ),
        "experts, shared expert",
    ),
    Animal("Qwen3", lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, **IDS, head_dim=20)), "query and key norms"),
    Animal(
        "Qwen3-MoE",
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**GROUPED, **IDS, **EXPERTS, head_dim=20, moe_intermediate_size=32)
        ),
        "query and key norms, experts",
    ),
    Animal("Gemma 1", lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, **IDS, head_dim=20)), "wide heads"),
    Animal(
        "Gemma 2",
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**GROUPED, **IDS, **ALTERNATING, **UNTIED, head_dim=20, attn_implementation="eager")
        ),
        "soft caps, window in some layers, norms after attention",
    ),
    Animal(
        "Gemma 3",
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, **IDS, **ALTERNATING, **UNTIED, head_dim=20)),
        "window in some layers, two rotary bases, norms after attention",
    ),
    Animal("Phi-1, Phi-2", lambda: tf.PhiForCausalLM(tf.PhiConfig(**GROUPED, **IDS)), "parallel residual"),
    Animal(
        "Phi-1, Phi-2",
        lambda: tf.PhiForCausalLM(tf.PhiConfig(**GROUPED, **IDS, qk_layernorm=True)),
        "query and key norms",
    ),
    Animal("Phi-3, Phi-4", lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, **IDS, **WINDOW)), "fused qkv, window"),
    Animal("OLMo 1", lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**GROUPED, **IDS, clip_qkv=1.5)), "clipped qkv"),
    Animal("OLMo 2", lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED, **IDS)), "norms after attention"),
    Animal(
        "OLMo 3",
        lambda: tf.Olmo3ForCausalLM(tf.Olmo3Config(**GROUPED, **IDS, **ALTERNATING)),
        "window in some layers, norms after attention",
    ),
    Animal(
        "OLMoE",
        lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**GROUPED, **IDS, **EXPERTS)),
        "experts",
    ),
    Animal(
        "Cohere",
        lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED, **IDS, logit_scale=0.5, use_qk_norm=True)),
        "scaled logits, parallel residual, query and key norms",
    ),
    Animal(
        "Cohere 2",
        lambda: tf.Cohere2ForCausalLM(tf.Cohere2Config(**GROUPED, **IDS, **ALTERNATING, logit_scale=0.5)),
        "scaled logits, window in some layers, no rotary in the others",
    ),
    Animal(
        "Granite",
        lambda: tf.GraniteForCausalLM(
            tf.GraniteConfig(
                **GROUPED,
                **IDS,
                logits_scaling=2.0,
                residual_multiplier=0.5,
                attention_multiplier=0.2,
                embedding_multiplier=3.0,
            )
        ),
        "scaled logits, scores, embeddings and residuals",
    ),
    Animal(
        "StarCoder2",
        lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**GROUPED, **IDS, **WINDOW, use_bias=True)),
        "window, biases",
    ),
    Animal("StableLM", lambda: _stablelm(), "partial rotary"),
    Animal("StableLM", lambda: _stablelm(use_parallel_residual=True, use_qkv_bias=True), "parallel residual, biases"),
    Animal("StableLM", lambda: _stablelm(qk_layernorm=True), "query and key norms"),
    Animal(
        "SmolLM3",
        lambda: tf.SmolLM3ForCausalLM(
            tf.SmolLM3Config(**GROUPED, **IDS, **ALTERNATING, use_sliding_window=True, no_rope_layers=[1, 0, 1])
        ),
        "window in some layers, no rotary in some",
    ),
    Animal(
        "GLM-4",
        lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**GROUPED, **IDS, head_dim=12)),
        "partial rotary, norms after attention",
    ),
    Animal(
        "GPT-OSS",
        lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**GROUPED, **IDS, **WINDOW, head_dim=12, num_local_experts=4)),
        "sinks, window in some layers, experts",
    ),
    Animal("OPT", _opt, "learned positions"),
    Animal(
        "OPT",
        lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=32),
        "norms after the blocks, embeddings of another width (350m)",
    ),
    Animal("GPT-2", lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2_LIKE)), "Conv1D, learned positions"),
    Animal(
        "GPT-2",
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2_LIKE, scale_attn_by_inverse_layer_idx=True)),
        "scores scaled by layer",
    ),
    Animal("GPT-NeoX, Pythia", _neox, "fused qkv, parallel residual"),
    Animal("GPT-NeoX, Pythia", lambda: _neox(use_parallel_residual=False), "sequential residual"),
    Animal(
        "GPT-J",
        lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT2_LIKE, rotary_dim=4)),
        "attends in its own code, partial rotary",
    ),
    Animal(
        "CodeGen",
        lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**GPT2_LIKE, rotary_dim=4)),
        "attends in its own code, partial rotary, qkv fused in four parts",
    ),
    Animal("GPT-Neo", _gpt_neo, "attends in its own code, unscaled scores, window in some layers"),
    Animal("Falcon", _falcon, "attends in its own code, one key head"),
    Animal("Falcon", lambda: _falcon(multi_query=False), "ungrouped keys"),
    Animal("Falcon", lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2), "grouped keys (40b)"),
    Animal(
        "Falcon",
        lambda: _falcon(num_attention_heads=6, alibi=True, parallel_attn=False, bias=True),
        "ALiBi (rw)",
    ),
    Animal(
        "Bloom",
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=3, n_head=4, **IDS)),
        "attends in its own code, ALiBi",
    ),
    Animal(
        "GPT-BigCode",
        lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT2_LIKE)),
        "one key head; its decoder insists on the number of tokens it was given",
        engine="reference",
    ),
    Animal("Gemma 3 with vision", _gemma3_with_vision, "the text model inside a multimodal one"),
    Animal("LLaVA", _llava, "the text model inside a multimodal one"),
    Animal("Qwen2-VL", _qwen2_vl, "the text model inside a multimodal one, rotary of three axes"),
    Animal("Qwen2.5-VL", _qwen2_5_vl, "the text model inside a multimodal one, rotary of three axes"),
    Animal(
        "Nemotron", lambda: tf.NemotronForCausalLM(tf.NemotronConfig(**GROUPED, **IDS, head_dim=12)), "partial rotary"
    ),
    Animal(
        "EXAONE 4",
        lambda: tf.Exaone4ForCausalLM(tf.Exaone4Config(**GROUPED, **IDS, **ALTERNATING)),
        "window in some layers",
    ),
    Animal(
        "DeepSeek-V3",
        lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(
                **{**GROUPED, "num_key_value_heads": 4},
                **IDS,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=12,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=32,
                first_k_dense_replace=1,
            )
        ),
        "keeps latent keys in its cache, experts",
        engine="reference",
    ),
    Animal(
        "Llama 4",
        lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(
                **GROUPED,
                **IDS,
                head_dim=12,
                intermediate_size_mlp=64,
                num_local_experts=4,
                attention_chunk_size=6,
                moe_layers=[1],
            )
        ),
        "attends within chunks, which it says in its mask alone",
        engine="reference",
    ),
    Animal(
        "Persimmon",
        lambda: tf.PersimmonForCausalLM(tf.PersimmonConfig(**SMALL, **IDS, intermediate_size=64)),
        "fused qkv, query and key norms",
    ),
    Animal("Helium", lambda: tf.HeliumForCausalLM(tf.HeliumConfig(**GROUPED, **IDS, head_dim=12)), "grouped keys"),
)
ZOO: dict[str, Animal] = {animal.name: animal for animal in _ANIMALS}


def backbone_of(build: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Backbone:
    """The model with enlarged random weights, ready to run."""
    return plain_backbone(scale_up(build()).to(dtype))


def plain_backbone(model: Any, precision: Precision = "exact") -> Backbone:
    """``model`` on the CPU, by PyTorch alone."""
    arch = resolve(model, "auto")
    return Backbone(model, arch, torch.device("cpu"), Arithmetic(model, arch, precision))
