"""Every causal language model that the installed transformers knows, shrunk: what tests/models/test_every_lm.py opens.

A config class is shrunk by the names of its fields; ``SPECIAL`` holds what those do not say. Nothing here knows relfv.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 10_000_000
N_LAYERS = 4


def _fields(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_fields(300, "vocab_size vocab_size_per_layer_input"),
    **_fields(48, "hidden_size d_model n_embd dim out_hidden_size embedding_size output_embedding_size emb_dim"),
    **_fields(N_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_fields(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_fields(2, "num_key_value_heads num_kv_heads kv_n_heads moe_k top_k_experts num_experts_per_tok"),
    **_fields(64, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size"),
    **_fields(64, "intermediate_size_mlp max_position_embeddings n_positions dff expert_ffn_hidden_size"),
    **_fields(32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_fields(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_fields(1, "n_shared_experts n_group topk_group depth"),
    **_fields(12, "head_dim attention_head_dim v_head_dim dim_head swa_head_dim swa_v_head_dim"),
    **_fields(16, "q_lora_rank kv_lora_rank hidden_size_per_layer_input laurel_rank image_size state_size"),
    **_fields(8, "qk_rope_head_dim qk_nope_head_dim rotary_dim patch_size adapter_rank"),
    # the Mamba, convolution and linear-attention layers of hybrids
    **_fields(12, "mamba_d_head linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_fields(8, "mamba_n_heads n_mamba_heads mamba_num_heads mamba_d_state ssm_state_size"),
    **_fields(8, "chunk_size mamba_chunk_size"),
    **_fields(4, "linear_num_heads linear_num_key_heads linear_num_value_heads"),
    "mamba_head_dim": 12,
    "n_groups": 1,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "sliding_window": 6,
    **_fields(0, "bos_token_id eos_token_id pad_token_id"),
}

LATENT = {"num_key_value_heads": 4}  # every head has a key of its own, made from a latent one


def _layers(one: str, other: str, name: str = "layer_types") -> dict[str, Any]:
    """The second and the last layer are of another kind."""
    return {name: [one, other, one, other]}


_MAMBA = {"mamba_d_head": 12, "mamba_n_heads": 8}  # 8 heads of 12: twice the stream
SPECIAL: dict[str, dict[str, Any]] = {
    **_fields(LATENT, "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa"),
    **_fields(LATENT, "hy_v4 longcat_flash youtu"),
    "bailing_hybrid": {**LATENT, **_layers("linear_attention", "full_attention")},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        **_layers("sliding_attention", "full_attention"),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"position_bias_num_buckets": 8, "segment_types": 2, "prompt_types": 2, "dim_ff": 64},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 96, "lm_head_multiplier": 2.0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"global_head_dim": 12},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granite": {"logits_scaling": 2.0},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, **_layers("linear_attention", "full_attention")},
    "hyperclovax": {"logits_scaling": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, **_layers("linear_attention", "full_attention")},
    "lfm2": _layers("conv", "full_attention"),
    "lfm2_moe": _layers("conv", "full_attention"),
    "mamba2": {"num_heads": 8},
    "minicpm3": {**LATENT, "dim_model_base": 24},
    "minimax": _layers("linear_attention", "full_attention"),
    "olmo_hybrid": _layers("linear_attention", "full_attention"),
    "qwen3_5_moe_text": _layers("linear_attention", "full_attention"),
    "qwen3_5_text": _layers("linear_attention", "full_attention"),
    "qwen3_next": _layers("linear_attention", "full_attention"),
    "qwen4_exp_text": {
        **_layers("linear_attention", "indexed_attention"),
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 12},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 12, "attn_layers": ["local"] * 4},
    "roc_bert": {
        **{"pronunciation_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_vocab_size": 20, "shape_embed_dim": 8}
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": _layers("linear_attention", "hybrid", "layers_block_type"),
    "zamba2": _layers("linear_attention", "hybrid", "layers_block_type"),
    "zaya": {"num_experts_per_tok": 1},
}
"""By ``model_type``."""


def tiny_config(config_class: Any) -> Any:
    """A small config of this class. Whatever transformers raises is the caller's."""
    own = SPECIAL.get(config_class.model_type, {})
    known = {field.name for field in dataclasses.fields(config_class)}
    parts = getattr(config_class, "sub_configs_defaults", None) or {}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    for name in parts:
        if name not in own and name in known:
            sizes[name] = tiny_part(parts[name])
    return config_class(**{**sizes, **own})


def tiny_part(spec: Any) -> Any:
    """A part of a composite config: text, vision, audio."""
    if spec.optional:
        return None
    if spec.model_type in CONFIG_MAPPING:
        return tiny_config(CONFIG_MAPPING[spec.model_type])
    return tiny_config(spec.config_class)


def tiny_model(model_type: str) -> Any:
    """The model, with transformers' own random weights. Raises ValueError if it would be large all the same."""
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config = tiny_config(model_class.config_class)  # of a multimodal type this is the text part
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(tiny_config(model_class.config_class)).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"its smallest config here has {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return model_class(config).eval()
