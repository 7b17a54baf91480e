from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from parity import assert_close, assert_same_scores
from relfv.engine.base import of_layer_and_prompts
from relfv.language_model import LanguageModel, open_model
from relfv.stages.clean_trials import run_clean_trials
from relfv.stages.controls import CONTROLS, N_DRAWS, Candidates, candidate_vectors, inject_candidates
from relfv.stages.function_vector import build_function_vector
from relfv.types import HeadId, MeanActivations, Prompts

WORDS = ("cat", "cow", "sheep", "goat", "horse", "frog", "bear")
PROMPTS = [f"Q: dog\nA: puppy\n\nQ: {word}\nA:" for word in WORDS]
TARGETS = [5, 6, 7, 8, 9, 10, 11]
QUERIES = [3, 3, 1, 4, 1, 5, 3]
K = 4


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def heads_of(model: LanguageModel) -> list[HeadId]:
    return [HeadId(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]


@pytest.fixture(scope="module")
def made(model: LanguageModel):  # type: ignore[no-untyped-def]
    heads = heads_of(model)
    scores = np.random.default_rng(0).standard_normal((len(PROMPTS), len(heads)))
    selected = [heads[i] for i in np.argsort(-scores.mean(0))[:K]]
    clean = run_clean_trials(model, PROMPTS, TARGETS)
    means = clean.means()
    fv = build_function_vector(model.arch, means, selected).total
    found = candidate_vectors(model.arch, clean, QUERIES, scores, heads, fv, selected, [3, 1, 5], seed="0:A")
    return clean, means, fv, scores, found


def injected(found: Candidates, n_layers: int) -> torch.Tensor:
    """(layer, prompt, vector, resid_dim): what is added where."""
    return torch.stack([of_layer_and_prompts(found.parts, layer, slice(None)) for layer in range(n_layers)])


def test_the_held_out_vector_is_made_of_other_queries_trials_alone(model: LanguageModel, made) -> None:  # type: ignore[no-untyped-def]
    clean, _, _, scores, found = made
    heads = heads_of(model)
    vectors = injected(found, model.arch.n_layers)
    column = found.names.index("held_out")
    for n, query in enumerate((3, 1, 5)):
        kept = [i for i, other in enumerate(QUERIES) if other != query]
        best = [heads[i] for i in np.argsort(-scores[kept].mean(0), kind="stable")[:K]]
        means = MeanActivations(clean.activations[kept].double().mean(0).float(), len(kept))
        expected = build_function_vector(model.arch, means, best).total
        assert_close(vectors[0, n, column], expected)
        assert torch.equal(vectors[0, n, column], vectors[2, n, column])
    assert not torch.allclose(vectors[0, 0, column], vectors[0, 1, column], atol=1e-3)


def test_controls_are_what_they_are_called(model: LanguageModel, made) -> None:  # type: ignore[no-untyped-def]
    clean, _, fv, _, found = made
    assert set(found.names) == set(CONTROLS)
    vectors = injected(found, model.arch.n_layers)
    assert vectors.shape == (model.arch.n_layers, 3, len(found.names), model.arch.resid_dim)
    of = {name: vectors[:, :, [i for i, n in enumerate(found.names) if n == name]] for name in found.names}
    assert torch.equal(of["fv"][0, 0, 0], fv)
    assert of["random_direction"].shape[2] == of["random_heads"].shape[2] == N_DRAWS
    assert torch.allclose(of["random_direction"].norm(dim=-1), fv.norm().expand(3, 3, N_DRAWS), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(of["random_direction"][0, 0], fv[None])
    assert cosine.abs().max() < 0.7
    assert torch.allclose(of["mean_hidden"][:, 0, 0], clean.hidden)
    assert not torch.allclose(of["random_heads"][0, 0, 0], of["random_heads"][0, 0, 1])


def test_each_vector_is_injected_where_it_belongs(model: LanguageModel, made) -> None:  # type: ignore[no-untyped-def]
    found = made[-1]
    vectors = injected(found, model.arch.n_layers)
    prompts, targets = PROMPTS[:3], TARGETS[:3]
    effects = inject_candidates(model, prompts, targets, found, 1.5)
    ids = [model.tokens.encode(prompt) for prompt in prompts]
    for layer in (0, 2):
        for n in range(3):
            alone = model.engine.inject(Prompts(ids[n : n + 1], targets[n : n + 1]), 1.5 * vectors[layer, n], [layer])
            columns = slice(layer * len(found.names), (layer + 1) * len(found.names))
            assert_same_scores(effects.edited[n, columns], alone.edited[0])


def test_the_same_seed_gives_the_same_controls_and_one_query_leaves_nothing_to_hold_out(
    model: LanguageModel, made
) -> None:  # type: ignore[no-untyped-def]
    clean, _, fv, scores, found = made
    heads = heads_of(model)
    selected = [heads[i] for i in np.argsort(-scores.mean(0))[:K]]
    again = candidate_vectors(model.arch, clean, QUERIES, scores, heads, fv, selected, [3, 1, 5], seed="0:A")
    assert all(map(torch.equal, again.parts, found.parts))
    other = candidate_vectors(model.arch, clean, QUERIES, scores, heads, fv, selected, [3, 1, 5], seed="0:B")
    assert not torch.equal(other.parts[0], found.parts[0])
    alone = candidate_vectors(model.arch, clean, [3] * 7, scores, heads, fv, selected, [3], seed="0:A")
    assert "held_out" not in alone.names
    every = candidate_vectors(model.arch, clean, QUERIES, scores, heads, fv, heads, [3], seed="0:A")
    assert "random_heads" not in every.names
