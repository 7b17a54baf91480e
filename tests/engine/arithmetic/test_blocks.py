"""Which blocks are recognised as pre-norm ones, on real modules of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.llama import modeling_llama

from relfv.engine.arithmetic.blocks import Stream, as_pre_norm
from relfv.engine.arithmetic.fusion import as_gated_mlp, as_norm
from relfv.engine.copies import grown

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
CPU = torch.device("cpu")


def recognised(block: Any) -> bool:
    with torch.inference_mode():
        norms, mlps = (
            {id(m): found for m in block.modules() if (found := make(m, CPU))} for make in (as_norm, as_gated_mlp)
        )
        return as_pre_norm(block, block.self_attn.o_proj, norms, mlps) is not None


def first_block(family: str, **more: Any) -> Any:
    config = getattr(tf, f"{family}Config")(**SIZES, **more)
    return getattr(tf, f"{family}ForCausalLM")(config).eval().model.layers[0]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_pre_norm_blocks_are_recognised(family: str) -> None:
    assert recognised(first_block(family))


@pytest.mark.parametrize(
    ("family", "more"), [("Granite", {"residual_multiplier": 0.5}), ("Gemma2", {}), ("Olmo2", {}), ("Mixtral", {})]
)
def test_other_wirings_keep_their_own_code(family: str, more: dict[str, Any]) -> None:
    assert not recognised(first_block(family, **more))


def test_attention_that_does_more_with_its_input_or_output_keeps_its_own_code() -> None:
    class Gating(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
            out, weights = super().forward(hidden_states, **given)
            return out * hidden_states.mean().sigmoid(), weights

    class Scaling(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
            out, weights = super().forward(hidden_states, **given)
            return 2 * out, weights

    class Norming(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
            return super().forward(hidden_states / hidden_states.norm(dim=-1, keepdim=True), **given)

    for made in (Gating, Scaling, Norming):
        block = first_block("Llama")
        block.self_attn = made(block.self_attn.config, 0)
        assert not recognised(block)


def test_a_block_that_hides_something_from_attention_keeps_its_own_code() -> None:
    class Hiding(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
            return super().forward(hidden_states, **{**given, "attention_mask": None})

    block = first_block("Llama")
    assert not recognised(Hiding(block.self_attn.config, 0))


def test_copies_that_have_room_do_not_move_when_others_come() -> None:
    stream, x = Stream(5), torch.randn(2, 3, 8)
    hidden = stream.like(x).copy_(x)
    more = grown(hidden, hidden[:, :1], 2)
    assert more.data_ptr() == hidden.data_ptr()
    assert torch.equal(more, torch.cat([x, x[:, :1], x[:, :1]], dim=1))
    slice_of_others = torch.randn(2, 9, 8)[:, :3]
    for full in (more, x, slice_of_others):  # no room is left, or there never was any
        larger = grown(full, full[:, :1], 1)
        assert larger.data_ptr() != full.data_ptr()
        assert torch.equal(larger, torch.cat([full, full[:, :1]], dim=1))
