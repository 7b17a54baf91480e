"""Intervals of the top heads' effects that know of the clean mean's own error (docs/statistics.md,
``leave_query_out``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from relfv.stats import ClusteredMean, clustered_mean, mean_with_left_out
from relfv.types import HeadId, Prompts

if TYPE_CHECKING:
    import torch

    from relfv.engine.base import Engine
    from relfv.language_model import LanguageModel

_N_GROUPS = 8
"""Of queries that are left out together: about as good as each query by itself, at half the cost
(docs/statistics.md)."""


def with_error_of_means(
    model: LanguageModel,
    prompts: Prompts,
    activations: torch.Tensor,
    heads: Sequence[HeadId],
    delta_p: np.ndarray,
    *,
    trials_per_pass: int | None = None,
) -> tuple[ClusteredMean, int]:
    """Intervals of the mean ``delta_p`` (trial, head) of ``heads`` on the corrupted ``prompts``, and the trials a pass.

    A clean mean over 25 trials is an estimate that all trials share; what it adds to the error cannot be seen in their
    differences. So the trials of some queries are left out of both, the clean mean and the mean over trials, in
    ``_N_GROUPS`` groups (the delete-a-group jackknife): another patch of each head for each group, ``activations``
    (trial, layer, head, head_dim) being the clean ones. With one query nothing is known of the error.

    What is measured is how far such a patch is from the one with the mean over all trials: a small difference, in which
    what a read-out over the likeliest tokens leaves out cancels.
    """
    import torch

    groups = _groups(prompts.clusters)
    n_groups = len(set(groups))
    if n_groups < 2:
        return clustered_mean(delta_p, prompts.clusters), 1
    kept = np.asarray(groups)[None] != np.unique(groups)[:, None]
    shares = kept / kept.sum(1, keepdims=True)
    means_of = torch.from_numpy(np.vstack([shares, np.full((1, len(prompts)), 1 / len(prompts))]))
    without = shares @ delta_p
    order = sorted(range(len(heads)), key=lambda i: heads[i])
    values = torch.stack([means_of @ activations[:, heads[i].layer, heads[i].head].double() for i in order])
    moved, per_pass = _moved(model.engine, prompts, values, [heads[i] for i in order], trials_per_pass)
    without[:, order] += np.einsum("gt,thg->gh", shares, moved)
    return mean_with_left_out(delta_p.mean(0), without, groups), per_pass


def _moved(
    engine: Engine, prompts: Prompts, values: torch.Tensor, heads: Sequence[HeadId], trials_per_pass: int | None
) -> tuple[np.ndarray, int]:
    """How much another patch changes P: (trial, head, group), of each of ``values`` (head, group + 1, head_dim) against
    the last. By the patches themselves, made beside it, or where it is cheaper to first order (the infinitesimal
    jackknife's way, Jaeckel 1972): means over all trials but an eighth differ little."""
    import torch

    from relfv.engine.slopes import patch_slopes

    found = patch_slopes(engine, prompts, values[:, -1].float(), heads, per_pass=trials_per_pass)
    if found:
        slopes, trials_per_pass = found
        return torch.einsum("thd,hgd->thg", slopes, values[:, :-1] - values[:, -1:]).numpy(), trials_per_pass
    n_values, arch = values.shape[1], engine.backbone.arch
    at_once = max(1, arch.n_layers * arch.n_heads // n_values)  # copies of a sweep of all heads
    brief, moved = engine.over_likeliest_tokens(), []
    for start in range(0, len(heads), at_once):
        some = slice(start, start + at_once)
        columns = [head for head in heads[some] for _ in range(n_values)]
        effects = brief.sweep_heads(prompts, values[some].flatten(0, 1).float(), columns, per_pass=trials_per_pass)
        trials_per_pass = effects.per_pass
        p = effects.edited.measure("p").reshape(len(prompts), -1, n_values)
        moved.append(p[..., :-1] - p[..., -1:])
    return np.concatenate(moved, axis=1), trials_per_pass or 1


def _groups(queries: Sequence[int]) -> list[int]:
    """Each trial's group: whole queries, dealt out by their number of trials so that groups are about equally large."""
    names, counts = np.unique(np.asarray(queries), return_counts=True)
    by_size = sorted(zip(-counts, names, strict=True))
    group = {name: i % _N_GROUPS for i, (_, name) in enumerate(by_size)}
    return [group[query] for query in queries]
