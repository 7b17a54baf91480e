from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import llama
from relfv.engine.attention import UnsupportedAttention, attending_to, shared_prefix_attention
from relfv.engine.base import Backbone
from relfv.engine.prefix import Prefill
from relfv.errors import RunError
from zoo import plain_backbone

HEADS, KV_HEADS, COPIES, HEAD_DIM = 8, 4, 3, 10


@pytest.fixture
def backbone() -> Iterator[Backbone]:
    """A backbone whose attention is over the prefixes of two prompts."""
    backbone = plain_backbone(llama())
    with backbone.running():
        prefix = Prefill(backbone, [[1, 2, 3, 4], [5, 6]]).run()
        with attending_to(prefix, backbone):
            yield backbone


def attend(backbone: Backbone, mask: torch.Tensor | None = None, value_dim: int = HEAD_DIM, **given: Any) -> None:
    query, key = torch.randn(2, HEADS, COPIES, HEAD_DIM), torch.randn(2, KV_HEADS, COPIES, HEAD_DIM)
    value = torch.randn(2, KV_HEADS, COPIES, value_dim)
    out, _ = shared_prefix_attention(backbone.arch.attentions[0], query, key, value, mask, **given)
    assert out.shape == (2, COPIES, HEADS, HEAD_DIM)


def test_what_attention_is_asked_for_and_does_not_know_is_refused(backbone: Backbone) -> None:
    attend(backbone, strange=None, use_cache=True, sliding_window=3)
    with pytest.raises(UnsupportedAttention, match="attention passes other, strange, unknown to"):
        attend(backbone, strange=0.5, other=torch.zeros(1), use_cache=True)


def test_a_window_that_only_the_mask_has_is_refused(backbone: Backbone) -> None:
    attend(backbone, torch.tensor(2), sliding_window=2)
    with pytest.raises(UnsupportedAttention, match="mask limits attention to 2 tokens"):
        attend(backbone, torch.tensor(2))


def test_values_of_another_width_are_refused(backbone: Backbone) -> None:
    with pytest.raises(UnsupportedAttention, match=r"\(2, 4, 3, 6\) are unknown to"):
        attend(backbone, value_dim=6)


def test_outside_a_pass_it_is_no_attention() -> None:
    with pytest.raises(RunError, match="ran outside a shared-prefix pass"):
        attend(plain_backbone(llama()))
