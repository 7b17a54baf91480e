from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from relfv.engine.arithmetic import logits
from relfv.engine.clean import CleanRun, run_clean
from relfv.engine.reference import ReferenceEngine
from relfv.language_model import LanguageModel, open_model
from relfv.stages.leave_query_out import with_error_of_means
from relfv.stages.means import mean_activations
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


def asked(model: LanguageModel, texts: Sequence[str], queries: Sequence[int] = QUERIES) -> Prompts:
    return Prompts([model.tokens.encode(text) for text in texts], TARGETS, queries)


@pytest.fixture(scope="module")
def clean(model: LanguageModel) -> CleanRun:
    return run_clean(model.backbone, asked(model, CLEAN))


def deltas(model: LanguageModel, trials: list[int], means: MeanActivations) -> np.ndarray:
    """(trial, head) in the order of HEADS, by the reference engine."""
    ids = [model.tokens.encode(CORRUPTED[i]) for i in trials]
    wanted = [TARGETS[i] for i in trials]
    found = ReferenceEngine(model.backbone).sweep_heads(Prompts(ids, wanted), means.values, sorted(HEADS))
    return found.delta("p")[:, [sorted(HEADS).index(head) for head in HEADS]]


@pytest.mark.parametrize("engine", ["shared prefix", "reference"])
def test_leaving_a_query_out_leaves_it_out_of_the_clean_mean_too(
    model: LanguageModel, clean: CleanRun, engine: str
) -> None:
    if engine == "reference":
        model = replace(model, engine=ReferenceEngine(model.backbone))
    every = list(range(len(CLEAN)))
    of_all = deltas(model, every, mean_activations(clean))
    mean = of_all.mean(0)
    variance = np.zeros(len(HEADS))
    for query in set(QUERIES):
        others = [i for i in every if QUERIES[i] != query]
        without = MeanActivations(clean.activations[others].double().mean(0).float().numpy(), len(others))
        variance += len(others) / len(every) * (deltas(model, others, without).mean(0) - mean) ** 2
    found, _ = with_error_of_means(model, asked(model, CORRUPTED), clean.activations, HEADS, of_all)
    assert found.se == pytest.approx(np.sqrt(variance), rel=1e-2)
    given_the_mean = clustered_mean(deltas(model, every, mean_activations(clean)), QUERIES)
    assert np.abs(found.se / given_the_mean.se - 1).max() > 0.05
    assert found.df == given_the_mean.df
    assert np.all(found.low < mean)
    assert np.all(mean < found.high)


def test_over_the_likeliest_tokens_the_error_comes_out_the_same(
    model: LanguageModel, clean: CleanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_all = deltas(model, list(range(len(CLEAN))), mean_activations(clean))
    exact, _ = with_error_of_means(model, asked(model, CORRUPTED), clean.activations, HEADS, of_all)
    monkeypatch.setattr(logits, "_TILE_TOKENS", 16)
    monkeypatch.setattr(logits, "N_LIKELIEST", len(model.arch.lm_head.weight) // 2)  # type: ignore[arg-type]
    assert model.engine.over_likeliest_tokens() is not model.engine
    brief, _ = with_error_of_means(model, asked(model, CORRUPTED), clean.activations, HEADS, of_all)
    assert brief.se == pytest.approx(exact.se, rel=0.1)
    assert brief.mean == pytest.approx(exact.mean)


def test_where_all_clean_prompts_agree_the_mean_has_no_error_to_add(model: LanguageModel, clean: CleanRun) -> None:
    same = clean.activations[:1].expand_as(clean.activations)
    means = MeanActivations(same[0].numpy(), len(same))
    of_each = deltas(model, list(range(len(CLEAN))), means)
    found, _ = with_error_of_means(model, asked(model, CORRUPTED), same, HEADS, of_each)
    assert found.se == pytest.approx(clustered_mean(of_each, QUERIES).se, rel=1e-2)


def test_one_query_says_nothing_of_the_error(model: LanguageModel, clean: CleanRun) -> None:
    one_query = asked(model, CORRUPTED, [3] * 7)
    found, _ = with_error_of_means(model, one_query, clean.activations, HEADS, np.tile([0.1, 0.2, 0.3], (7, 1)))
    assert found.mean == pytest.approx([0.1, 0.2, 0.3])
    assert np.isinf(found.high).all()
