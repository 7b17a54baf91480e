"""Models that run, and that no engine could be right about: each is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from conftest import llama, scale_up
from parity import prompts_of_different_length
from relfv.engine.selfcheck import choose_engine
from relfv.errors import RunError
from zoo import plain_backbone


def refusal(model: Any) -> str:
    with pytest.raises(RunError) as caught:
        choose_engine(plain_backbone(model), prompts_of_different_length()[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


class AddsTheBatchsMean(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.5 * x.mean(0, keepdim=True)


class AddsTheMeanOverTokens(AddsTheBatchsMean):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 5.0 * x.mean(1, keepdim=True)


class Fails(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("needs an image\nand more")


def with_mlp(hostile: Any) -> Any:
    model = llama(300)
    model.model.layers[1].mlp = hostile
    return model


def test_a_model_that_looks_ahead_is_no_causal_model() -> None:
    assert "lets tokens see later ones" in refusal(with_mlp(AddsTheMeanOverTokens(llama(300).model.layers[1].mlp)))


def test_an_encoder_that_is_not_told_to_be_a_decoder_is_refused_with_what_to_set() -> None:
    config = tf.BertGenerationConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    assert "is_decoder true in its config" in refusal(scale_up(tf.BertGenerationDecoder(config)))


def test_heads_that_depend_on_what_shares_their_batch_are_refused() -> None:
    assert "heads do other things in a padded batch" in refusal(
        with_mlp(AddsTheBatchsMean(llama(300).model.layers[1].mlp))
    )


def test_a_reference_engine_that_disagrees_with_plain_hooks_is_refused_unless_weights_are_packed() -> None:
    """The last layer's MLP mixes the batch after all heads: only patches and injections show it."""
    model = llama(300)
    model.model.layers[2].mlp = AddsTheBatchsMean(model.model.layers[2].mlp)
    assert "depends on what shares the batch, so this model cannot be measured correctly" in refusal(model)
    model.is_quantized = True
    engine, check = choose_engine(plain_backbone(model), prompts_of_different_length()[0])
    assert engine.name == "reference"
    assert "take scores below that for noise" in check.reason


def test_a_model_that_does_not_run_says_its_first_line_and_no_traceback() -> None:
    assert "does not run on plain token ids" in (said := refusal(with_mlp(Fails())))
    assert "(ValueError: needs an image)" in said
