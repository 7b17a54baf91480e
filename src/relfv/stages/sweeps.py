"""Other strengths and other numbers of heads than the spec's, on request: how much hangs on ``alpha`` and ``k``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.settings import MODEL_SETTINGS
from relfv.stages.function_vector import build_function_vector
from relfv.stages.injection import length
from relfv.stages.judging import judge_vectors
from relfv.stages.means import MEANS
from relfv.stages.scores import CIE, rank_heads, select_heads
from relfv.stages.stage import Finding, Stage, Work
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated_prompts
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import MeanActivations, ScoredHead

if TYPE_CHECKING:
    from relfv.models.architecture import Architecture

CAUTION = (
    "The best of several alphas, k and layers on the same prompts is better than it would be on new ones; a choice "
    "made here has to be tested on other prompts."
)


def sweep_vectors(
    arch: Architecture,
    means: MeanActivations,
    ranked: Sequence[ScoredHead],
    *,
    topk: int,
    alpha: float,
    alphas: Sequence[float],
    ks: Sequence[int],
) -> np.ndarray:
    """float32 (alphas then ks, resid_dim), ready to be added: the ``topk`` heads' vector at each of ``alphas``, then
    the vector of each of ``ks`` best heads at ``alpha``. Raises InputError for a k of more heads than were scored."""
    of_k = {k: build_function_vector(arch, means, [h.id for h in select_heads(ranked, k)]).total for k in {topk, *ks}}
    return np.stack([*(np.float32(a) * of_k[topk] for a in alphas), *(np.float32(alpha) * of_k[k] for k in ks)])


def tabulate(
    per_layer: Mapping[str, Mapping[str, Any]], names: Sequence[str], values: Sequence[float], vectors: np.ndarray
) -> list[dict[str, Any]]:
    """One entry for each of ``values``: its vector's length as added, its best layer by P, and its numbers at every
    layer.

    ``per_layer`` are the numbers by layer and name; ``names`` and ``vectors`` (value, resid_dim) go with ``values``.
    """
    entries = []
    for name, value, vector in zip(names, values, vectors, strict=True):
        at = {layer: numbers[name] for layer, numbers in per_layer.items()}
        best = max(at, key=lambda layer: at[layer]["mean_p"] or 0.0)  # None: the vector overflows
        entries.append(
            {
                "value": value,
                "norm_added": length(vector),
                "best_layer": int(best),
                **{key: at[best][key] for key in ("acc", "mean_p")},
                "per_layer": at,
            }
        )
    return entries


# --- files ---------------------------------------------------------------------------------------------------------

SWEEPS_FILE = File("step6/sweeps.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _sweep(work: Work) -> str:
    model, settings, prompts = work.model, work.settings, work.once(evaluated_prompts)
    alphas, ks = settings.alpha_sweep, settings.k_sweep
    ranked = rank_heads(work.read(CIE), settings.score_key)
    vectors = sweep_vectors(
        model.arch, work.read(MEANS), ranked, topk=settings.topk, alpha=settings.alpha, alphas=alphas, ks=ks
    )
    known = work.trials_per_pass.get(STAGE.name)
    effects = model.engine.inject(prompts, vectors, range(model.arch.n_layers), per_pass=known)
    names = [*(f"alpha {alpha}" for alpha in alphas), *(f"k {k}" for k in ks)]
    numbers = judge_vectors(effects, prompts, names)
    per_layer, n = numbers.pop("per_layer"), len(alphas)
    document = {
        "q_id": work.q_id,
        "meaning": "alpha: the function vector added so many times. k: the vector of so many best heads, added as many "
        "times as the run's own alpha says. norm_added: length of what is added; acc and mean_p are those of the "
        "best layer by mean P.",
        "caution": CAUTION,
        "own": {"alpha": settings.alpha, "k": settings.topk},
        "n_eval": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "precision": model.precision,
        **numbers,
        "alpha": tabulate(per_layer, names[:n], alphas, vectors[:n]),
        "k": tabulate(per_layer, names[n:], ks, vectors[n:]),
    }
    work.write(SWEEPS_FILE, json_bytes(document), content=document)
    work.trials_per_pass[STAGE.name] = effects.per_pass
    return "; ".join(filter(None, (_best(document[name], name) for name in ("alpha", "k"))))


def _best(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    swept = [entry for entry in entries if entry["mean_p"] is not None]
    if not swept:
        return ""
    best = max(swept, key=lambda entry: entry["mean_p"])
    return f"best of {len(entries)} {name}: {best['value']:g} (P {best['mean_p']:.2f} at layer {best['best_layer']})"


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Finding]:
    document, settings = folder.read(SWEEPS_FILE), status.settings
    swept = tuple(tuple(entry["value"] for entry in document[name]) for name in ("alpha", "k"))
    same = swept == (settings.alpha_sweep, settings.k_sweep)
    yield Finding(folder.path(SWEEPS_FILE), "the alphas and k of qid_status.json", same)


STAGE = Stage(
    "step6_sweeps",
    "Other alphas and numbers of heads, at every layer (--alpha_sweep, --k_sweep).",
    _sweep,
    reads=(ZERO_SHOT_TRIALS, CIE, MEANS),
    writes=(SWEEPS_FILE,),
    settings=(*MODEL_SETTINGS, "alpha", "topk", "score_key", "n_eval", "allow_query_duplicates"),
    agrees=_agrees,
    on_request=True,
)
