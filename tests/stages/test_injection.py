from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity import assert_same_scores
from relfv.errors import InputError
from relfv.language_model import LanguageModel, open_model
from relfv.stages.injection import InjectionSweep, prompts_to_evaluate, summarize
from relfv.types import Effects, TokenScores

PROMPTS = ["Q: dog\nA:", "Q: new zealand\nA:"]


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path), "auto", device="cpu")


def test_one_layer_alone_gives_the_same_bits_as_in_a_loop_over_all(model: LanguageModel) -> None:
    fv = torch.randn(48, generator=torch.Generator().manual_seed(0))
    loop = InjectionSweep(model, PROMPTS, [5, 6], fv, 1.0)
    every = [loop.at_layer(layer) for layer in range(3)]
    for layer in range(3):
        alone = InjectionSweep(model, PROMPTS, [5, 6], fv, 1.0).at_layer(layer)
        assert torch.equal(alone.edited.logit, every[layer].edited.logit)
        assert torch.equal(alone.base.logit, every[layer].base.logit)
    assert (every[0].edited.logit - every[0].base.logit[:, None]).abs().max() > 0.1


def test_alpha_zero_changes_nothing(model: LanguageModel) -> None:
    effects = InjectionSweep(model, PROMPTS, [5, 6], torch.randn(48), 0.0).at_layer(1)
    assert_same_scores(effects.edited[:, 0], effects.base)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_the_model_does_not_have_is_bad_input(model: LanguageModel, layer: int) -> None:
    with pytest.raises(InputError, match="has layers 0 to 2"):
        InjectionSweep(model, PROMPTS, [5, 6], torch.randn(48), 1.0).at_layer(layer)


def test_a_vector_of_another_model_is_bad_input(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="residual stream has 48 dimensions"):
        InjectionSweep(model, PROMPTS, [5, 6], torch.randn(64), 1.0)


def trial(word: str, answer: str = "x") -> dict:  # type: ignore[type-arg]
    return {"query": {"input": word, "output": answer}}


def test_each_distinct_query_is_evaluated_once_in_trial_order() -> None:
    trials = [trial("a"), trial("b"), trial("a"), trial("c"), trial("a", "other answer")]
    assert prompts_to_evaluate(trials, 50, allow_duplicates=False) == [0, 1, 3, 4]
    assert prompts_to_evaluate(trials, 2, allow_duplicates=False) == [0, 1]
    assert prompts_to_evaluate(trials, 50, allow_duplicates=True) == [0, 1, 2, 3, 4]


def test_summary_numbers_are_with_minus_without_and_population_deviations() -> None:
    base = TokenScores(torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5]).log(), torch.tensor([7, 3]))
    edited = TokenScores(torch.tensor([[2.0], [5.0]]), torch.tensor([[0.5], [1.0]]).log(), torch.tensor([[7], [8]]))
    numbers = summarize(Effects(base, edited), [7, 8])
    assert (numbers["acc_base"], numbers["acc_with"], numbers["delta_acc"]) == (0.5, 1.0, 0.5)
    assert numbers["mean_delta_logit"] == 2.0
    assert numbers["std_delta_logit"] == 1.0
    assert numbers["mean_delta_p"] == pytest.approx(0.375)
    assert numbers["std_delta_p"] == pytest.approx(0.125)
    assert numbers["mean_p_with"] == pytest.approx(0.75)
