from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from parity import assert_same_scores
from relfv.engine.reference import naive_baseline, naive_injection
from relfv.errors import RunError
from relfv.language_model import LanguageModel, open_model
from relfv.stages.cross import compare_directions, inject_vectors, judge_target, overall_verdict
from relfv.types import Effects, Prompts, TokenScores

TEXTS = [f"Q: {word}\nA:" for word in ("cat", "cow", "sheep")]
TARGETS = [5, 6, 7]


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def asked(model: LanguageModel) -> Prompts:
    return Prompts([model.tokens.encode(text) for text in TEXTS], TARGETS)


def scores(p: torch.Tensor) -> TokenScores:
    return TokenScores(p.log().float(), p.log().float(), (p > 0.5).long())


def effects(base: float, **reached: list[float]) -> Effects:
    """Twelve prompts of a query each, target token 1; ``reached`` has each vector's mean P, layer by layer."""
    wobble = torch.tensor([0.01 * (i % 3 - 1) for i in range(12)], dtype=torch.float64)[:, None]
    n_layers = len(next(iter(reached.values())))
    columns = [reached[name][layer] for layer in range(n_layers) for name in reached]
    return Effects(
        base=scores(torch.full((12,), base, dtype=torch.float64)), edited=scores(torch.tensor([columns]) + wobble)
    )


def judged(base: float = 0.1, queries: list[int] | None = None, **reached: list[float]):  # type: ignore[no-untyped-def]
    prompts = Prompts([[0]] * 12, [1] * 12, queries or list(range(12)))
    return judge_target(effects(base, **reached), prompts, list(reached), "A", best_layer=1)


def test_every_vector_is_added_where_it_belongs_as_long_as_it_is(model: LanguageModel) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, model.arch.resid_dim), np.float32)
    vectors *= np.array([[0.5], [1.0], [3.0]], np.float32)
    prompts = asked(model)
    found = inject_vectors(model, prompts, ["A", "B", "C"], vectors, 1.5)
    assert found.edited.logit.shape == (3, 3 * model.arch.n_layers)
    with model.backbone.running():
        for n, (ids, target) in enumerate(zip(prompts.ids, TARGETS, strict=True)):
            alone = naive_baseline(model.backbone, ids, target)
            assert_same_scores(found.base[n], alone[0])
            for layer in range(model.arch.n_layers):
                for vector in range(3):
                    alone = naive_injection(model.backbone, ids, target, layer, torch.from_numpy(1.5 * vectors[vector]))
                    assert_same_scores(found.edited[n, 3 * layer + vector], alone[0])


def test_a_vector_that_overflows_is_named(model: LanguageModel) -> None:
    vectors = np.zeros((2, model.arch.resid_dim), np.float32)
    vectors[1, 0] = np.inf
    with pytest.raises(RunError, match="the vector of B at layer 0 gives NaN or infinite logits"):
        inject_vectors(model, asked(model), ["A", "B"], vectors, 1.0)


def test_an_own_vector_that_is_clearly_best_is_said_to_be() -> None:
    found = judged(A=[0.2, 0.8], B=[0.1, 0.3], C=[0.1, 0.1])
    at = found["at_best_layer"]
    assert at["own"]["mean_delta_p"] == pytest.approx(0.7, abs=1e-6)
    assert at["own"]["acc"] == 1.0
    assert at["own"] == found["per_layer"]["1"]["A"]
    assert at["others"]["mean_delta_p"] == pytest.approx(0.1, abs=1e-6)
    assert (at["rank_of_own"], at["best"], at["not_apart_from_own"]) == (1, "A", [])
    assert found["verdict"] == (
        "The own vector is the best of 3 at layer 1, which is chosen for it on these very queries (mean change in P "
        "+0.700, with the others' +0.100), its interval above every other's."
    )


def test_what_intervals_do_not_show_is_said_not_to_be_shown() -> None:
    found = judged(A=[0.2, 0.8], B=[0.1, 0.799], C=[0.1, 0.1])
    assert found["at_best_layer"]["rank_of_own"] == 1
    assert found["at_best_layer"]["not_apart_from_own"] == ["B"]
    assert "that it is better than 1 other vector is not shown" in found["verdict"]
    found = judged(A=[0.2, 0.799], B=[0.1, 0.8], C=[0.1, 0.1])
    assert "ranks 2 of 3" in found["verdict"]
    assert "the best is that of B (+0.700), that this one is better is not shown" in found["verdict"]
    found = judged(A=[0.2, 0.5], B=[0.1, 0.8], C=[0.1, 0.9])
    assert "ranks 3 of 3" in found["verdict"]
    assert "that of C (+0.800), its interval lies above the own one's" in found["verdict"]
    found = judged(A=[0.05, 0.09], B=[0.1, 0.02])
    assert "that the own one raises P at all is not shown" in found["verdict"]


def test_the_luck_of_the_best_layer_does_not_raise_p() -> None:
    """Twelve queries and 32 layers of noise: at the best of them the mean is two standard errors above 0."""
    rng = np.random.default_rng(0)
    said = 0
    for _ in range(40):
        reached = torch.from_numpy(np.clip(0.4 + 0.1 * rng.standard_normal((12, 64)), 0.01, 0.99))
        found = Effects(base=scores(torch.full((12,), 0.4, dtype=torch.float64)), edited=scores(reached))
        best = int(reached[:, ::2].mean(0).argmax())
        judgement = judge_target(found, Prompts([[0]] * 12, [1] * 12, range(12)), ["A", "B"], "A", best)
        said += "raises P at all is not shown" not in judgement["verdict"]
    assert said <= 4


def test_ties_count_against_the_own_vector() -> None:
    found = judged(A=[0.2, 0.8], B=[0.1, 0.8])
    assert (found["at_best_layer"]["rank_of_own"], found["at_best_layer"]["best"]) == (2, "B")


def test_one_query_shows_nothing() -> None:
    found = judged(queries=[4] * 12, A=[0.2, 0.8], B=[0.1, 0.1])
    assert found["at_best_layer"]["own"]["ci_low"] is None
    assert found["at_best_layer"]["not_apart_from_own"] == ["B"]
    assert found["verdict"].count("is not shown") == 2


def test_each_vector_may_also_have_its_own_layer() -> None:
    found = judged(A=[0.2, 0.8], B=[0.9, 0.1])
    assert found["at_best_layer"]["rank_of_own"] == 1
    assert found["rank_of_own_each_at_its_best_layer"] == 2


def test_the_overall_sentence_counts_what_is_there() -> None:
    clear, near, worse = (
        judged(A=[0.2, 0.8], B=[0.1, other], C=[0.1, 0.1]) for other in (0.1, 0.799, 0.9)
    )  # fmt: skip
    assert overall_verdict({"A": clear, "B": near, "C": worse}, 3) == (
        "The own vector is the best of 3 for 2 of 3 q_ids; that is shown, by an interval above every other vector's, "
        "for 1 of them (each at the layer that is best for its own vector on these very prompts, which favours it)."
    )
    assert "for 1 of 1 q_ids done so far; that is shown" in overall_verdict({"A": near}, 3)
    assert "for none of them" in overall_verdict({"A": near}, 3)
    said = overall_verdict({"A": worse, "B": worse}, 2)
    assert "for 0 of 2 q_ids (each" in said


def test_directions_are_compared_whatever_the_lengths() -> None:
    norms, cosine = compare_directions(np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    assert norms == pytest.approx([5.0, 2.0, 0.0])
    assert cosine[0][1] == cosine[1][0] == pytest.approx(0.8)
    assert cosine[0][0] == pytest.approx(1.0)
    assert cosine[2] == [None, None, None]
