"""A model without its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import scale_up
from relfv.models.outline import outline


def test_a_family_that_scales_its_embeddings_has_an_outline(save_model: Callable[..., Path]) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config: dict[str, Any] = {
        "vocab_size": 420, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 64,
    }  # fmt: skip
    model = scale_up(Gemma3ForCausalLM(Gemma3TextConfig(**config)))
    found = outline(
        str(save_model(model)),
        "auto",
        revision="",
        device="cpu",
        dtype="auto",
        quant="none",
        offload="none",
        trust_remote_code=False,
    )
    assert found is not None
    assert (found.arch.family, found.arch.n_layers, found.arch.n_heads) == ("gemma", 2, 4)
    assert any("norms" in note for note in found.arch.notes)
    assert found.n_embeddings == 420
    assert found.n_parameters == sum(parameter.numel() for parameter in model.parameters())
