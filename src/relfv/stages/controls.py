"""What Step6's result is to be held against: the same vector without its own query, and vectors that carry no relation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from relfv.language_model import LanguageModel
from relfv.models.architecture import Architecture
from relfv.stages.clean_trials import CleanTrials
from relfv.types import Effects, HeadId

CONTROLS = {
    "fv": "the function vector itself, again, in the same batch as its controls",
    "held_out": "for each prompt the vector with its own query's trials left out: mean activations and ranking of heads from the "
    "other queries' trials alone (the query's pair may still be a demo in those; with ten rows it always is; the effects that "
    "heads are ranked by were measured with the overall clean mean)",
    "random_heads": "the vector of as many heads, drawn from those that were not selected; mean over draws",
    "random_heads_scaled": "the same vectors, stretched to the function vector's length; mean over draws",
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
    parts: tuple[torch.Tensor, ...]
    """The vectors in the order of ``names``, as ``Engine.inject`` takes them, float32."""

    def norms(self) -> dict[str, float]:
        """Name -> mean length of its vectors, over draws, prompts and layers."""
        means = torch.cat([part.double().norm(dim=-1).mean((0, 1)) for part in self.parts]).numpy()
        return {
            name: float(means[[other == name for other in self.names]].mean()) for name in dict.fromkeys(self.names)
        }


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

    ``trial_scores`` (trial, head) are what heads are ranked by, over ``heads``, which are sorted; ``selected`` are the
    function vector's own. ``held_out`` is left out where all trials have one query.
    """
    rng = random.Random(f"relfv-controls:{seed}")
    others = [head for head in heads if head not in set(selected)]
    draws = [rng.sample(others, min(len(selected), len(others))) for _ in range(N_DRAWS)] if others else []
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    directions = torch.randn(N_DRAWS, len(fv), generator=generator, dtype=torch.float64)
    directions *= fv.double().norm() / directions.norm(dim=1, keepdim=True)
    n_trials = len(trial_queries)
    of_others = _vectors(arch, clean.activations, np.full((len(draws), n_trials), 1 / n_trials), draws)
    stretched = fv.double().norm() * torch.nn.functional.normalize(of_others, dim=1)
    names = [
        "fv",
        *["random_heads"] * len(draws),
        *["random_heads_scaled"] * len(draws),
        *["random_direction"] * N_DRAWS,
    ]
    parts = [torch.cat([fv.double()[None], of_others, stretched, directions])[None, None]]
    if len(set(trial_queries)) > 1:
        held_out = _held_out(arch, clean.activations, trial_queries, trial_scores, heads, len(selected), prompt_queries)
        names.append("held_out")
        parts.append(held_out[None, :, None])
    names.append("mean_hidden")
    parts.append(clean.hidden[:, None, None])
    return Candidates(tuple(names), tuple(part.float() for part in parts))


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
    left_out, prompt = np.unique(np.asarray(prompt_queries), return_inverse=True)
    kept = (np.asarray(trial_queries)[None] != left_out[:, None]).astype(np.float64)
    shares = kept / kept.sum(1, keepdims=True)
    best = np.argsort(-(shares @ trial_scores), axis=1, kind="stable")[:, :k]  # of equal scores the first head
    return _vectors(arch, activations, shares, [[heads[i] for i in row] for row in best])[torch.from_numpy(prompt)]


def _vectors(
    arch: Architecture, activations: torch.Tensor, shares: np.ndarray, chosen: Sequence[Sequence[HeadId]]
) -> torch.Tensor:
    """Each set's heads, and its ``shares`` (set, trial) of the mean over ``activations`` (trial, layer, head, head_dim) ->
    float64 (set, resid_dim): sums of projected means. Each head's columns of the output projection are read once."""
    heads = sorted({head for own in chosen for head in own})
    z = activations[:, [head.layer for head in heads], [head.head for head in heads]].double()
    means = (torch.from_numpy(shares) @ z.flatten(1)).view(len(chosen), *z.shape[1:])
    total = torch.zeros(len(chosen), arch.resid_dim, dtype=torch.float64)
    for i, head in enumerate(heads):
        users = [n for n, own in enumerate(chosen) if head in own]
        total[users] += arch.project_head(head.layer, head.head, means[users, i])
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
    parts = [alpha * part for part in candidates.parts]
    return model.engine.inject(ids, target_ids, parts, range(model.arch.n_layers), per_pass=trials_per_pass)
