"""The vectors that Step6's result is held against: the same vector without its own query, and vectors that carry no
relation.

A control is one entry of ``CONTROLS``: its name, what it is, how to make its vectors, where they are added, and how the
verdict speaks of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from relfv.stages.as_written import as_written, as_written_held_out, parts_of_sets, random_heads_as_written
from relfv.types import HeadId

if TYPE_CHECKING:
    import torch

    from relfv.engine.clean import CleanRun
    from relfv.models.architecture import Architecture

N_DRAWS_OF_HEADS = 19
"""Number of draws of random heads: among 19 such vectors and itself, the function vector is the best by chance in one
case of twenty."""
N_FIRST_DRAWS = 5
"""Number of draws that are made first. No more are made of a kind of which one already does as well as the vector: then
nothing is shown, whatever the others do (Besag & Clifford 1991, sequential Monte Carlo p-values). That none does as
well is still said after all of them alone."""
N_DIRECTIONS = 5
_N_COMPARED = 4
"""Layers at which the vector and random draws are compared: a draw costs less than all layers would, and twenty vectors
that may each choose among the same few are as fair a comparison as if they chose among all."""


class Ground:
    """The data that control vectors are made from. Random numbers are drawn in a fixed order, whichever controls there
    are."""

    def __init__(
        self,
        arch: Architecture,
        clean: CleanRun,
        trial_queries: Sequence[int],
        scores: np.ndarray,
        heads: Sequence[HeadId],
        fv: np.ndarray,
        selected: Sequence[HeadId],
        prompt_queries: Sequence[int],
        *,
        seed: str,
    ) -> None:
        """``scores`` (trial, head) are what ``heads``, sorted, are ranked by; ``selected`` are the function vector's.
        Prompts and trials are known by the rows of their queries."""
        import torch

        self.arch, self.clean, self.heads, self.scores = arch, clean, heads, scores
        self.trial_queries, self.prompt_queries, self.selected = trial_queries, prompt_queries, selected
        self.fv = torch.from_numpy(fv).double()
        rng = random.Random(f"relfv-controls:{seed}")
        self.draws = matched_draws(heads, selected, rng)
        self.generator_seed = rng.getrandbits(63)

    @cached_property
    def of_draws(self) -> torch.Tensor:
        """float64 (draw, resid_dim): the vectors of heads drawn at random."""
        return self.vectors(self.all_trials(len(self.draws)), self.draws)

    @cached_property
    def held_out(self) -> tuple[np.ndarray, list[list[HeadId]], np.ndarray] | None:
        """Data with each query's own trials left out: shares (query, trial) of the mean over trials, the query's
        selected heads, and the query of each prompt (prompt,). None where all trials have one query."""
        if len(set(self.trial_queries)) < 2:
            return None
        left_out, prompt = np.unique(np.asarray(self.prompt_queries), return_inverse=True)
        kept = (np.asarray(self.trial_queries)[None] != left_out[:, None]).astype(np.float64)
        shares = kept / kept.sum(1, keepdims=True)
        order = np.argsort(-(shares @ self.scores), axis=1, kind="stable")  # the first head if scores are equal
        return shares, [[self.heads[i] for i in row[: len(self.selected)]] for row in order], prompt

    def all_trials(self, n_sets: int) -> np.ndarray:
        """Equal shares (set, trial) of all trials."""
        return np.full((n_sets, len(self.trial_queries)), 1 / len(self.trial_queries))

    def vectors(self, shares: np.ndarray, chosen: Sequence[Sequence[HeadId]], *, written: bool = False) -> torch.Tensor:
        """float64 (set, resid_dim): ``parts_of_sets`` summed over layers."""
        return parts_of_sets(self, shares, chosen, written=written).sum(0)


def matched_draws(heads: Sequence[HeadId], selected: Sequence[HeadId], rng: random.Random) -> list[list[HeadId]]:
    """Sets with as many heads of each layer as ``selected`` has, drawn from all ``heads``: if being selected means
    nothing, the selection is one such set. Empty where there is no other such set."""
    counts = Counter(head.layer for head in selected)
    of_layer = {layer: [head for head in heads if head.layer == layer] for layer in sorted(counts)}
    if all(len(pool) == counts[layer] for layer, pool in of_layer.items()):
        return []
    return [
        [head for layer, pool in of_layer.items() for head in rng.sample(pool, counts[layer])]
        for _ in range(N_DRAWS_OF_HEADS)
    ]


@dataclass(frozen=True)
class Control:
    """One kind of control vector."""

    meaning: str
    vectors: Callable[[Ground], torch.Tensor | None]
    """float64 (layer or 1, prompt or 1, draw, resid_dim): what is added, before alpha; None where there is none."""
    in_verdict: str = ""
    """Name of the control in the verdict; empty if it is not named there."""
    rival: bool = False
    """Whether the vector carries no relation, so that a vector which does no better has shown nothing."""
    at_all_layers: bool = False
    """Whether the vector is added after every layer, because one is chosen for it; else after ``compared_layers`` and
    the vector's best."""
    brief: bool = False
    """Whether a number is of little weight, as each of many draws is; it is then read out over fewer tokens where that
    is cheaper."""
    rival_of: str = ""
    """Name of another control, if this one is added only where that one does best of the ``compared_layers``."""


def _random_heads(ground: Ground) -> torch.Tensor | None:
    return ground.of_draws[None, None] if ground.draws else None


def _random_heads_scaled(ground: Ground) -> torch.Tensor | None:
    import torch

    if not ground.draws:
        return None
    return (ground.fv.norm() * torch.nn.functional.normalize(ground.of_draws, dim=1))[None, None]


def _random_direction(ground: Ground) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(ground.generator_seed)
    directions = torch.randn(N_DIRECTIONS, len(ground.fv), generator=generator, dtype=torch.float64)
    directions *= ground.fv.norm() / directions.norm(dim=1, keepdim=True)
    return directions[None, None]


def _held_out(ground: Ground) -> torch.Tensor | None:
    """float64 (1, prompt, 1, resid_dim): for each prompt the vector of the trials with other queries; None where all
    trials have one query."""
    if ground.held_out is None:
        return None
    shares, chosen, prompt = ground.held_out
    return ground.vectors(shares, chosen)[prompt][None, :, None]


CONTROLS = {
    "random_heads": Control(
        "the vector of heads drawn at random from all heads of each layer, the selected ones included, as many as were "
        "selected there; mean over draws",
        _random_heads,
        "random heads of the same layers",
        rival=True,
        brief=True,
    ),
    "random_heads_scaled": Control(
        "the same vectors, stretched to the function vector's length; mean over draws",
        _random_heads_scaled,
        "the same stretched to its length",
        rival=True,
        brief=True,
    ),
    "random_direction": Control(
        "the function vector's length in a random direction; mean over draws",
        _random_direction,
        "random directions of its length",
        rival=True,
        brief=True,
    ),
    "held_out": Control(
        "for each prompt the vector with its own query's trials left out: mean activations and ranking of heads from "
        "the other queries' trials alone (the query's pair may still be a demo in those; with ten rows it always is; "
        "the effects that heads are ranked by were measured with the overall clean mean)",
        _held_out,
        at_all_layers=True,
    ),
    "mean_hidden": Control(
        "the mean hidden state of the clean prompts after the layer that it is added to: a vector of the task and "
        "of everything else (the layer average of Todd et al. 2024)",
        lambda ground: ground.clean.hidden[:, None, None],
        "the mean hidden state",
        brief=True,
    ),
    "as_written": Control(
        "the vector of what the selected heads really add to the residual stream, where the family norms or scales it "
        "on the way; elsewhere that is fv",
        as_written,
    ),
    "as_written_held_out": Control("the same, held out like held_out", as_written_held_out),
    "random_heads_as_written": Control(
        "the vector as written of heads drawn like random_heads; mean over draws",
        random_heads_as_written,
        brief=True,
        rival_of="as_written",
    ),
}
"""Name -> control."""


def compared_layers(n_layers: int) -> list[int]:
    """The layers, evenly spread and the same for every q_id, at which a vector is held against random draws."""
    return sorted({int((i + 0.5) * n_layers / _N_COMPARED) for i in range(_N_COMPARED)})


@dataclass(frozen=True)
class Candidates:
    """Vectors to inject, by name."""

    names: tuple[str, ...]
    """Name of each vector; several draws share one name."""
    parts: tuple[torch.Tensor, ...]
    """The vectors in the order of ``names``, as ``Engine.inject`` takes them, float32."""

    @classmethod
    def by_name(cls, parts: Mapping[str, torch.Tensor]) -> Candidates:
        """The candidates of ``parts`` (name -> vectors), without names that have no vectors."""
        some = {name: part for name, part in parts.items() if part.shape[2]}
        return cls(tuple(name for name, part in some.items() for _ in range(part.shape[2])), tuple(some.values()))

    def norms(self) -> dict[str, float]:
        """Name -> mean length of its vectors, over draws, prompts and layers."""
        lengths = [part.double().norm(dim=-1).mean((0, 1)).numpy() for part in self.parts]
        by_vector = np.concatenate([np.empty(0), *lengths])
        return {
            name: float(by_vector[[other == name for other in self.names]].mean()) for name in dict.fromkeys(self.names)
        }

    def draws(self, which: slice) -> Candidates:
        """The candidates with some of the draws of each name alone."""
        return Candidates.by_name({name: part[:, :, which] for name, part in self._by_name().items()})

    def of_names(self, names: Collection[str]) -> Candidates:
        """The candidates of these names alone."""
        return Candidates.by_name({name: part for name, part in self._by_name().items() if name in names})

    def _by_name(self) -> dict[str, torch.Tensor]:
        return dict(zip(dict.fromkeys(self.names), self.parts, strict=True))

    def at(self, layers: Sequence[int]) -> list[torch.Tensor]:
        """The parts for some of the model's layers alone."""
        return [part[list(layers)] if len(part) > 1 else part for part in self.parts]


def candidate_vectors(ground: Ground, of: Iterable[str] = CONTROLS) -> Candidates:
    """The vectors of the controls named in ``of``, without those that cannot be made on this ground."""
    made = {name: CONTROLS[name].vectors(ground) for name in of}
    return Candidates.by_name({name: vectors.float() for name, vectors in made.items() if vectors is not None})
