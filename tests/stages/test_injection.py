from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from parity import assert_same_scores
from relfv.errors import InputError, RunError
from relfv.language_model import LanguageModel, open_model
from relfv.stages.injection import Injections, inject_at_every_layer, require_layer, summaries
from relfv.types import Effects, Prompts, TokenScores


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path), "auto", device="cpu")


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> Prompts:
    return Prompts([model.tokens.encode(text) for text in ("Q: dog\nA:", "Q: new zealand\nA:")], [5, 6])


def a_vector(size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size, np.float32)


def test_one_layer_alone_gives_the_same_bits_as_in_a_loop_over_all(model: LanguageModel, prompts: Prompts) -> None:
    fv = a_vector()
    loop = inject_at_every_layer(model, prompts, fv, 1.0)
    every = [loop.at_layer(layer) for layer in range(3)]
    for layer in range(3):
        alone = inject_at_every_layer(model, prompts, fv, 1.0).at_layer(layer)
        assert torch.equal(alone.edited.logit, every[layer].edited.logit)
        assert torch.equal(alone.base.logit, every[layer].base.logit)
    assert (every[0].edited.logit - every[0].base.logit[:, None]).abs().max() > 0.1


def test_alpha_zero_changes_nothing(model: LanguageModel, prompts: Prompts) -> None:
    effects = inject_at_every_layer(model, prompts, a_vector(), 0.0).at_layer(1)
    assert_same_scores(effects.edited[:, 0], effects.base)


def test_a_vector_that_changes_nothing_is_no_result_unless_it_is_small(llama_path: Path, prompts: Prompts) -> None:
    deaf = open_model(str(llama_path), "auto", device="cpu")
    deaf.arch.lm_head.weight.data.zero_()  # type: ignore[operator,union-attr]
    for alpha in (1.0, -1.0, 0.01):
        with pytest.raises(RunError, match="injecting at layer 1 changed no logit of any prompt"):
            inject_at_every_layer(deaf, prompts, a_vector(), alpha).at_layer(1)
    for fv, alpha in ((a_vector(), 0.001), (0 * a_vector(), 1.0)):
        inject_at_every_layer(deaf, prompts, fv, alpha).at_layer(1)


def test_a_layer_is_sound_where_every_prompts_logit_is_finite_and_some_have_changed() -> None:
    logits = torch.tensor([[2.0, torch.inf, 1.0, 1.0], [3.0, 3.0, 2.0, 4.0]])  # (prompt, layer)
    edited = TokenScores(logits, -logits, torch.zeros(2, 4, dtype=torch.int64))
    base = TokenScores(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    found = Injections(Effects(base, edited), noticeable=True)
    for layer in (0, 3):
        found.require_sound(layer)
    with pytest.raises(RunError, match=r"at layer 1 gives NaN or infinite logits; .* use a smaller --alpha"):
        found.require_sound(1)
    with pytest.raises(RunError, match="at layer 2 changed no logit"):
        found.require_sound(2)
    Injections(Effects(base, edited), noticeable=False).require_sound(2)


def test_the_vector_is_added_alpha_times_whatever_its_sign(model: LanguageModel, prompts: Prompts) -> None:
    effects = inject_at_every_layer(model, prompts, a_vector(), -2.0).effects
    assert_same_scores(effects.edited, inject_at_every_layer(model, prompts, -2 * a_vector(), 1.0).effects.edited)
    added = inject_at_every_layer(model, prompts, a_vector(), 2.0).effects
    assert (added.edited.logprob - effects.edited.logprob).abs().max() > 0.1


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_the_model_does_not_have_is_bad_input(model: LanguageModel, layer: int) -> None:
    with pytest.raises(InputError, match="has layers 0 to 2"):
        require_layer(model, layer)


def test_a_vector_of_another_model_is_bad_input(model: LanguageModel, prompts: Prompts) -> None:
    with pytest.raises(InputError, match="residual stream has 48 dimensions"):
        inject_at_every_layer(model, prompts, a_vector(64), 1.0)


def test_summary_numbers_are_with_minus_without_and_population_deviations() -> None:
    base = TokenScores(torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5]).log(), torch.tensor([7, 3]))
    edited = TokenScores(torch.tensor([[2.0], [5.0]]), torch.tensor([[0.5], [1.0]]).log(), torch.tensor([[7], [8]]))
    (numbers,) = summaries(Effects(base, edited), [[7], [8]])
    assert (numbers["acc_base"], numbers["acc_with"], numbers["delta_acc"]) == (0.5, 1.0, 0.5)
    assert numbers["mean_delta_logit"] == 2.0
    assert numbers["std_delta_logit"] == 1.0
    assert numbers["mean_delta_p"] == pytest.approx(0.375)
    assert numbers["std_delta_p"] == pytest.approx(0.125)
    assert numbers["mean_p_with"] == pytest.approx(0.75)


def test_each_layer_of_a_summary_has_the_bits_that_it_has_alone() -> None:
    def scores(*shape: int) -> TokenScores:
        return TokenScores(torch.randn(shape), -torch.rand(shape), torch.randint(3, shape))

    torch.manual_seed(0)
    base, edited, right = scores(19), scores(19, 4), [[n % 3] for n in range(19)]
    alone = [summaries(Effects(base, edited[:, n : n + 1]), right)[0] for n in range(4)]
    assert summaries(Effects(base, edited), right) == alone
    assert alone[2]["std_delta_logit"] == float((edited.logit[:, 2].double() - base.logit.double()).numpy().std())
