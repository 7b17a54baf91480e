"""What Step6's result is to be held against: the same vector without its own query, and vectors that carry no relation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from relfv.engine.language_model import LanguageModel
from relfv.models.families import Architecture
from relfv.stages.clean_trials import CleanTrials
from relfv.types import Effects, HeadId

CONTROLS = {
    "fv": "the function vector itself, again, in the same batch as its controls",
    "held_out": "for each prompt the vector in which its own query's trials had no part: mean activations and heads from the "
    "other queries' trials alone (the query's pair may still be a demo in those; with ten rows it always is)",
    "random_heads": "the vector of as many heads, drawn from those that were not selected; mean over draws",
    "random_direction": "the function vector's length in a random direction; mean over draws",
    "mean_hidden": "the mean hidden state of the clean prompts after the layer that it is added to: a vector of the task and "
    "of everything else (the layer average of Todd et al. 2024)",
}
"""Name -> what it is."""

N_DRAWS = 5
"""Of random heads, and of random directions."""


@dataclass(frozen=True)
class Candidates:
    """Vectors to inject, by name."""

    names: tuple[str, ...]
    """One for each vector; several draws share one."""
    vectors: torch.Tensor
    """float32 (layer, prompt, vector, resid_dim)."""


def candidate_vectors(
    arch: Architecture,
    clean: CleanTrials,
    trial_queries: Sequence[int],
    trial_scores: np.ndarray,
    heads: Sequence[HeadId],
    fv: torch.Tensor,
    selected: Sequence[HeadId],
    prompt_queries: Sequence[int],
    *,
    seed: str,
) -> Candidates:
    """All controls for prompts whose queries are the rows ``prompt_queries``.

    ``trial_scores`` (trial, head) are what heads are ranked by, over ``heads``; ``selected`` are the function vector's
    own. ``held_out`` is left out where all trials have one query.
    """
    rng = random.Random(f"relfv-controls:{seed}")
    means = clean.activations.double().mean(0)
    others = [head for head in heads if head not in set(selected)]
    draws = [rng.sample(others, min(len(selected), len(others))) for _ in range(N_DRAWS)] if others else []
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    directions = torch.randn(N_DRAWS, len(fv), generator=generator, dtype=torch.float64)
    directions *= fv.double().norm() / directions.norm(dim=1, keepdim=True)
    everywhere = [
        ("fv", fv.double()),
        *(("random_heads", _vector(arch, means[None], [draw])[0]) for draw in draws),
        *(("random_direction", direction) for direction in directions),
    ]
    n_prompts, shape = len(prompt_queries), (arch.n_layers, len(prompt_queries), -1, -1)
    names = [name for name, _ in everywhere]
    parts = [torch.stack([vector for _, vector in everywhere])[None, None].expand(*shape)]
    if len(set(trial_queries)) > 1:
        held_out = _held_out(arch, clean.activations, trial_queries, trial_scores, heads, len(selected), prompt_queries)
        names.append("held_out")
        parts.append(held_out[None, :, None].expand(*shape))
    names.append("mean_hidden")
    parts.append(clean.hidden.double()[:, None, None].expand(-1, n_prompts, -1, -1))
    return Candidates(tuple(names), torch.cat(parts, dim=2).float())


def _held_out(
    arch: Architecture,
    activations: torch.Tensor,
    trial_queries: Sequence[int],
    trial_scores: np.ndarray,
    heads: Sequence[HeadId],
    k: int,
    prompt_queries: Sequence[int],
) -> torch.Tensor:
    """float64 (prompt, resid_dim): for each prompt the vector of the trials with other queries."""
    queries = np.asarray(trial_queries)
    left_out = sorted(set(prompt_queries))
    means, chosen = [], []
    for query in left_out:
        kept = np.flatnonzero(queries != query)
        means.append(activations[torch.from_numpy(kept)].double().mean(0))
        scores = trial_scores[kept].mean(0)
        order = sorted(range(len(heads)), key=lambda i: (-scores[i], heads[i]))
        chosen.append([heads[i] for i in order[:k]])
    vectors = _vector(arch, torch.stack(means), chosen)
    return vectors[[left_out.index(query) for query in prompt_queries]]


def _vector(arch: Architecture, means: torch.Tensor, chosen: Sequence[Sequence[HeadId]]) -> torch.Tensor:
    """``means`` (set, layer, head, head_dim) and each set's heads -> float64 (set, resid_dim): sums of projected means.

    Each head's columns of the output projection are read once for all sets.
    """
    total = torch.zeros(len(means), arch.resid_dim, dtype=torch.float64)
    for head in sorted({head for heads in chosen for head in heads}):
        users = [i for i, heads in enumerate(chosen) if head in heads]
        total[users] += arch.project_head(head.layer, head.head, means[users, head.layer, head.head])
    return total


def inject_candidates(
    model: LanguageModel,
    prompts: Sequence[str],
    target_ids: Sequence[int],
    candidates: Candidates,
    alpha: float,
    *,
    trials_per_pass: int | None = None,
) -> Effects:
    """Every candidate, times ``alpha``, after every block: ``edited`` fields are (prompt, layer * n_vectors)."""
    ids = [model.tokens.encode(prompt) for prompt in prompts]
    layers = range(model.arch.n_layers)
    return model.engine.inject(ids, target_ids, alpha * candidates.vectors, layers, per_pass=trials_per_pass)
