from __future__ import annotations

import numpy as np
import pytest

from measured_relations import HEADS, KEY, measured
from relfv.stages.aggregate import describe_heads
from relfv.stages.over_relations import over_relations


def test_heads_are_described_best_first_and_those_that_are_called_are_counted() -> None:
    rng, effects = np.random.default_rng(0), {3: 0.4, 7: 0.5, 11: 0.3}
    relations = []
    for i in range(12):
        scores = 0.01 * rng.standard_normal(len(HEADS))
        for head, effect in effects.items():
            scores[head] += effect * rng.uniform(0.9, 1.1)
        relations.append(measured(f"r{i}", scores))
    heads = over_relations(relations, KEY, 3)
    found = describe_heads(heads, len(relations))
    assert found["n_called"] == 3
    assert (found["n_heads"], found["n_called_at_once"]) == (len(HEADS), 1)
    assert [(head["layer"], head["head"]) for head in found["universal"]] == [
        (HEADS[i].layer, HEADS[i].head) for i in (7, 3, 11)
    ]
    for head, i in zip(found["universal"], (7, 3, 11), strict=True):
        own = [one.scored[i].scores[KEY] for one in relations]
        assert head["aie"] == pytest.approx(np.mean(own))
        assert head["se"] == pytest.approx(np.std(own, ddof=1) / np.sqrt(12))
        assert (head["n_positive"], head["in_top_k"]) == (12, 1)
