"""Models to measure on: the demo model, and real shapes with random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from relfv.models.sources import model_source

SHAPES = {
    "llama-3.1-8b": (
        "Llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "pythia-160m": (
        "GPTNeoX",
        {
            "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 2048,
        },
    ),
    "gpt-j-6b": (
        "GPTJ",
        {
            "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "n_positions": 2048,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
    "gemma-3-270m": (
        "Gemma3",
        {
            "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
            "sliding_window": 512, "max_position_embeddings": 8192, "dtype": "float32",
        },
    ),
}  # fmt: skip
NAMES = ("demo", *SHAPES)


def llama_config(shape: Mapping[str, Any]) -> transformers.LlamaConfig:
    """Config of a bf16 Llama of these sizes."""
    return transformers.LlamaConfig(**shape, dtype="bfloat16", tie_word_embeddings=False)


def model_folder(shape: str, work: Path) -> str:
    """What ``--model`` takes: ``demo``, or a folder in ``work`` with a model of this shape, made on first use, in bf16
    unless its sizes say otherwise.

    Weights are random, seeded, and of a size at which single heads move the answer's probability. Times and memory are
    those of a trained model of the shape; what its scores say about language is nothing.
    """
    if shape == "demo":
        return "demo"
    folder = work / shape
    if not (folder / "tokenizer_config.json").exists():  # the last file, after the weights
        family, sizes = SHAPES[shape]
        torch.manual_seed(0)
        sizes = {"dtype": "bfloat16", "initializer_range": 0.03, **sizes}
        config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**sizes)
        cuda = torch.cuda.is_available()
        torch.set_default_dtype(getattr(torch, sizes["dtype"]))
        try:
            with torch.device("cuda" if cuda else "cpu"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            if not config.tie_word_embeddings:
                model.get_output_embeddings().weight.mul_(4)
        model.save_pretrained(folder)
        os.sync()  # or the disk is still busy with it while the first q_ids are timed
        transformers.AutoTokenizer.from_pretrained(model_source("demo")).save_pretrained(folder)
        del model
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return str(folder)
