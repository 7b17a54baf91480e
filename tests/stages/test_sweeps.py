from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relfv.errors import InputError
from relfv.language_model import LanguageModel, open_model
from relfv.stages.function_vector import build_function_vector
from relfv.stages.sweeps import sweep_vectors, tabulate
from relfv.types import HeadId, MeanActivations, ScoredHead


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


@pytest.fixture(scope="module")
def means(model: LanguageModel) -> MeanActivations:
    shape = (model.arch.n_layers, model.arch.n_heads, model.arch.head_dim)
    return MeanActivations(np.random.default_rng(0).standard_normal(shape, np.float32), 1)


RANKED = [ScoredHead(HeadId(i % 3, i), {"mean_delta_p": -i}, 25) for i in range(8)]


def test_alphas_stretch_the_runs_own_vector_and_ks_take_the_best_heads(
    model: LanguageModel, means: MeanActivations
) -> None:
    vectors = sweep_vectors(model.arch, means, RANKED, topk=3, alpha=1.5, alphas=[-1.0, 2.0], ks=[1, 3, 8])
    own, one, every = (
        build_function_vector(model.arch, means, [head.id for head in RANKED[:k]]).total for k in (3, 1, 8)
    )
    assert np.array_equal(vectors, [-own, 2 * own, 1.5 * one, 1.5 * own, 1.5 * every])
    with pytest.raises(InputError, match="9: only 8 heads were scored"):
        sweep_vectors(model.arch, means, RANKED, topk=3, alpha=1.0, alphas=[], ks=[9])


def test_each_value_has_its_own_numbers_and_the_layer_where_they_are_best() -> None:
    per_layer = {
        str(layer): {name: {"mean_p": p, "acc": p / 2} for name, p in (("k 1", of_1), ("k 5", of_5))}
        for layer, (of_1, of_5) in enumerate([(0.1, 0.5), (0.3, 0.2)])
    }
    one, five = tabulate(per_layer, ["k 1", "k 5"], [1, 5], np.array([[3.0, 4.0], [0.0, 1.0]]))
    assert (one["value"], one["best_layer"], one["mean_p"], one["acc"], one["norm_added"]) == (1, 1, 0.3, 0.15, 5.0)
    assert (five["value"], five["best_layer"], five["mean_p"]) == (5, 0, 0.5)
    assert five["per_layer"]["1"] == {"mean_p": 0.2, "acc": 0.1}
