"""What attention adds to the residual stream, split by head, on every model of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import llama
from parity import assert_close, prompts_of_different_length, rounding, truth
from relfv.engine.clean import run_clean
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.reference import ReferenceEngine
from relfv.engine.selfcheck import choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.engine.writing_check import writing_error
from relfv.types import Prompts
from zoo import ZOO, backbone_of, plain_backbone

NEXT_NORM = {
    "Llama 2, Llama 3: biases": "post_attention_layernorm",
    "Gemma 2: soft caps, window in some layers, norms after attention": "pre_feedforward_layernorm",
    "OLMo 2: norms after attention": "mlp",
    "GLM-4: partial rotary, norms after attention": "post_attention_layernorm",
    "Granite: scaled logits, scores, embeddings and residuals": "post_attention_layernorm",
}
"""The module that gets the residual stream right after attention has been added."""
LAYERS = [0, 1, 2]


@pytest.mark.parametrize("family", [pytest.param(n, marks=() if n in NEXT_NORM else pytest.mark.slow) for n in ZOO])
def test_the_heads_parts_and_the_bias_sum_to_what_attention_adds(family: str) -> None:
    prompts, _ = prompts_of_different_length()
    assert writing_error(truth(family).backbone, prompts[1], LAYERS) <= rounding(1.0)


@pytest.mark.parametrize("family", NEXT_NORM)
def test_each_prompt_has_its_own_factor(family: str) -> None:
    backbone = backbone_of(ZOO[family].build)
    arch = backbone.arch
    prompts, targets = prompts_of_different_length()
    clean = run_clean(backbone, Prompts(prompts, targets))
    writing = clean.writing
    assert writing
    for n, prompt in enumerate(prompts):
        seen: dict[str, Any] = {}
        after = arch.blocks[1].get_submodule(NEXT_NORM[family])
        with (
            backbone.running(),
            editing_inputs(
                [
                    (arch.blocks[1], lambda x, seen=seen: seen.update(start=x[0, -1].double())),
                    (after, lambda x, seen=seen: seen.update(end=x[0, -1].double())),
                ]
            ),
        ):
            backbone.decoder(input_ids=torch.tensor([prompt]), use_cache=False)
        parts = [arch.project_head(1, h, clean.written[n, 1, h]) for h in range(arch.n_heads)]
        if (bias := getattr(arch.out_projs[1], "bias", None)) is not None:
            parts.append(writing.factors[n, 1] * bias.detach().double())
        added = seen["end"] - seen["start"]
        assert_close(writing.gained(1, torch.stack(parts).sum(0)), added, scale=float(seen["end"].abs().max()))
    factors = writing.factors[:, 1]
    assert writing.is_plain == family.startswith("Llama")
    if arch.attention_norms:
        assert float(factors.max() / factors.min()) > 1.01  # or a wrong prompt's would not be missed


def test_a_step_between_that_relfv_does_not_know_is_noticed() -> None:
    model = llama(300)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: (3 * out[0], *out[1:]))
    backbone = plain_backbone(model)
    prompts, _ = prompts_of_different_length()
    assert writing_error(backbone, prompts[1], LAYERS) > 0.5
    engine, check = choose_engine(backbone, prompts)
    assert engine.name == "shared_prefix"
    assert not check.knows_writing
    plain = choose_engine(plain_backbone(llama(300)), prompts)[1]
    assert plain.knows_writing


@pytest.mark.parametrize("engine_type", [SharedPrefixEngine, ReferenceEngine])
def test_an_injection_gives_the_lengths_of_the_untouched_hidden_states(engine_type: Any) -> None:
    backbone = backbone_of(ZOO["Gemma 2: soft caps, window in some layers, norms after attention"].build)
    prompts, targets = prompts_of_different_length()
    lengths = []
    for prompt in prompts:
        with (
            backbone.running(),
            editing_outputs([(backbone.arch.blocks[2], lambda x: lengths.append(x[0, -1].norm()))]),
        ):
            backbone.decoder(input_ids=torch.tensor([prompt]), use_cache=False)
    vectors = torch.ones(1, backbone.arch.resid_dim)
    found = engine_type(backbone).inject(Prompts(prompts, targets), vectors, [1, 2], per_pass=2).lengths
    assert found is not None
    assert_close(found[:, 1], torch.stack(lengths))
