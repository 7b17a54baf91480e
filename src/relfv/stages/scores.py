"""The score of every head over trials, as cie_scores.csv and aie_scores.csv have it, and the ranking by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from relfv.errors import InputError, RunError
from relfv.stats import clustered_mean, false_discovery, queries_behind_half, sign_flip_p_values
from relfv.store.folder import File
from relfv.store.formats import csv_bytes, digits, read_csv
from relfv.types import MEASURES, HeadEffects, HeadId, MeanActivations, ScoredHead

COLUMNS = [
    *(
        name
        for m in MEASURES
        for name in (f"mean_delta_{m}", f"std_delta_{m}", f"mean_abs_delta_{m}", f"mean_{m}_base", f"mean_{m}_patch")
    ),
    "clean_mean_norm",
    *(f"mean_delta_p_{name}" for name in ("se", "ci_low", "ci_high", "p_value", "fdr", "queries_behind_half")),
]
"""Columns of cie_scores.csv and aie_scores.csv, after those that say which head it is."""


def score_heads(effects: HeadEffects, means: MeanActivations, queries: Sequence[int]) -> list[ScoredHead]:
    """Per head and measure m: mean, population standard deviation and mean absolute value of delta_m over trials,
    the means of m without and with the patch, and the norm of the head's clean mean; of mean_delta_p also standard
    error, interval, p-value, false-discovery rate, and how many queries half of it comes from (stats.py). ``queries``
    (trial,) are the rows of the query words."""
    columns: dict[str, np.ndarray] = {}
    for m in MEASURES:
        delta, base = effects.effects.delta(m), effects.effects.base.measure(m)
        columns[f"mean_delta_{m}"] = delta.mean(0)
        columns[f"std_delta_{m}"] = delta.std(0)
        columns[f"mean_abs_delta_{m}"] = np.abs(delta).mean(0)
        columns[f"mean_{m}_base"] = np.full(delta.shape[1], base.mean())
        columns[f"mean_{m}_patch"] = effects.effects.edited.measure(m).mean(0)
    columns["clean_mean_norm"] = _norms(means, effects.heads)
    columns |= uncertainty(effects.effects.delta("p"), queries)
    n_trials = len(effects.effects.base.logit)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [
        ScoredHead(head, dict(zip(columns, map(float, row), strict=True)), n_trials)
        for head, row in zip(effects.heads, rows, strict=True)
    ]


def _norms(means: MeanActivations, heads: Sequence[HeadId]) -> np.ndarray:
    import torch

    norms = torch.from_numpy(means.values).double().norm(dim=-1).numpy()
    return norms[[head.layer for head in heads], [head.head for head in heads]]


def uncertainty(delta_p: np.ndarray, queries: Sequence[int]) -> dict[str, np.ndarray]:
    """Effects (trial, head) -> columns (head,) on the uncertainty of their mean over trials."""
    mean, p_value = clustered_mean(delta_p, queries), sign_flip_p_values(delta_p, queries)
    return {
        "mean_delta_p_se": mean.se,
        "mean_delta_p_ci_low": mean.low,
        "mean_delta_p_ci_high": mean.high,
        "mean_delta_p_p_value": p_value,
        "mean_delta_p_fdr": false_discovery(p_value),
        "mean_delta_p_queries_behind_half": queries_behind_half(delta_p, queries),
    }


def rank_heads(scored: Iterable[ScoredHead], score_key: str) -> list[ScoredHead]:
    """The heads ranked, best first; equal scores by layer, then head."""
    return sorted(scored, key=lambda head: (-head.scores[score_key], head.id))


def select_heads(ranked: Sequence[ScoredHead], k: int) -> list[ScoredHead]:
    """The first ``k`` of ranked heads. Raises InputError if there are fewer."""
    if not 1 <= k <= len(ranked):
        raise InputError(f"--k/--topk {k}: only {len(ranked)} heads were scored; expected 1 to {len(ranked)}")
    return list(ranked[:k])


def measure_of(score_key: str) -> str:
    """``mean_abs_delta_logit`` -> ``logit``."""
    return score_key.rpartition("_")[2]


def trial_scores(deltas: np.ndarray, score_key: str) -> np.ndarray:
    """delta of the score key's measure (trial, head) -> what the score is the mean of over trials."""
    return np.abs(deltas) if "_abs_" in score_key else deltas


# --- its two files, written by stepD_cie -----------------------------------------------------------------------------


def read_scores(path: Path) -> list[ScoredHead]:
    """Rows of cie_scores.csv or aie_scores.csv, in file order; ``n_trials`` is 0 where the file has none."""
    scored: list[ScoredHead] = []
    try:
        rows = read_csv(path)
        known = [name for name in next(iter(rows), ()) if name in COLUMNS]
        for row in rows:
            head = HeadId(int(row["layer"]), int(row["head"]))
            if min(head.layer, head.head) < 0:
                raise ValueError("a negative layer or head")
            scores = {name: float(row[name]) for name in known}
            scored.append(ScoredHead(head, scores, int(row.get("n_trials") or 0)))
    except (KeyError, TypeError, ValueError) as problem:
        raise RunError(f"{path}: line {len(scored) + 2} is not the score of a head ({problem!r})") from None
    if not scored:
        raise RunError(f"{path}: holds no heads")
    return scored


def require_score(scored: Sequence[ScoredHead], score_key: str, path: Path) -> None:
    """Raise InputError if ``score_key`` is not a column of ``path``."""
    if score_key not in scored[0].scores:
        raise InputError(f"{score_key!r} is not a column of {path}; expected one of {', '.join(scored[0].scores)}")


CIE = File("cie_scores.csv", read_scores)
AIE = File("aie_scores.csv", read_scores)
"""Scores over the q_ids of the run, here one, best first."""


def cells_of(scored: Sequence[ScoredHead]) -> dict[HeadId, list[str]]:
    """Head -> its numbers as text, as both tables have them, in the order of COLUMNS."""
    flat = digits(np.array([[head.scores[name] for name in COLUMNS] for head in scored]).ravel())
    starts = range(0, len(flat), len(COLUMNS))
    return {head.id: flat[start : start + len(COLUMNS)] for head, start in zip(scored, starts, strict=True)}


def cie_bytes(q_id: str, scored: Sequence[ScoredHead], cells: Mapping[HeadId, list[str]]) -> bytes:
    """cie_scores.csv: a row a head, in layer, head order."""
    rows = ([q_id, str(head.id.layer), str(head.id.head), str(head.n_trials), *cells[head.id]] for head in scored)
    return csv_bytes([["q_id", "layer", "head", "n_trials", *COLUMNS], *rows])


def aie_bytes(ranked: Sequence[ScoredHead], cells: Mapping[HeadId, list[str]]) -> bytes:
    """aie_scores.csv: the same heads, in the order of ``ranked``."""
    rows = ([str(head.id.layer), str(head.id.head), "1", *cells[head.id]] for head in ranked)
    return csv_bytes([["layer", "head", "n_qid", *COLUMNS], *rows])
