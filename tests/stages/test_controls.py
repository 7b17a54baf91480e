from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folders import arguments
from parity import assert_close, assert_same_scores
from relfv.cli import main
from relfv.engine.arithmetic import logits
from relfv.engine.base import of_layer_and_prompts
from relfv.engine.clean import CleanRun, run_clean
from relfv.language_model import LanguageModel, open_model
from relfv.stages.control_vectors import (
    CONTROLS,
    N_DIRECTIONS,
    N_DRAWS_OF_HEADS,
    N_FIRST_DRAWS,
    Candidates,
    Ground,
    candidate_vectors,
    compared_layers,
)
from relfv.stages.function_vector import build_function_vector
from relfv.stages.judging import Tried, best_layer, judge_candidates, judge_vectors, n_as_good, p_of_draws
from relfv.stages.means import mean_activations
from relfv.types import Effects, HeadId, MeanActivations, Prompts, TokenScores, WordPair

WORDS = ("cat", "cow", "sheep", "goat", "horse", "frog", "bear")
TEXTS = [f"Q: dog\nA: puppy\n\nQ: {word}\nA:" for word in WORDS]
TARGETS = [5, 6, 7, 8, 9, 10, 11]
QUERIES = [3, 3, 1, 4, 1, 5, 3]
EVALUATED = [3, 1, 5]
K = 4


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def heads_of(model: LanguageModel) -> list[HeadId]:
    return [HeadId(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> Prompts:
    return Prompts([model.tokens.encode(text) for text in TEXTS], TARGETS, QUERIES)


@pytest.fixture(scope="module")
def clean(model: LanguageModel, prompts: Prompts) -> CleanRun:
    return run_clean(model.backbone, prompts)


@pytest.fixture(scope="module")
def scores(model: LanguageModel) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(TEXTS), len(heads_of(model))))


@pytest.fixture(scope="module")
def ground(model: LanguageModel, clean: CleanRun, scores: np.ndarray):  # type: ignore[no-untyped-def]
    """The ground of control vectors, with what a case changes."""
    heads = heads_of(model)
    best = [heads[i] for i in np.argsort(-scores.mean(0))[:K]]
    fv = build_function_vector(model.arch, mean_activations(clean), best).total

    def make(trial_queries=QUERIES, selected=best, evaluated=EVALUATED, seed="0:A") -> Ground:  # type: ignore[no-untyped-def]
        return Ground(model.arch, clean, trial_queries, scores, heads, fv, selected, evaluated, seed=seed)

    return make


@pytest.fixture(scope="module")
def found(ground) -> Candidates:  # type: ignore[no-untyped-def]
    return candidate_vectors(ground())


def injected(found: Candidates, n_layers: int) -> torch.Tensor:
    """(layer, prompt, vector, resid_dim): what is added where."""
    return torch.stack([of_layer_and_prompts(found.parts, layer, slice(None)) for layer in range(n_layers)])


def of_name(found: Candidates, name: str) -> torch.Tensor:
    return found.parts[list(dict.fromkeys(found.names)).index(name)]


def test_the_held_out_vector_is_made_of_other_queries_trials_alone(
    model: LanguageModel, clean: CleanRun, scores: np.ndarray, found: Candidates
) -> None:
    heads = heads_of(model)
    vectors = injected(found, model.arch.n_layers)
    column = found.names.index("held_out")
    for n, query in enumerate(EVALUATED):
        kept = [i for i, other in enumerate(QUERIES) if other != query]
        best = [heads[i] for i in np.argsort(-scores[kept].mean(0), kind="stable")[:K]]
        means = MeanActivations(clean.activations[kept].double().mean(0).float().numpy(), len(kept))
        expected = torch.from_numpy(build_function_vector(model.arch, means, best).total)
        assert_close(vectors[0, n, column], expected)
        assert torch.equal(vectors[0, n, column], vectors[2, n, column])
    assert not torch.allclose(vectors[0, 0, column], vectors[0, 1, column], atol=1e-3)


def test_controls_are_what_they_are_called(
    model: LanguageModel,
    clean: CleanRun,
    ground,  # type: ignore[no-untyped-def]
    found: Candidates,
) -> None:
    fv = ground().fv.float()
    of_other_families = {"as_written", "as_written_held_out", "random_heads_as_written"}
    assert set(found.names) == set(CONTROLS) - of_other_families
    vectors = injected(found, model.arch.n_layers)
    assert vectors.shape == (model.arch.n_layers, 3, len(found.names), model.arch.resid_dim)
    of = {name: vectors[:, :, [i for i, n in enumerate(found.names) if n == name]] for name in found.names}
    assert of["random_direction"].shape[2] == N_DIRECTIONS
    assert of["random_heads"].shape[2] == of["random_heads_scaled"].shape[2] == N_DRAWS_OF_HEADS >= 19
    for name in ("random_direction", "random_heads_scaled"):
        assert torch.allclose(of[name].norm(dim=-1), fv.norm().expand(3, 3, of[name].shape[2]), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(of["random_direction"][0, 0], fv[None])
    assert cosine.abs().max() < 0.7
    assert torch.allclose(of["mean_hidden"][:, 0, 0], clean.hidden)
    assert not torch.allclose(of["random_heads"][0, 0, 0], of["random_heads"][0, 0, 1])


def test_random_heads_are_drawn_from_all_heads_of_the_selected_ones_layers(ground) -> None:  # type: ignore[no-untyped-def]
    selected = [HeadId(0, 1), HeadId(2, 0), HeadId(2, 3)]
    draws = ground(selected=selected).draws
    assert len(draws) == N_DRAWS_OF_HEADS
    for draw in draws:
        assert sorted(head.layer for head in draw) == [0, 2, 2]
        assert len(set(draw)) == 3
    drawn = {head for draw in draws for head in draw}
    assert drawn & set(selected)
    assert drawn - set(selected)
    assert ground(seed="0:B", selected=selected).draws != draws
    all_of_layer_0 = [HeadId(0, head) for head in range(8)]  # no draw can be another there, and draws differ in layer 2
    draws = ground(selected=[*all_of_layer_0, HeadId(2, 0)]).draws
    assert all({*all_of_layer_0} < {*draw} and len(draw) == 9 for draw in draws)
    assert len({*map(tuple, map(sorted, draws))}) > 1


def test_each_vector_is_injected_where_it_belongs(model: LanguageModel, prompts: Prompts, found: Candidates) -> None:
    vectors = injected(found, model.arch.n_layers)
    effects = model.engine.inject(prompts[:3], [1.5 * part for part in found.parts], range(model.arch.n_layers))
    for layer in (0, 2):
        for n in range(3):
            alone = model.engine.inject(prompts[n : n + 1], 1.5 * vectors[layer, n], [layer])
            columns = slice(layer * len(found.names), (layer + 1) * len(found.names))
            assert_same_scores(effects.edited[n, columns], alone.edited[0])


def test_the_same_seed_gives_the_same_controls_and_one_query_leaves_nothing_to_hold_out(
    model: LanguageModel,
    ground,  # type: ignore[no-untyped-def]
    found: Candidates,
) -> None:
    again = candidate_vectors(ground())
    assert again.names == found.names
    assert all(map(torch.equal, again.parts, found.parts))
    other = candidate_vectors(ground(seed="0:B"))
    assert not torch.equal(of_name(other, "random_heads"), of_name(found, "random_heads"))
    assert not torch.equal(of_name(other, "random_direction"), of_name(found, "random_direction"))
    alone = candidate_vectors(ground(trial_queries=[3] * 7, evaluated=[3]))
    assert "held_out" not in alone.names
    every = candidate_vectors(ground(selected=heads_of(model), evaluated=[3]))
    assert "random_heads" not in every.names


def test_draws_are_compared_at_a_few_layers_spread_evenly_over_the_model() -> None:
    assert compared_layers(3) == [0, 1, 2]
    assert compared_layers(18) == [2, 6, 11, 15]
    for n_layers in (1, 6, 12, 32, 80):
        layers = compared_layers(n_layers)
        assert len(layers) == min(4, n_layers)
        assert 0 <= layers[0] <= layers[-1] < n_layers
        assert max(np.diff([-1, *layers, n_layers])) <= 1.5 * n_layers / len(layers) + 1


def test_a_vector_for_each_layer_goes_with_its_layer(found: Candidates) -> None:
    parts = dict(zip(dict.fromkeys(found.names), found.at([2, 0]), strict=True))
    assert torch.equal(parts["mean_hidden"][0], of_name(found, "mean_hidden")[2])
    assert torch.equal(parts["mean_hidden"][1], of_name(found, "mean_hidden")[0])
    assert torch.equal(parts["random_heads"], of_name(found, "random_heads"))


def tried(names: list[str], layers: list[int], p: list[list[float]]) -> Tried:
    """Two prompts with each vector's ``p`` (layer, vector)."""
    flat = torch.tensor(p).flatten().expand(2, -1)
    scores = TokenScores(flat, flat.log(), torch.zeros(flat.shape, dtype=torch.int64))
    return Tried(Effects(base=scores[:, 0], edited=scores, per_pass=2), layers, names)


def test_further_draws_join_the_first_at_every_layer() -> None:
    first = tried(["a", "b", "b"], [1, 5], [[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]])
    both = [first.beside(tried(["b"], [1, 5], [[0.35], [0.95]]))]
    assert p_of_draws(both, "b", [5, 1]) == pytest.approx(np.array([[0.8, 0.9, 0.95], [0.2, 0.3, 0.35]]))
    assert p_of_draws(both, "a", [5]) == pytest.approx(np.array([[0.7]]))


def test_the_best_of_some_layers_has_the_largest_mean_p_and_of_equal_ones_is_the_first() -> None:
    some = [tried(["a", "b", "b"], [1, 5, 7], [[0.9, 0.25, 0.5], [0.5, 0.25, 0.5], [0.25, np.nan, 0.5]])]
    assert best_layer(some, "b", [1, 5, 7]) == best_layer(some, "b", [7, 5, 1]) == 1
    assert best_layer(some, "b", [5, 7]) == best_layer(some, "a", [7, 5]) == 5


def test_a_draw_does_as_well_where_it_is_not_known_to_do_worse() -> None:
    draws = np.array([[0.1, 0.4, 0.2, np.nan], [0.2, 0.1, 0.3, 0.1]])
    assert n_as_good(draws, np.array([0.1, 0.35])) == 2
    assert n_as_good(draws, np.array([0.5, 0.1])) == 1


def test_a_draw_that_is_the_vector_itself_does_as_well_to_the_last_bit() -> None:
    p = torch.rand(15, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # prompt, layer
    prompts = Prompts([[1, 2]] * 15, [1] * 15, clusters=[*range(15)])

    def judged(names: list[str], columns: list[torch.Tensor]) -> Any:
        of_all = torch.stack(columns, dim=2).flatten(1)
        scores = TokenScores(of_all, of_all.log(), torch.zeros(of_all.shape, dtype=torch.int64))
        return judge_vectors(Effects(base=scores[:, 0], edited=scores, per_pass=15), prompts, names)["per_layer"]

    own, draws = judged(["fv"], [p]), judged(["b", "b", "b"], [p / 2, p, p / 3])
    assert [row["fv"]["mean_p"] for row in own.values()] == [row["b"]["mean_p_of_draws"][1] for row in draws.values()]


def test_draws_end_early_only_where_one_did_as_well(llama_path: Path, csv_path: Path, tmp_path: Path) -> None:
    """With this vector against the relation a draw of one kind does, of the first five, and none of the other."""
    settings = ["--q_list", "A1", "--alpha", "-1", "--topk", "3"]
    assert main([*arguments(llama_path, csv_path, tmp_path), *settings, "--device", "cpu"]) == 0
    controls = json.loads((tmp_path / "pairs/A1/artifacts/step6/controls.json").read_text())
    compared = [controls["per_layer"][str(layer)] for layer in controls["compared_layers"]]
    own = np.array([row["fv"]["mean_p"] for row in compared])
    n_draws = {}
    for name in ("random_heads", "random_heads_scaled"):
        draws = np.array([row[name]["mean_p_of_draws"] for row in compared])
        n_draws[name] = draws.shape[1]
        assert (n_as_good(draws[:, :N_FIRST_DRAWS], own) > 0) == (draws.shape[1] == N_FIRST_DRAWS)
    assert n_draws == {"random_heads": N_FIRST_DRAWS, "random_heads_scaled": N_DRAWS_OF_HEADS}


def test_what_is_read_over_fewer_tokens_is_named(
    llama_path: Path, csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named() -> list[str]:
        assert main([*arguments(llama_path, csv_path, tmp_path, "--q_list", "A1"), "--force", "--device", "cpu"]) == 0
        return json.loads((tmp_path / "pairs/A1/artifacts/step6/controls.json").read_text())["read_in_brief"]

    assert named() == []
    for number in ("N_LIKELIEST", "N_OTHERS", "_TILE_TOKENS"):
        monkeypatch.setattr(logits, number, 40)
    brief = named()
    assert {"random_heads", "mean_hidden", "random_heads_in_place"} <= {*brief}
    assert not {"held_out", "as_written", "heads_in_place"} & {*brief}


def test_demos_are_credited_with_what_they_bring_to_the_same_answer() -> None:
    """One input with two right answers, of which one is asked three times: each zero-shot prompt has its own."""
    big, little, small = WordPair("big", "little"), WordPair("big", "small"), WordPair("cat", "kitten")
    asked_clean = [big, little, big, big, small]

    def scored(p: list[float]) -> TokenScores:
        return TokenScores(torch.tensor(p), torch.tensor(p).log(), torch.zeros(len(p), dtype=torch.int64))

    clean = CleanRun(torch.zeros(5, 1, 1, 1), torch.zeros(1, 1), None, scored([0.5, 0.125, 0.25, 0.75, 1.0]))
    base = scored([0.1, 0.2, 0.3])
    tried = Tried(Effects(base=base, edited=base[:, None], per_pass=3), [0], ["fv"])
    prompts = Prompts([[1]] * 3, [1, 2, 3], [0, 0, 4])
    judged = judge_candidates([tried], prompts, [big, little, small], clean, asked_clean)
    assert judged["by_prompt"]["p_clean"] == pytest.approx([0.5, 0.125, 1.0])
