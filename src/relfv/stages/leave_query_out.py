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

    from relfv.language_model import LanguageModel

_N_GROUPS = 8
"""Of queries that are left out together: about as good as each query by itself, at half the cost
(docs/statistics.md)."""


def with_error_of_means(
    model: LanguageModel,
    prompts: Prompts,
    activations: torch.Tensor,
    heads: Sequence[HeadId],
    mean_delta_p: Sequence[float],
    *,
    trials_per_pass: int | None = None,
) -> tuple[ClusteredMean, int]:
    """Intervals of the ``heads``' ``mean_delta_p`` on the corrupted ``prompts``, and the trials a pass.

    A clean mean over 25 trials is an estimate that all trials share; what it adds to the error cannot be seen in their
    differences. So the trials of some queries are left out of both, the clean mean and the mean over trials, in
    ``_N_GROUPS`` groups (the delete-a-group jackknife): another patch of each head for each group, ``activations``
    (trial, layer, head, head_dim) being the clean ones. With one query nothing is known of the error.
    """
    import torch

    mean, groups = np.asarray(mean_delta_p), _groups(prompts.clusters)
    n_groups = len(set(groups))
    if n_groups < 2:
        return clustered_mean(np.broadcast_to(mean, (len(prompts), len(heads))), prompts.clusters), 1
    kept = np.asarray(groups)[None] != np.unique(groups)[:, None]
    shares = torch.from_numpy(kept / kept.sum(1, keepdims=True))
    without = np.empty((n_groups, len(heads)))
    order = sorted(range(len(heads)), key=lambda i: heads[i])
    at_once = max(1, model.arch.n_layers * model.arch.n_heads // n_groups)  # no more copies than a sweep of all heads
    per_pass = trials_per_pass
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        columns = [heads[i] for i in some for _ in range(n_groups)]
        values = torch.cat([shares @ activations[:, heads[i].layer, heads[i].head].double() for i in some]).float()
        effects = model.engine.sweep_heads(prompts, values, columns, per_pass=per_pass)
        per_pass = effects.per_pass
        by_group = effects.delta("p").reshape(len(prompts), len(some), n_groups)
        without[:, some] = np.einsum("gt,thg->gh", shares.numpy(), by_group)
    return mean_with_left_out(mean, without, groups), per_pass or 1


def _groups(queries: Sequence[int]) -> list[int]:
    """Each trial's group: whole queries, dealt out by their number of trials so that groups are about equally large."""
    names, counts = np.unique(np.asarray(queries), return_counts=True)
    by_size = sorted(zip(-counts, names, strict=True))
    group = {name: i % _N_GROUPS for i, (_, name) in enumerate(by_size)}
    return [group[query] for query in queries]
