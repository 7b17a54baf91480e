"""Intervals of the top heads' effects that include the clean mean's own error (docs/statistics.md,
``leave_query_out``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from relfv.progress import doing
from relfv.stats import ClusteredMean, clustered_mean, mean_with_left_out
from relfv.types import HeadId, Prompts

if TYPE_CHECKING:
    import torch

    from relfv.language_model import LanguageModel

_N_GROUPS = 8
"""Number of groups of queries. The queries of a group are left out together: about as good as leaving out each query by
itself, at half the cost (docs/statistics.md)."""


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

    What is measured is how far such a patch is from the one with the mean over all trials, made beside it: a small
    difference, in which what a read-out over the likeliest tokens leaves out cancels.
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
    at_once = max(1, model.arch.n_layers * model.arch.n_heads // len(means_of))  # copies of a sweep of all heads
    engine, per_pass = model.engine.over_likeliest_tokens(), trials_per_pass
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        columns = [heads[i] for i in some for _ in means_of]
        values = torch.cat([means_of @ activations[:, heads[i].layer, heads[i].head].double() for i in some]).float()
        with doing(f"how far the top heads' effects rest on single queries: heads {start + 1} to {start + len(some)}"):
            effects = engine.sweep_heads(prompts, values, columns, per_pass=per_pass)
        per_pass = effects.per_pass
        p = effects.edited.measure("p").reshape(len(prompts), len(some), len(means_of))
        without[:, some] += np.einsum("gt,thg->gh", shares, p[..., :-1] - p[..., -1:])
    return mean_with_left_out(delta_p.mean(0), without, groups), per_pass or 1


def _groups(queries: Sequence[int]) -> list[int]:
    """Each trial's group: whole queries, dealt out by their number of trials so that groups are about equally large."""
    names, counts = np.unique(np.asarray(queries), return_counts=True)
    by_size = sorted(zip(-counts, names, strict=True))
    group = {name: i % _N_GROUPS for i, (_, name) in enumerate(by_size)}
    return [group[query] for query in queries]
