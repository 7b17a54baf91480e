from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import assert_same_scores
from relfv.engine.reference import ReferenceEngine
from relfv.language_model import LanguageModel, open_model
from relfv.stages.cie import head_effects, with_error_of_means
from relfv.stages.clean_trials import CleanTrials, run_clean_trials
from relfv.stats import clustered_mean
from relfv.types import HeadId, MeanActivations, Prompts

WORDS = ("cat", "cow", "sheep", "goat", "horse", "frog", "bear")
CLEAN = [f"Q: dog\nA: puppy\n\nQ: {word}\nA:" for word in WORDS]
CORRUPTED = [f"Q: dog\nA: calf\n\nQ: {word}\nA:" for word in WORDS]
TARGETS = [5, 6, 7, 8, 9, 10, 11]
QUERIES = [3, 3, 1, 4, 1, 5, 3]
HEADS = [HeadId(2, 1), HeadId(0, 3), HeadId(2, 0)]
"""Ranked heads come in any order."""


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


@pytest.fixture(scope="module")
def clean(model: LanguageModel) -> CleanTrials:
    return run_clean_trials(model, CLEAN, TARGETS)


def deltas(model: LanguageModel, trials: list[int], means: MeanActivations) -> np.ndarray:
    """(trial, head) in the order of HEADS, by the reference engine."""
    ids = [model.tokens.encode(CORRUPTED[i]) for i in trials]
    wanted = [TARGETS[i] for i in trials]
    found = ReferenceEngine(model.backbone).sweep_heads(Prompts(ids, wanted), means.values, sorted(HEADS))
    delta = found.edited.p.numpy() - found.base.p.numpy()[:, None]
    return delta[:, [sorted(HEADS).index(head) for head in HEADS]]


@pytest.mark.parametrize("engine", ["shared prefix", "reference"])
def test_leaving_a_query_out_leaves_it_out_of_the_clean_mean_too(
    model: LanguageModel, clean: CleanTrials, engine: str
) -> None:
    if engine == "reference":
        model = replace(model, engine=ReferenceEngine(model.backbone))
    every = list(range(len(CLEAN)))
    mean = deltas(model, every, clean.means()).mean(0)
    variance = np.zeros(len(HEADS))
    for query in set(QUERIES):
        others = [i for i in every if QUERIES[i] != query]
        without = MeanActivations(clean.activations[others].double().mean(0).float(), len(others))
        variance += len(others) / len(every) * (deltas(model, others, without).mean(0) - mean) ** 2
    found, _ = with_error_of_means(model, CORRUPTED, TARGETS, clean.activations, HEADS, mean.tolist(), QUERIES)
    assert found.se == pytest.approx(np.sqrt(variance), rel=1e-2)
    given_the_mean = clustered_mean(deltas(model, every, clean.means()), QUERIES)
    assert np.abs(found.se / given_the_mean.se - 1).max() > 0.05
    assert found.df == given_the_mean.df
    assert np.all(found.low < mean)
    assert np.all(mean < found.high)


def test_where_all_clean_prompts_agree_the_mean_has_no_error_to_add(model: LanguageModel, clean: CleanTrials) -> None:
    same = clean.activations[:1].expand_as(clean.activations)
    means = MeanActivations(same[0], len(same))
    of_each = deltas(model, list(range(len(CLEAN))), means)
    found, _ = with_error_of_means(model, CORRUPTED, TARGETS, same, HEADS, of_each.mean(0).tolist(), QUERIES)
    assert found.se == pytest.approx(clustered_mean(of_each, QUERIES).se, rel=1e-2)


def test_one_query_says_nothing_of_the_error(model: LanguageModel, clean: CleanTrials) -> None:
    found, _ = with_error_of_means(model, CORRUPTED, TARGETS, clean.activations, HEADS, [0.1, 0.2, 0.3], [3] * 7)
    assert found.mean == pytest.approx([0.1, 0.2, 0.3])
    assert np.isinf(found.high).all()


def test_a_head_named_twice_gets_each_of_its_values(model: LanguageModel) -> None:
    ids, head = [model.tokens.encode(prompt) for prompt in CORRUPTED[:3]], HeadId(1, 2)
    values = torch.randn(2, model.arch.head_dim, generator=torch.Generator().manual_seed(0))
    together = model.engine.sweep_heads(Prompts(ids, TARGETS[:3]), values, [head, head]).edited
    for i in range(2):
        means = torch.zeros(model.arch.n_layers, model.arch.n_heads, model.arch.head_dim)
        means[head.layer, head.head] = values[i]
        alone = head_effects(model, CORRUPTED[:3], TARGETS[:3], MeanActivations(means, 1), [head]).effects.edited[:, 0]
        assert_same_scores(together[:, i], alone)
    assert (together.logprob[:, 0] - together.logprob[:, 1]).abs().max() > 0.01
