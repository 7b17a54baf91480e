"""The edits of ablation.py at the last token: sets of heads and directions of the residual stream that are taken away.
Each edit is a version of the token, and one pass makes them all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relfv.stages.as_written import differs, means, vector_as_written
from relfv.stages.control_vectors import N_DRAWS_OF_HEADS, Ground
from relfv.types import HeadId

if TYPE_CHECKING:
    import torch

    from relfv.engine.base import Together
    from relfv.engine.clean import CleanRun

N_DRAWS = {"swapped": N_DRAWS_OF_HEADS, "other_relations": N_DRAWS_OF_HEADS, "mean": 5, "zero": 5}
"""Number of draws of random heads, by what they are set to; claims are tested against the draws of the first two."""
_N_DIRECTIONS = 5
_NEAREST = 5
"""Number of heads of about the same length from which one is drawn."""

SETS = {
    "top": "the heads of the function vector",
    "top_held_out": "for each prompt ranking of heads, and their mean over shuffled prompts, without its own query's "
    "trials",
    "writers": "those of them that raise P on shuffled prompts; only where that is not all",
    "cancellers": "as many others at most, those that lower P most (most negative CIE)",
    "bottom": "as many others, those of the least |CIE|",
    "random_of_layers": "as many heads of each layer, drawn like random_heads of controls.json; mean over draws",
    "random_of_norm": "for each head another one, not of the function vector, of about the same length of what it "
    "writes; mean over draws",
}
"""Sets of heads, by name. ``top_<n>`` are the n best."""


@dataclass(frozen=True)
class Taken:
    """A version of the last token: what is taken away, and how."""

    what: str
    """Name of a set of heads or of a direction; several draws share one name."""
    how: str
    """For heads, what they are set to, one of ``N_DRAWS``; for directions, after which layers they are taken out,
    ``<l>`` or ``all``, or ``all_to_mean``."""
    version: Together

    @property
    def name(self) -> str:
        """Name of the version, such as ``top, mean``."""
        return f"{self.what}, {self.how}"


def ladder(k: int, n: int) -> list[int]:
    """Numbers of best heads beside ``k``, of ``n`` in all: for 20 these are 1, 5, 10 and 40."""
    return sorted({m for m in (1, k // 4, k // 2, 2 * k) if 1 <= m <= n} - {k})


def sets_of_heads(
    ground: Ground, ranked: Sequence[HeadId], cie: Mapping[HeadId, float], lengths: Mapping[HeadId, float]
) -> dict[str, list[list[HeadId]]]:
    """Name -> draws of that set of heads, for the sets that are not empty. ``ranked`` are all heads swept, best first;
    ``cie`` their CIE (mean_delta_p), ``lengths`` those of what they write."""
    top = list(ground.selected)
    others = [head for head in ranked if head not in set(top)]
    writers = [head for head in top if cie[head] > 0]
    sets = {
        "top": [top],
        **{f"top_{n}": [list(ranked[:n])] for n in ladder(len(top), len(ranked))},
        "writers": [writers] if len(writers) < len(top) else [],
        "cancellers": [sorted((h for h in others if cie[h] < 0), key=lambda h: (cie[h], h))[: len(top)]],
        "bottom": [sorted(others, key=lambda head: (abs(cie[head]), head))[: len(top)]],
        "random_of_layers": ground.draws,
        "random_of_norm": drawn_by_length(top, others, lengths, random.Random(ground.generator_seed)),
    }
    return {name: draws for name, draws in sets.items() if draws and draws[0]}


def drawn_by_length(
    top: Sequence[HeadId], others: Sequence[HeadId], lengths: Mapping[HeadId, float], rng: random.Random
) -> list[list[HeadId]]:
    """Sets of heads from ``others``, one head for each of ``top``, drawn from those of the nearest length that are
    still left. Empty where there are fewer."""
    if len(others) < len(top):
        return []
    draws = []
    for _ in range(N_DRAWS_OF_HEADS):
        left, chosen = list(others), []
        for head in rng.sample(list(top), len(top)):  # or the last would always get the worst partners
            nearest = sorted(left, key=lambda other, own=lengths[head]: (abs(lengths[other] - own), other))[:_NEAREST]
            chosen.append(rng.choice(nearest))
            left.remove(chosen[-1])
        draws.append(sorted(chosen))
    return draws


def lengths_written(ground: Ground) -> dict[HeadId, float]:
    """Head -> length of the mean, over clean prompts, of what it adds to the residual stream, for each head swept; that
    of W_O z where what stands between is not known."""
    clean, arch = ground.clean, ground.arch
    z = (clean.written if clean.writing else clean.activations.double()).mean(0)
    found = {}
    for head in ground.heads:
        part = arch.project_head(head.layer, head.head, z[head.layer, head.head])
        found[head] = float((clean.writing.gained(head.layer, part) if clean.writing else part).norm())
    return found


def heads_taken(
    ground: Ground, shuffled: CleanRun, others: torch.Tensor | None, sets: Mapping[str, Sequence[Sequence[HeadId]]]
) -> list[Taken]:
    """Every set of heads set to what it is on each trial's own ``shuffled`` prompt, to its mean over these, to zero,
    and to ``others`` (layer, head, head_dim), its mean over prompts of other relations, where there are such."""
    import torch

    from relfv.engine.base import Together

    values = means(shuffled.activations, ground.all_trials(1))
    to = {"swapped": shuffled.activations, "mean": values, "zero": torch.zeros_like(values)}
    to |= {} if others is None else {"other_relations": others[None]}
    return [
        Taken(name, how, Together(Together.setting([heads], values).chosen, to[how]))
        for name, draws in sets.items()
        for how in to
        for heads in draws[: N_DRAWS[how]]
    ]


def held_out_taken(ground: Ground, shuffled: CleanRun, others: torch.Tensor | None) -> list[Taken]:
    """Each prompt's own heads, swapped, set to their mean over the other queries' shuffled prompts, and to ``others``;
    none with one query."""
    from relfv.engine.base import Together

    if ground.held_out is None:
        return []
    shares, chosen, prompt = ground.held_out
    to = {"swapped": shuffled.activations, "mean": means(shuffled.activations, shares)[prompt]}
    to |= {} if others is None else {"other_relations": others.expand(len(prompt), -1, -1, -1)}
    sets = [chosen[i] for i in prompt]
    return [Taken("top_held_out", how, Together.setting(sets, values)) for how, values in to.items()]


def directions(ground: Ground) -> dict[str, torch.Tensor]:
    """Name -> float64 (draw, resid_dim): the function vector, the one as written where it differs, and vectors of
    random heads. Those of length 0 have no direction."""
    import torch

    found = {"fv": ground.fv[None]}
    if differs(ground):
        found["fv_as_written"] = torch.from_numpy(vector_as_written(ground).total).double()[None]
    if ground.draws:
        found["random_heads"] = ground.of_draws[:_N_DIRECTIONS]
    return {name: vectors for name, vectors in found.items() if bool(vectors.norm(dim=1).all())}


def directions_taken(of: Mapping[str, torch.Tensor], shuffled: CleanRun) -> list[Taken]:
    """Each direction taken out after every layer at once, or set to what it is on ``shuffled`` prompts on average; and
    but for random ones after each layer by itself."""
    import torch

    from relfv.engine.base import Together

    n_layers = len(shuffled.hidden)
    taken = []
    for name, vectors in of.items():
        for unit in torch.nn.functional.normalize(vectors, dim=1):
            everywhere = unit.float().expand(1, n_layers, -1)
            mean = ((shuffled.hidden.double() @ unit)[:, None] * unit).float()[None]
            taken += [
                Taken(name, "all", Together(removed=everywhere)),
                Taken(name, "all_to_mean", Together(removed=everywhere, added=mean)),
            ]
            at = torch.eye(n_layers)[:, None, :, None] * everywhere
            alone = [Taken(name, str(layer), Together(removed=at[layer])) for layer in range(n_layers)]
            taken += alone if name != "random_heads" else []
    return taken


def mean_length(draws: Sequence[Sequence[HeadId]], lengths: Mapping[HeadId, float]) -> float:
    """Mean of ``lengths`` over the heads of all draws."""
    return float(np.mean([lengths[head] for heads in draws for head in heads]))
