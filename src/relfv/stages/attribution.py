"""Attribution patching (engine/gradients.py) of every head, on request, beside the exact effects of StepD on the same
prompts: a yardstick for approximations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import InputError
from relfv.settings import MODEL_SETTINGS
from relfv.stages.cie import METRICS, corrupted_prompts
from relfv.stages.means import MEANS
from relfv.stages.scores import measure_of, trial_scores
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.stats import top_k_is_decided
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

BINS = (0.001, 0.01, 0.1)
"""Limits of the bins that exact effects are sorted into by size, in the score key's measure."""
MEANING = {
    "first_order": "(clean mean - z) . gradient of the score key's measure with respect to z, at the last token of the "
    "corrupted prompt (attribution patching)",
    "graddrop": "mean size of that with the gradient kept from one block at a time (AtP*); it has no sign, and is held "
    "against the size of the exact effect",
    "left_out": "AtP*'s QK fix: it corrects patches of queries and keys, whose effect goes through their own head's "
    "softmax; a head's output comes after it",
    "spearman": "rank correlation with the exact score over heads",
    "recall": "share of the exact top k among the estimate's top k; by chance k / heads; null where equal scores leave "
    "either open",
    "by_size": "trials and heads parted by the size of the exact effect: how many there are, the median of estimate / "
    "exact (below 1: the estimate saturates), and how often their signs differ",
    "within_heads": "correlation of estimate and exact effect over trials, the median over the exact top k: what a "
    "control variate could gain is 1 - its square",
}


def judge_estimates(
    exact: np.ndarray, first: np.ndarray, dropped: np.ndarray, score_key: str, k: int
) -> dict[str, Any]:
    """Exact and estimated effects (trial, head) -> how good the estimates are. None where there is no telling."""
    score = trial_scores(exact, score_key).mean(0)
    found = {
        "first_order": _agreement(score, trial_scores(first, score_key).mean(0), k),
        "graddrop": _agreement(np.abs(score), dropped.mean(0), k),
    }
    sizes = np.digitize(np.abs(exact), BINS)
    by_size = []
    for i in range(len(BINS) + 1):
        there = sizes == i
        ratio = first[there] / np.where(exact[there] == 0, np.nan, exact[there])
        by_size.append(
            {
                "from": (0.0, *BINS)[i],
                "n": int(there.sum()),
                "median_ratio": finite(np.nanmedian(ratio)) if np.isfinite(ratio).any() else None,
                "signs_differ": float((ratio < 0).mean()) if there.any() else None,
            }
        )
    within = [correlation(exact[:, head], first[:, head]) for head in np.argsort(-score, kind="stable")[:k]]
    known = [value for value in within if value is not None]
    return {**found, "by_size": by_size, "within_heads": float(np.median(known)) if known else None}


def _agreement(exact: np.ndarray, estimate: np.ndarray, k: int) -> dict[str, Any]:
    from scipy import stats

    both = (exact, estimate)
    top, of_estimate = (set(np.argsort(-scores, kind="stable")[:k].tolist()) for scores in both)
    decided = all(top_k_is_decided(scores, k) for scores in both)
    return {
        "spearman": correlation(stats.rankdata(exact), stats.rankdata(estimate)),
        "recall": len(top & of_estimate) / len(top) if decided else None,
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's correlation; None where ``one`` or ``other`` does not vary."""
    a, b = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else None


def require_gradients(model: LanguageModel) -> None:
    """Raise InputError for a model whose weights gradients cannot pass through."""
    why = (
        f"--quant {model.quant}" if model.quant != "none" else "weights that stream" if model.backbone.streaming else ""
    )
    if why or any(not p.is_floating_point() for p in model.backbone.model.parameters()):
        raise InputError(
            f"--extras attribution: {model.name} has {why or 'packed weights'}, and a backward pass needs all weights "
            "on the device as floating-point numbers; leave attribution out, or open it unquantised where it fits"
        )


# --- files ---------------------------------------------------------------------------------------------------------

ATTRIBUTION = File("attribution.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _estimate(work: Work) -> str:
    import torch

    from relfv.engine.gradients import attribute

    model, settings, prompts, deltas = work.model, work.settings, work.once(corrupted_prompts), work.read(METRICS)
    require_gradients(model)
    measure = measure_of(settings.score_key)
    means = torch.from_numpy(work.read(MEANS).values)
    found = work.repeatable(STAGE.name, attribute, model.backbone, prompts, means, measure)
    layers, heads = ([getattr(head, of) for head in deltas.heads] for of in ("layer", "head"))
    first, dropped = (values[:, layers, heads].numpy() for values in (found.first_order, found.dropped))
    exact, k = deltas.of[measure], min(settings.topk, len(deltas.heads))
    judged = judge_estimates(exact, first, dropped, settings.score_key, k)
    scores = [trial_scores(values, settings.score_key).mean(0).tolist() for values in (exact, first, dropped)]
    document = {
        "q_id": work.q_id,
        "meaning": MEANING,
        "score_key": settings.score_key,
        "k": k,
        "n_trials": len(prompts),
        "n_heads": len(deltas.heads),
        "n_passes": {"forward": len(prompts), "backward": len(prompts) * (1 + model.arch.n_layers)},
        "precision": "float32",
        **judged,
        "heads": [
            {"layer": head.layer, "head": head.head, "exact": exact, "first_order": estimate, "graddrop": size}
            for head, exact, estimate, size in zip(deltas.heads, *scores, strict=True)
        ],
    }
    work.write(ATTRIBUTION, json_bytes(document), content=document)
    words = [
        (
            f"{name}: equal scores leave the top {k} open"
            if of["recall"] is None
            else f"{name} finds {of['recall']:.0%} of the top {k}"
        )
        + ", rank correlation "
        + ("unknown" if of["spearman"] is None else f"{of['spearman']:.2f}")
        for name, of in ((name, judged[name]) for name in ("first_order", "graddrop"))
    ]
    return "; ".join(words)


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    there = [(head["layer"], head["head"]) for head in folder.read(ATTRIBUTION)["heads"]]
    same = there == [(head.layer, head.head) for head in folder.read(METRICS).heads]
    yield Check(folder.path(ATTRIBUTION), "the heads of trial_metrics.jsonl", same)


STAGE = Stage(
    "attribution",
    "Attribution patching and AtP* of every head beside the exact effects (--extras attribution).",
    _estimate,
    reads=(TRIALS, MEANS, METRICS),
    writes=(ATTRIBUTION,),
    settings=(*MODEL_SETTINGS, "score_key", "topk"),
    agrees=_agrees,
    asked=lambda settings: "attribution" in settings.studies,
)
