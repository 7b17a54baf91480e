from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from relfv.engine.reference import naive_baseline, naive_injection, naive_together
from relfv.language_model import LanguageModel, open_model
from relfv.stages.function_vector import build_function_vector
from relfv.stages.judging import Tried
from relfv.stages.left_out_relation import judge_in_place, judge_left_out, leave_out, over_targets
from relfv.types import Effects, HeadId, MeanActivations, Prompts, TokenScores

TEXTS = [f"Q: {word}\nA:" for word in ("cat", "cow", "sheep", "owl")]
TARGETS = [5, 6, 7, 8]
OWN = [HeadId(0, 1), HeadId(2, 3)]
OTHERS = [HeadId(1, 4), HeadId(2, 0)]


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def test_a_relation_left_out_is_what_plain_hooks_make_of_it(model: LanguageModel) -> None:
    arch = model.arch
    values = np.random.default_rng(0).standard_normal((arch.n_layers, arch.n_heads, arch.head_dim), np.float32)
    means = MeanActivations(values, 4)
    prompts = Prompts([model.tokens.encode(text) for text in TEXTS], TARGETS, (0, 1, 2, 3))
    swept = [HeadId(layer, head) for layer in range(arch.n_layers) for head in range(arch.n_heads)]
    found = leave_out(model, prompts, means, OWN, OTHERS, swept, 1, 1.5, seed="x")
    with model.backbone.running():
        asked = list(zip(prompts.ids, TARGETS, strict=True))
        base = np.mean([float(naive_baseline(model.backbone, *one).p[0]) for one in asked])
        for name, heads in (("own", OWN), ("others", OTHERS)):
            vector = torch.from_numpy(np.float32(1.5) * build_function_vector(arch, means, heads).total)
            for layer in range(arch.n_layers):
                reached = [float(naive_injection(model.backbone, *one, layer, vector).p[0]) for one in asked]
                there = found["vector"]["per_layer"][str(layer)][name]
                assert there["mean_delta_p"] == pytest.approx(np.mean(reached) - base, rel=1e-3, abs=1e-6)
            put = {head: torch.from_numpy(values[head.layer, head.head]) for head in heads}
            reached = [float(naive_together(model.backbone, *one, put, {}).p[0]) for one in asked]
            assert found["in_place"][name]["mean_delta_p"] == pytest.approx(np.mean(reached) - base, rel=1e-3, abs=1e-6)
    at = found["vector"]["per_layer"]["1"]
    difference = at["others"]["mean_delta_p"] - at["own"]["mean_delta_p"]
    assert found["vector"]["others_minus_own"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert found["n_draws"] == 19 == len(found["in_place"]["random"]["mean_p_of_draws"])
    assert set(found["compared_layers"]) == {
        int(layer) for layer, of in found["vector"]["per_layer"].items() if "random" in of
    }


def test_a_draw_that_is_no_number_is_not_known_to_do_worse() -> None:
    """As in controls.json."""

    def effects(*p: float) -> Effects:
        both = torch.tensor([p, p])
        scores = TokenScores(both, both.log(), torch.zeros(both.shape, dtype=torch.int64))
        return Effects(base=scores[:, 0], edited=scores, per_pass=2)

    prompts = Prompts([[1, 2]] * 2, TARGETS[:2], (0, 1))
    chosen, draws = effects(0.5, 0.4), effects(0.1, float("nan"), 0.45)
    in_place = judge_in_place([(chosen, ["own", "others"]), (draws, ["random"] * 3)], prompts)
    tried = [Tried(chosen, [0], ["own", "others"]), Tried(draws, [0], ["random"] * 3)]
    vector = judge_left_out(tried, prompts, [0], 0)
    assert in_place["n_draws_as_good"] == vector["n_draws_as_good"] == 2


def test_heads_that_are_all_of_their_layers_have_no_random_rival(model: LanguageModel) -> None:
    arch = model.arch
    means = MeanActivations(np.ones((arch.n_layers, arch.n_heads, arch.head_dim), np.float32), 4)
    prompts = Prompts([model.tokens.encode(TEXTS[0])], TARGETS[:1], (0,))
    found = leave_out(model, prompts, means, OWN, OTHERS, OTHERS, 0, 1.0, seed="x")
    assert (found["n_draws"], found["vector"]["n_draws_as_good"]) == (0, 0)
    over = over_targets([found, found])["vector"]
    assert over["random"]["mean"] is None
    assert over["others_minus_own"]["ci_low"] == pytest.approx(over["others_minus_own"]["mean"])
