from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import scale_up
from relfv.engine.base import Backbone
from relfv.engine.selfcheck import choose_engine
from relfv.errors import RunError
from relfv.models.families import resolve


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
    backbone = Backbone(model, resolve(model, "auto"), torch.device("cpu"), "exact")
    with pytest.raises(RunError, match="OddLogits turns hidden states into logits in a way relfv does not know"):
        choose_engine(backbone, [[1, 2, 3, 4, 5, 6], [7, 8, 9]])
