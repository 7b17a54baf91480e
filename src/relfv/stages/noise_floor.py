"""The noise floor: how large an effect arithmetic alone can make. An effect below it in trial_metrics.jsonl is not a
finding.

Two ways to see it, on a few heads and trials: a patch that changes nothing (each head is given its own value back),
and the sweep's effects once more from batches of another shape, which sums in another order, and with less rounding
where the engine has a choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import RunError
from relfv.progress import doing
from relfv.store.folder import File
from relfv.store.formats import read_json
from relfv.types import (
    MEASURES,
    HeadEffects,
    HeadId,
    MeanActivations,
    Prompts,
    ScoredHead,
)

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

N_BEST, N_SPREAD = 3, 5
N_TRIALS = 3
"""Number of trials measured. They are few: what these passes cost is mostly their prefixes, and a sweep has 25 of those
in all."""


@dataclass(frozen=True)
class ArithmeticNoise:
    """Differences between effects that would be equal if sums were exact, over some heads and trials."""

    per_pass: int
    """Prompts that shared a forward pass."""
    largest: dict[str, float]
    """Measure -> largest absolute difference."""
    median: dict[str, float]
    """Measure -> median absolute difference."""


@dataclass(frozen=True)
class NoiseFloor:
    """The effects of a head on one trial that arithmetic alone makes."""

    heads: tuple[HeadId, ...]
    """The heads measured."""
    n_trials: int
    """How many trials were measured, from the first."""
    identity: ArithmeticNoise
    """Effects of giving each head its own value back; in exact arithmetic 0."""
    other_shape: ArithmeticNoise
    """The sweep's effects against the same ones from batches of another shape."""


def heads_to_probe(ranked: Sequence[ScoredHead]) -> list[HeadId]:
    """The ``N_BEST`` first of ``ranked``, whose effects are the large ones, and ``N_SPREAD`` others from the first
    layer to the last, sorted. Fewer where there are fewer heads."""
    best = [head.id for head in ranked[:N_BEST]]
    others = sorted(head.id for head in ranked[N_BEST:])
    steps = np.linspace(0, len(others) - 1, min(N_SPREAD, len(others))).round().astype(int)
    return sorted([*best, *(others[i] for i in steps)])


def measure_noise_floor(
    model: LanguageModel, prompts: Prompts, means: MeanActivations, effects: HeadEffects, ranked: Sequence[ScoredHead]
) -> NoiseFloor:
    """Measure the noise in both ways on the first ``N_TRIALS`` of the corrupted prompts: two passes of few prompts and
    heads beside a sweep of all.

    ``effects`` are the sweep's, on the same prompts; ``ranked`` are its heads.
    """
    heads = heads_to_probe(ranked)
    n = min(N_TRIALS, len(prompts))
    # Take another number of trials a pass than the sweep's, if so few trials allow it.
    per_pass = n if n != effects.effects.per_pass else max(1, n - 1)
    with doing("noise floor: patches that change nothing, and effects once more in batches of another shape"):
        identity = model.engine.sweep_heads(prompts[:n], None, heads, per_pass=per_pass)
        again = model.engine.finer().sweep_heads(prompts[:n], means.values, heads, per_pass=per_pass)
    columns = [effects.heads.index(head) for head in heads]
    differences = {m: again.delta(m) - effects.effects.delta(m)[:n, columns] for m in MEASURES}
    return NoiseFloor(
        heads=tuple(heads),
        n_trials=n,
        identity=_noise({m: identity.delta(m) for m in MEASURES}, identity.per_pass),
        other_shape=_noise(differences, again.per_pass),
    )


def _noise(differences: Mapping[str, np.ndarray], per_pass: int) -> ArithmeticNoise:
    return ArithmeticNoise(
        per_pass,
        largest={m: float(np.abs(values).max()) for m, values in differences.items()},
        median={m: float(np.median(np.abs(values))) for m, values in differences.items()},
    )


# --- its file, which is one of stepD_cie's ---------------------------------------------------------------------------


def read_noise_floor(path: Path) -> dict[str, Any]:
    """The file as it is. Raises RunError if it is missing or not one."""
    content = read_json(path)
    try:
        _ = [float(content[way][m]["max"]) for way in ("identity", "other_shape") for m in MEASURES]
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{path}: is not a noise floor as StepD writes it") from None
    return content


NOISE_FLOOR = File("stepD_cie/noise_floor.json", read_noise_floor)


def noise_floor_document(
    floor: NoiseFloor, q_id: str, *, trials_per_pass: int, n_heads: int, arithmetic: Mapping[str, Any]
) -> dict[str, Any]:
    """The noise beside the sweep's own batch shape, ``n_heads`` a trial, and the ``arithmetic`` both ran in."""
    noise = floor.other_shape.largest
    in_words = (
        f"On a single trial an effect below {noise['p']:.1g} in p, {noise['logit']:.1g} in logit or "
        f"{noise['logprob']:.1g} in logprob cannot be told from arithmetic; means over trials are steadier than that."
        if any(noise.values())
        else "On this device and model the batch's shape made no difference at all to the effects measured."
    )
    return {
        "q_id": q_id,
        "meaning": "Both numbers would be 0 if sums were exact. identity: a head is given its own value back, by the "
        "sweep's own kernels. other_shape: the same effect from a batch of another shape, and from finer pieces where "
        f"products are put together from pieces. {in_words}",
        **arithmetic,
        "trials_per_pass": trials_per_pass,
        "heads_per_trial": n_heads,
        "heads": [vars(head) for head in floor.heads],
        "n_trials": floor.n_trials,
        "identity": _in_json(floor.identity),
        "other_shape": {**_in_json(floor.other_shape), "heads_per_trial": len(floor.heads)},
    }


def _in_json(noise: ArithmeticNoise) -> dict[str, Any]:
    differences = {m: {"max": noise.largest[m], "median": noise.median[m]} for m in MEASURES}
    return {**differences, "trials_per_pass": noise.per_pass}
