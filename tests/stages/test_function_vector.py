from __future__ import annotations

import numpy as np
import torch

from conftest import llama, scale_up
from parity import assert_close
from relfv.models.architecture import resolve
from relfv.stages.function_vector import build_function_vector
from relfv.types import HeadId, MeanActivations


def test_the_vector_is_the_sum_of_the_heads_outputs_and_its_parts_sum_to_it() -> None:
    model = llama(300)
    arch = resolve(model, "auto")
    means = MeanActivations(np.random.default_rng(0).standard_normal((3, 8, 10), np.float32), 25)
    heads = [HeadId(2, 7), HeadId(0, 1), HeadId(2, 0)]
    fv = build_function_vector(arch, means, heads)
    expected = torch.zeros(48)
    for head in heads:
        z = torch.zeros(1, 1, 80)
        z[0, 0, head.head * 10 : (head.head + 1) * 10] = torch.from_numpy(means.values[head.layer, head.head])
        with torch.no_grad():
            expected += arch.out_projs[head.layer](z)[0, 0]
    total = torch.from_numpy(fv.total)
    assert_close(total, expected)
    assert sorted(fv.by_layer) == [0, 2]
    assert_close(torch.from_numpy(sum(fv.by_layer.values())), total)
    assert total.norm() > 1


def test_an_output_bias_is_left_out() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    arch = resolve(scale_up(GPT2LMHeadModel(config)), "auto")
    assert arch.out_projs[0].bias.abs().max() > 0.01  # type: ignore[union-attr,operator]
    zero = MeanActivations(np.zeros((3, 4, 12), np.float32), 25)
    fv = build_function_vector(arch, zero, [HeadId(0, 0), HeadId(1, 1)])
    assert not fv.total.any()
