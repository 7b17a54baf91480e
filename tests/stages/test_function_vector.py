from __future__ import annotations

import pytest
import torch

from conftest import llama, scale_up
from parity import assert_close
from relfv.errors import InputError
from relfv.models.families import resolve
from relfv.stages.cie import rank_heads
from relfv.stages.function_vector import build_function_vector, select_heads
from relfv.types import HeadId, MeanActivations, ScoredHead


def scored(layer: int, head: int, value: float) -> ScoredHead:
    return ScoredHead(HeadId(layer, head), {"mean_delta_p": value}, 25)


def test_heads_are_ranked_by_score_and_ties_by_layer_then_head() -> None:
    heads = [scored(2, 0, 0.5), scored(0, 1, 0.1), scored(1, 3, 0.5), scored(1, 2, 0.5), scored(0, 0, -1.0)]
    order = [(head.id.layer, head.id.head) for head in rank_heads(heads, "mean_delta_p")]
    assert order == [(1, 2), (1, 3), (2, 0), (0, 1), (0, 0)]


def test_asking_for_more_heads_than_there_are_is_bad_input() -> None:
    with pytest.raises(InputError, match="only 2 heads were scored"):
        select_heads([scored(0, 0, 1.0), scored(0, 1, 1.0)], 3)


def test_the_vector_is_the_sum_of_the_heads_outputs_and_its_parts_sum_to_it() -> None:
    model = llama(300)
    arch = resolve(model, "auto")
    means = MeanActivations(torch.randn(3, 8, 10), 25)
    heads = [HeadId(2, 7), HeadId(0, 1), HeadId(2, 0)]
    fv = build_function_vector(arch, means, heads)
    expected = torch.zeros(48)
    for head in heads:
        z = torch.zeros(1, 1, 80)
        z[0, 0, head.head * 10 : (head.head + 1) * 10] = means.values[head.layer, head.head]
        with torch.no_grad():
            expected += arch.out_projs[head.layer](z)[0, 0]
    assert_close(fv.total, expected)
    assert sorted(fv.by_layer) == [0, 2]
    assert_close(sum(fv.by_layer.values()), fv.total)  # type: ignore[arg-type]
    assert fv.total.norm() > 1


def test_an_output_bias_is_left_out() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    arch = resolve(scale_up(GPT2LMHeadModel(config)), "auto")
    assert arch.out_projs[0].bias.abs().max() > 0.01  # type: ignore[union-attr,operator]
    zero = MeanActivations(torch.zeros(3, 4, 12), 25)
    fv = build_function_vector(arch, zero, [HeadId(0, 0), HeadId(1, 1)])
    assert not fv.total.any()
