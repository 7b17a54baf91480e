from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relfv.errors import InputError
from relfv.language_model import LanguageModel, open_model
from relfv.settings import Settings
from relfv.stages.function_vector import build_function_vector
from relfv.stages.sweeps import Swept, swept_vectors, tabulate
from relfv.types import HeadId, MeanActivations, ScoredHead


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


@pytest.fixture(scope="module")
def means(model: LanguageModel) -> MeanActivations:
    shape = (model.arch.n_layers, model.arch.n_heads, model.arch.head_dim)
    return MeanActivations(np.random.default_rng(0).standard_normal(shape, np.float32), 1)


RANKED = [ScoredHead(HeadId(i % 3, i), {"mean_delta_p": -i}, 25) for i in range(8)]


HIDDEN = np.array([10.0, 20.0, 40.0])


def test_alphas_stretch_the_runs_own_vector_and_ks_take_the_best_heads(
    model: LanguageModel, means: MeanActivations
) -> None:
    settings = Settings(topk=3, alpha=1.5, alpha_sweep=(-1.0, 2.0), alpha_sweep_relative=(0.5,), k_sweep=(1, 3, 8))
    swept = swept_vectors(model.arch, means, RANKED, HIDDEN, settings)
    own, one, every = (
        build_function_vector(model.arch, means, [head.id for head in RANKED[:k]]).total for k in (3, 1, 8)
    )
    assert [one.name for one in swept] == ["alpha -1.0", "alpha 2.0", "alpha_relative 0.5", "k 1", "k 3", "k 8"]
    of_alpha_and_k = [one.added for one in swept if one.kind != "alpha_relative"]
    expected = [-own, 2 * own, 1.5 * one, 1.5 * own, 1.5 * every]
    assert all(np.array_equal(added, np.stack([v] * 3)) for added, v in zip(of_alpha_and_k, expected, strict=True))
    with pytest.raises(InputError, match="9: only 8 heads were scored"):
        swept_vectors(model.arch, means, RANKED, HIDDEN, Settings(topk=3, k_sweep=(9,)))


def test_relative_alphas_make_the_vector_so_many_times_as_long_as_the_hidden_state_of_each_layer(
    model: LanguageModel, means: MeanActivations
) -> None:
    settings = Settings(topk=3, alpha_sweep_relative=(-0.1, 0.5))
    less, more = swept_vectors(model.arch, means, RANKED, HIDDEN, settings)
    assert np.linalg.norm(more.added, axis=1) == pytest.approx(0.5 * HIDDEN)
    assert np.linalg.norm(less.added, axis=1) == pytest.approx(0.1 * HIDDEN)
    assert (less.added @ more.vector < 0).all()
    assert (more.added @ more.vector > 0).all()


def test_each_value_has_its_own_numbers_and_the_layer_where_they_are_best() -> None:
    per_layer = {
        str(layer): {name: {"mean_p": p, "acc": p / 2} for name, p in (("k 1", of_1), ("k 5", of_5))}
        for layer, (of_1, of_5) in enumerate([(0.1, 0.5), (0.3, 0.2)])
    }
    hidden, alpha = np.array([10.0, 50.0]), np.array([1, 1], np.float32)
    one = tabulate(per_layer, Swept("k", 1, np.array([3.0, 4.0]), alpha), hidden)
    five = tabulate(per_layer, Swept("k", 5, np.array([0.0, 1.0]), 2 * alpha), hidden)
    assert (one["value"], one["best_layer"], one["mean_p"], one["acc"], one["norm_added"]) == (1, 1, 0.3, 0.15, 5.0)
    assert one["share_of_hidden"] == 0.1
    assert (five["value"], five["best_layer"], five["mean_p"], five["alpha"]) == (5, 0, 0.5, 2.0)
    assert five["per_layer"]["1"] == {
        "mean_p": 0.2, "acc": 0.1, "alpha": 2.0, "norm_added": 2.0, "share_of_hidden": 0.04
    }  # fmt: skip
