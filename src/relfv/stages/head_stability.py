"""Stability of the list of top heads under resampling of the queries (stats.py), and its file, which is one of
StepE's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relfv.settings import Settings
from relfv.stages.cie import TrialDeltas
from relfv.stages.scores import measure_of, trial_scores
from relfv.stats import Stability, top_k_stability
from relfv.store.folder import File
from relfv.store.formats import finite, read_json
from relfv.types import HeadId

HEAD_STABILITY = File("head_stability.json", read_json)


def head_stability(
    deltas: TrialDeltas, queries: Sequence[int], settings: Settings, q_id: str
) -> tuple[Stability, dict[HeadId, float]]:
    """The stability of the top k under ``settings``, and its ``in_top_k`` by head."""
    scores = trial_scores(deltas.of[measure_of(settings.score_key)], settings.score_key)
    stability = top_k_stability(scores, queries, settings.topk, seed=f"{settings.seed}:{q_id}")
    return stability, dict(zip(deltas.heads, stability.in_top_k.tolist(), strict=True))


def stability_document(
    stability: Stability, shares: Mapping[HeadId, float], settings: Settings, q_id: str
) -> dict[str, Any]:
    """The content of head_stability.json; heads that are never among the k best are left out."""
    often = sorted((head for head in shares if shares[head] > 0), key=lambda head: (-shares[head], head))
    return {
        "q_id": q_id,
        "meaning": "in_top_k: in what share of bootstrap samples of the queries the head is among the k best. "
        "half_overlap: what share of the k best two halves of the queries have in common, on average: both halves' "
        "effects were measured with the clean mean of all trials, which pulls the lists together, and half the queries "
        "make a noisier list than all, which pulls them apart; chance_overlap is that of two lists drawn at random.",
        "k": settings.topk,
        "score_key": settings.score_key,
        "n_bootstrap": stability.n_bootstrap,
        "n_halvings": stability.n_halvings,
        "half_overlap": finite(stability.half_overlap),
        "chance_overlap": stability.chance_overlap,
        "heads": [{"layer": head.layer, "head": head.head, "in_top_k": shares[head]} for head in often],
    }
