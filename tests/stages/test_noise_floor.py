from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parity import rounding, size
from relfv.engine.clean import run_clean
from relfv.language_model import LanguageModel, open_model
from relfv.stages.cie import head_effects
from relfv.stages.means import mean_activations
from relfv.stages.noise_floor import heads_to_probe, measure_noise_floor
from relfv.stages.scores import rank_heads, score_heads
from relfv.types import MEASURES, HeadId, Prompts, ScoredHead

TEXTS = [f"Q: dog\nA: puppy\n\nQ: {word}\nA:" for word in ("cat", "cow", "sheep", "goat", "horse", "frog", "bear")]
TARGETS = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> Prompts:
    return Prompts([model.tokens.encode(text) for text in TEXTS], TARGETS, range(len(TEXTS)))


def sweep(model: LanguageModel, prompts: Prompts, per_pass: int):  # type: ignore[no-untyped-def]
    means = mean_activations(run_clean(model.backbone, prompts))
    heads = [HeadId(layer, head) for layer in range(3) for head in range(8)]
    effects = head_effects(model, prompts, means, heads, per_pass=per_pass)
    return means, effects, rank_heads(score_heads(effects, means, prompts.clusters), "mean_delta_p")


@pytest.mark.parametrize("per_pass", [1, 3, 7])
def test_rounding_is_all_that_is_found_in_float32(model: LanguageModel, prompts: Prompts, per_pass: int) -> None:
    means, effects, ranked = sweep(model, prompts, per_pass)
    assert effects.effects.per_pass == per_pass
    floor = measure_noise_floor(model, prompts, means, effects, ranked)
    assert floor.n_trials == 3
    assert floor.other_shape.per_pass != per_pass
    limit = rounding(size(effects.effects.base, effects.effects.edited))
    for noise in (floor.identity, floor.other_shape):
        assert all(0 <= noise.median[m] <= noise.largest[m] <= limit for m in MEASURES)
    assert ranked[0].scores["mean_abs_delta_logit"] > 0.1
    assert measure_noise_floor(model, prompts, means, effects, ranked) == floor


def test_effects_that_another_batch_shape_does_not_give_again_are_found(model: LanguageModel, prompts: Prompts) -> None:
    means, effects, ranked = sweep(model, prompts, 7)
    true = effects.effects.edited
    logit = true.logit.clone()
    logit[2, effects.heads.index(ranked[0].id)] += 0.25
    doubtful = replace(effects, effects=replace(effects.effects, edited=replace(true, logit=logit)))
    floor = measure_noise_floor(model, prompts, means, doubtful, ranked)
    limit = rounding(size(effects.effects.base, effects.effects.edited))
    assert floor.other_shape.largest["logit"] == pytest.approx(0.25, abs=limit)
    assert floor.other_shape.median["logit"] <= limit
    assert floor.identity.largest["logit"] <= limit


def test_the_best_heads_and_some_of_every_depth_are_measured() -> None:
    ids = [HeadId(layer, head) for layer in range(32) for head in range(32)]
    ranked = [ScoredHead(head, {}, 25) for head in sorted(ids, key=lambda head: (head.head * 7 % 32, head.layer))]
    chosen = heads_to_probe(ranked)
    assert len(set(chosen)) == 8
    assert chosen == sorted(chosen)
    assert {head.id for head in ranked[:3]} < set(chosen)
    assert chosen[0].layer == 0
    assert chosen[-1].layer == 31
    assert len({head.layer for head in chosen}) >= 5
    for n in range(1, 9):
        assert sorted(heads_to_probe(ranked[:n])) == sorted(head.id for head in ranked[:n])
