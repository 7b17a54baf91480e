"""How large an effect arithmetic alone can make: what stands below it in trial_metrics.jsonl is not a finding.

Two ways to see it, on a few heads and trials: a patch that changes nothing (each head is given its own value back),
and the sweep's own effects once more from batches of another shape, which sums in another order, and by less rounding
where the engine has a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relfv.language_model import LanguageModel
from relfv.types import (
    MEASURES,
    ArithmeticNoise,
    Effects,
    HeadEffects,
    HeadId,
    MeanActivations,
    NoiseFloor,
    Prompts,
    ScoredHead,
)

N_BEST, N_SPREAD = 3, 5
N_TRIALS = 3
"""Few: what these passes cost is mostly their prefixes, and a sweep has 25 of those in all."""


def heads_to_probe(ranked: Sequence[ScoredHead]) -> list[HeadId]:
    """The ``N_BEST`` first of ``ranked``, whose effects are the large ones, and ``N_SPREAD`` others from the first layer
    to the last, sorted. Fewer where there are fewer heads."""
    best = [head.id for head in ranked[:N_BEST]]
    others = sorted(head.id for head in ranked[N_BEST:])
    steps = np.linspace(0, len(others) - 1, min(N_SPREAD, len(others))).round().astype(int)
    return sorted([*best, *(others[i] for i in steps)])


def measure_noise_floor(
    model: LanguageModel,
    corrupted_prompts: Sequence[str],
    target_ids: Sequence[int],
    means: MeanActivations,
    effects: HeadEffects,
    ranked: Sequence[ScoredHead],
) -> NoiseFloor:
    """Both ways on the first ``N_TRIALS`` trials: two passes of few prompts and heads beside a sweep of all.

    ``effects`` are the sweep's, on the same prompts; ``ranked`` are its heads.
    """
    heads = heads_to_probe(ranked)
    n = min(N_TRIALS, len(corrupted_prompts))
    ids, targets = [model.tokens.encode(prompt) for prompt in corrupted_prompts[:n]], list(target_ids[:n])
    # Another number of trials a pass than the sweep's, if that can be with so few.
    per_pass = n if n != effects.effects.per_pass else max(1, n - 1)
    identity = model.engine.sweep_heads(Prompts(ids, targets), None, heads, per_pass=per_pass)
    again = model.engine.finer().sweep_heads(Prompts(ids, targets), means.values, heads, per_pass=per_pass)
    columns = [effects.heads.index(head) for head in heads]
    before = _deltas(Effects(effects.effects.base[:n], effects.effects.edited[:n, columns]))
    return NoiseFloor(
        heads=tuple(heads),
        n_trials=n,
        identity=_noise(_deltas(identity), identity.per_pass),
        other_shape=_noise({m: delta - before[m] for m, delta in _deltas(again).items()}, again.per_pass),
    )


def _deltas(effects: Effects) -> dict[str, np.ndarray]:
    """MEASURES -> float64 (trial, head): with the patch minus without."""
    base, edited = effects.base.measures(), effects.edited.measures()
    return {m: edited[m] - base[m][:, None] for m in MEASURES}


def _noise(differences: dict[str, np.ndarray], per_pass: int) -> ArithmeticNoise:
    return ArithmeticNoise(
        per_pass,
        largest={m: float(np.abs(found).max()) for m, found in differences.items()},
        median={m: float(np.median(np.abs(found))) for m, found in differences.items()},
    )
