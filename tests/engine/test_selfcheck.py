from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import llama, scale_up
from parity import prompts_of_different_length
from relfv.engine.selfcheck import TOLERANCE, choose_engine
from relfv.errors import RunError
from zoo import backbone_of, plain_backbone


class OddLogits(LlamaForCausalLM):
    """A model that does something to its logits that no config tells."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_a_model_whose_logits_relfv_would_misread_is_refused_by_both_engines_alike() -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = scale_up(OddLogits(config))
    with pytest.raises(RunError, match="OddLogits turns hidden states into logits in a way relfv does not know"):
        choose_engine(plain_backbone(model), [[1, 2, 3, 4, 5, 6], [7, 8, 9]])


class SeesTheTokenBefore(torch.nn.Module):
    """Causal, and legitimate in a language model; among copies of one token it mixes the copies."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return self.inner(x + 0.5 * before)


class AddsTheMeanSoFar(torch.nn.Module):
    """Causal too, but recomputed from the token axis, which in the shared-prefix pass holds copies alone."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x.cumsum(1) / torch.arange(1, 1 + x.shape[1])[:, None]


@pytest.mark.parametrize(
    ("part", "hostile"),
    [("self_attn.k_proj", SeesTheTokenBefore), ("self_attn.v_proj", SeesTheTokenBefore), ("mlp", AddsTheMeanSoFar)],
)
def test_a_model_that_looks_along_the_token_axis_outside_attention_is_rejected(
    part: str, hostile: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    model = llama(300)
    layer = model.model.layers[1]
    layer.set_submodule(part, hostile(layer.get_submodule(part)))
    prompts, _ = prompts_of_different_length()
    engine, check = choose_engine(plain_backbone(model), prompts)
    assert engine.name == "reference"
    assert check.max_error is not None
    assert check.max_error > TOLERANCE
    assert check.reference_error is not None
    assert check.reference_error < TOLERANCE


def test_a_self_check_takes_no_pass_for_what_another_has_shown() -> None:
    """Of each prompt alone, one pass with all interventions in its rows, and one that is read for heads and logits."""
    model, prompts = llama(300), prompts_of_different_length()[0][:2]
    shapes: list[tuple[int, ...]] = []
    model.get_submodule("model").register_forward_hook(lambda _, __, output: shapes.append(tuple(output[0].shape[:2])))
    choose_engine(plain_backbone(model), prompts)
    longest, shortest = (f(map(len, prompts)) for f in (max, min))
    rows = max(n for n, _ in shapes)
    assert shapes.count((rows, longest)) == shapes.count((rows, shortest)) == 1
    assert shapes.count((1, shortest)) == 1
    assert len(shapes) == 10  # and prompts in one batch, one token fewer, copies three times, what attention writes


def test_a_limit_that_only_the_models_mask_knows_is_found_on_prompts_that_are_shorter() -> None:
    """Llama 4 attends within chunks of 8192 tokens: no comparison of short prompts could tell."""
    config = tf.Llama4TextConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=64, intermediate_size_mlp=64, num_local_experts=4, moe_layers=[1], pad_token_id=0,
    )  # fmt: skip
    prompts, _ = prompts_of_different_length()
    engine, check = choose_engine(backbone_of(lambda: tf.Llama4ForCausalLM(config)), prompts)
    assert engine.name == "reference"
    assert "limits attention to 8192 tokens" in check.reason
