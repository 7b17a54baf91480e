"""Causal indirect effect of every head (Todd et al. 2024, eq. 3), and its mean over trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from relfv.errors import InputError
from relfv.language_model import LanguageModel
from relfv.stats import ClusteredMean, clustered_mean, false_discovery, mean_with_left_out
from relfv.types import MEASURES, HeadEffects, HeadId, MeanActivations, Prompts, ScoredHead


def head_effects(
    model: LanguageModel,
    corrupted_prompts: Sequence[str],
    target_ids: Sequence[int],
    means: MeanActivations,
    heads: Sequence[HeadId],
    *,
    trials_per_pass: int | None = None,
) -> HeadEffects:
    """On each corrupted prompt set each head, one at a time, to its clean mean and score the target.

    ``trials_per_pass`` None: as many as the engine finds room for. Raises InputError if ``means`` is of another shape than the model's heads.
    """
    arch = model.arch
    shape = (arch.n_layers, arch.n_heads, arch.head_dim)
    if tuple(means.values.shape) != shape:
        raise InputError(f"clean means of shape {tuple(means.values.shape)} do not fit {model.name}, which has {shape}")
    ids = [model.tokens.encode(prompt) for prompt in corrupted_prompts]
    ordered = tuple(sorted(heads))
    found = model.engine.sweep_heads(Prompts(ids, target_ids), means.values, ordered, per_pass=trials_per_pass)
    return HeadEffects(ordered, found)


def score_heads(effects: HeadEffects, means: MeanActivations, queries: Sequence[int]) -> list[ScoredHead]:
    """Per head and measure m: mean, population standard deviation and mean absolute value of delta_m over trials,
    the means of m without and with the patch, and the norm of the head's clean mean; of mean_delta_p also standard
    error, interval, p-value and false-discovery rate (stats.py). ``queries`` (trial,) are the rows of the query words."""
    base, patched = effects.effects.base.measures(), effects.effects.edited.measures()
    columns: dict[str, np.ndarray] = {}
    for m in MEASURES:
        delta = patched[m] - base[m][:, None]
        columns[f"mean_delta_{m}"] = delta.mean(0)
        columns[f"std_delta_{m}"] = delta.std(0)
        columns[f"mean_abs_delta_{m}"] = np.abs(delta).mean(0)
        columns[f"mean_{m}_base"] = np.full(delta.shape[1], base[m].mean())
        columns[f"mean_{m}_patch"] = patched[m].mean(0)
    norms = means.values.double().norm(dim=-1)
    columns["clean_mean_norm"] = np.array([float(norms[head.layer, head.head]) for head in effects.heads])
    columns |= _uncertainty(patched["p"] - base["p"][:, None], queries)
    n_trials = len(base["p"])
    return [
        ScoredHead(head, {name: float(values[i]) for name, values in columns.items()}, n_trials)
        for i, head in enumerate(effects.heads)
    ]


def _uncertainty(delta_p: np.ndarray, queries: Sequence[int]) -> dict[str, np.ndarray]:
    """(trial, head) -> columns (head,)."""
    found = clustered_mean(delta_p, queries)
    return {
        "mean_delta_p_se": found.se,
        "mean_delta_p_ci_low": found.low,
        "mean_delta_p_ci_high": found.high,
        "mean_delta_p_p_value": found.p_value,
        "mean_delta_p_fdr": false_discovery(found.p_value),
    }


def with_error_of_means(
    model: LanguageModel,
    corrupted_prompts: Sequence[str],
    target_ids: Sequence[int],
    activations: torch.Tensor,
    heads: Sequence[HeadId],
    mean_delta_p: Sequence[float],
    queries: Sequence[int],
    *,
    trials_per_pass: int | None = None,
) -> tuple[ClusteredMean, int]:
    """Intervals of the ``heads``' ``mean_delta_p`` that know of the clean means' own error, and the trials a pass.

    A clean mean over 25 trials is an estimate that all trials share; what it adds to the error cannot be seen in their
    differences. So the trials of some queries are left out of both, the clean mean and the mean over trials, in
    ``_N_GROUPS`` groups (the delete-a-group jackknife): another patch of each head for each group, ``activations``
    (trial, layer, head, head_dim) being the clean ones. With one query nothing is known of the error.
    """
    mean, groups = np.asarray(mean_delta_p), _groups(queries)
    n_groups = len(set(groups))
    if n_groups < 2:
        return clustered_mean(np.broadcast_to(mean, (len(queries), len(heads))), queries), 1
    kept = np.asarray(groups)[None] != np.unique(groups)[:, None]
    shares = torch.from_numpy(kept / kept.sum(1, keepdims=True))
    ids = [model.tokens.encode(prompt) for prompt in corrupted_prompts]
    without = np.empty((n_groups, len(heads)))
    order = sorted(range(len(heads)), key=lambda i: heads[i])
    at_once = max(1, model.arch.n_layers * model.arch.n_heads // n_groups)  # no more copies than a sweep of all heads
    per_pass = trials_per_pass
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        columns = [heads[i] for i in some for _ in range(n_groups)]
        values = torch.cat([shares @ activations[:, heads[i].layer, heads[i].head].double() for i in some]).float()
        found = model.engine.sweep_heads(Prompts(ids, target_ids), values, columns, per_pass=per_pass)
        per_pass = found.per_pass
        delta = found.edited.measures()["p"] - found.base.measures()["p"][:, None]
        by_group = delta.reshape(len(ids), len(some), n_groups)
        without[:, some] = np.einsum("gt,thg->gh", shares.numpy(), by_group)
    return mean_with_left_out(mean, without, groups), per_pass or 1


_N_GROUPS = 8
"""Of queries that are left out together: about as good as each query by itself, at half the cost (docs/statistics.md)."""


def _groups(queries: Sequence[int]) -> list[int]:
    """Each trial's group: whole queries, dealt out by their number of trials so that groups are about equally large."""
    names, counts = np.unique(np.asarray(queries), return_counts=True)
    by_size = sorted(zip(-counts, names, strict=True))
    group = {name: i % _N_GROUPS for i, (_, name) in enumerate(by_size)}
    return [group[query] for query in queries]


def trial_scores(deltas: np.ndarray, score_key: str) -> np.ndarray:
    """delta of the score key's measure (trial, head) -> what the score is the mean of over trials."""
    return np.abs(deltas) if "_abs_" in score_key else deltas


def measure_of(score_key: str) -> str:
    """``mean_abs_delta_logit`` -> ``logit``."""
    return score_key.rpartition("_")[2]


def rank_heads(scored: Sequence[ScoredHead], score_key: str) -> list[ScoredHead]:
    """Best first; equal scores by layer, then head."""
    return sorted(scored, key=lambda head: (-head.scores[score_key], head.id))
