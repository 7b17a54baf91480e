"""Which blocks are recognised as pre-norm ones, on real modules of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.llama import modeling_llama
from transformers.models.olmo import modeling_olmo

from relfv.engine.arithmetic import late
from relfv.engine.arithmetic.blocks import Stream, as_pre_norm, what_may_wait
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


def waiting(attention: Any) -> set[str] | None:
    """The linear layers, by name, that ``what_may_wait`` finds."""
    with torch.inference_mode():
        found = what_may_wait(attention, attention.o_proj)
    return None if found is None else {name for name, module in attention.named_modules() if id(module) in found}


def test_what_attention_hands_on_as_it_is_may_wait() -> None:
    assert waiting(first_block("Llama").self_attn) == {"q_proj", "k_proj", "v_proj"}
    assert waiting(first_block("Qwen3").self_attn) == set()  # queries and keys are normed, and then rotated


def test_heads_that_are_not_whole_outputs_do_not_wait() -> None:
    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., : x.shape[-1] // 2]

    attention = first_block("Llama").self_attn
    attention.q_proj = torch.nn.Sequential(torch.nn.Linear(32, 128), First())
    assert waiting(attention) == set()


@pytest.mark.parametrize("change", ["rotated queries", "values read twice"])
def test_heads_that_are_put_to_another_use_do_not_wait(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, own = first_block("Llama").self_attn, modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def changed(*args: Any) -> Any:
        def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **given: Any) -> Any:
            if change == "rotated queries":
                return own(*args)(module, q / 8, k, v, *rest, **given)
            return own(*args)(module, q, k, v, *rest, **given)[0] * v.mean(), None

        return attend

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", changed)
    assert waiting(attention) is None


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


def test_heads_that_are_changed_in_place_do_not_wait() -> None:
    """OLMo clips what its projections give."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    attention: Any = modeling_olmo.OlmoAttention(tf.OlmoConfig(**sizes, clip_qkv=8.0), 0).eval()
    attention.config._attn_implementation = "sdpa"
    with torch.inference_mode():
        assert what_may_wait(attention, attention.o_proj) == frozenset()


def test_differences_whose_bases_nobody_rotated_never_pass_for_heads() -> None:
    with late.waiting({1}):
        differences = late.apart(torch.zeros(1, 2, 8), torch.ones(1, 8))
        with pytest.raises(AssertionError, match="differences alone"):
            late.taken(differences, differences, differences)
