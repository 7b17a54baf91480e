"""Sweeps over other strengths and other numbers of heads than the spec's, on request, to see how much hangs on
``alpha`` and ``k``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.settings import MODEL_SETTINGS, Settings
from relfv.stages.function_vector import FV, build_function_vector
from relfv.stages.injection import length
from relfv.stages.judging import judge_vectors
from relfv.stages.means import MEANS
from relfv.stages.scores import CIE, rank_heads, select_heads
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.step6 import injections
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated_prompts
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import MeanActivations, ScoredHead

if TYPE_CHECKING:
    from relfv.models.architecture import Architecture

KINDS = ("alpha", "alpha_relative", "k")
CAUTION = (
    "The best of several alphas, k and layers on the same prompts is better than it would be on new ones; a choice "
    "made here has to be tested on other prompts."
)


@dataclass(frozen=True)
class Swept:
    """One vector of a sweep, with the factor alpha by which it is added after each layer."""

    kind: str
    """``alpha``, ``alpha_relative`` or ``k``."""
    value: float
    vector: np.ndarray
    """float32 (resid_dim,)"""
    alpha: np.ndarray
    """float32 (layer,)"""

    @property
    def name(self) -> str:
        """Name of the entry, such as ``alpha 0.5``."""
        return f"{self.kind} {self.value}"

    @property
    def added(self) -> np.ndarray:
        """float32 (layer, resid_dim): alpha times the vector."""
        return self.alpha[:, None] * self.vector


def swept_vectors(
    arch: Architecture, means: MeanActivations, ranked: Sequence[ScoredHead], hidden: np.ndarray, settings: Settings
) -> list[Swept]:
    """The run's own vector at each of ``alpha_sweep``; at each of ``alpha_sweep_relative`` times the length ``hidden``
    (layer,) of the hidden state after each layer; and the vectors of each of ``k_sweep`` best heads at the run's alpha.
    Raises InputError for a k of more heads than were scored."""

    def vector(k: int) -> np.ndarray:
        return build_function_vector(arch, means, [head.id for head in select_heads(ranked, k)]).total

    def times(alpha: float) -> np.ndarray:
        return np.full(len(hidden), alpha, np.float32)

    own = vector(settings.topk)
    norm = length(own)
    return [
        *(Swept("alpha", value, own, times(value)) for value in settings.alpha_sweep),
        *(
            Swept("alpha_relative", value, own, (value * hidden / norm if norm else times(0)).astype(np.float32))
            for value in settings.alpha_sweep_relative
        ),
        *(Swept("k", k, vector(k), times(settings.alpha)) for k in settings.k_sweep),
    ]


def tabulate(per_layer: Mapping[str, Mapping[str, Any]], swept: Swept, hidden: np.ndarray) -> dict[str, Any]:
    """The entry of one vector: its numbers at every layer and its best by P, with how many times it was added there,
    the length of that, and its share of the hidden state's length.

    ``per_layer`` are the numbers by layer and name, ``hidden`` (layer,) the hidden states' lengths.
    """
    norm = length(swept.vector)
    at = {
        layer: {
            **numbers[swept.name],
            "alpha": float(alpha),
            "norm_added": abs(float(alpha)) * norm,
            "share_of_hidden": finite(abs(float(alpha)) * norm / size) if size else None,
        }
        for (layer, numbers), alpha, size in zip(per_layer.items(), swept.alpha, hidden.tolist(), strict=True)
    }
    best = max(at, key=lambda layer: at[layer]["mean_p"] or 0.0)  # None: the vector overflows
    kept = {key: at[best][key] for key in ("alpha", "norm_added", "share_of_hidden", "acc", "mean_p")}
    return {"value": swept.value, "best_layer": int(best), **kept, "per_layer": at}


# --- files ---------------------------------------------------------------------------------------------------------

SWEEPS_FILE = File("step6/sweeps.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _sweep(work: Work) -> str:
    model, settings, prompts = work.model, work.settings, work.once(evaluated_prompts)
    ranked, hidden = rank_heads(work.read(CIE), settings.score_key), work.once(injections).hidden
    swept = swept_vectors(model.arch, work.read(MEANS), ranked, hidden, settings)
    vectors = np.stack([one.added for one in swept], axis=1)[:, None]
    effects = work.repeatable(STAGE.name, model.engine.inject, prompts, [vectors], range(model.arch.n_layers))
    numbers = judge_vectors(effects, prompts, [one.name for one in swept])
    per_layer = numbers.pop("per_layer")
    document = {
        "q_id": work.q_id,
        "meaning": "alpha: the function vector added so many times. alpha_relative: the same stretched to so many "
        "times the mean length of the hidden state that it is added to. k: the vector of so many best heads, added as "
        "many times as the run's own alpha says. norm_added: length of what is added; share_of_hidden: that by the "
        "hidden state's; both, with alpha, acc and mean_p, are those of the best layer by mean P.",
        "caution": CAUTION,
        "own": {"alpha": settings.alpha, "k": settings.topk},
        "n_eval": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "precision": model.precision,
        **numbers,
        **{kind: [tabulate(per_layer, one, hidden) for one in swept if one.kind == kind] for kind in KINDS},
    }
    work.write(SWEEPS_FILE, json_bytes(document), content=document)
    return "; ".join(filter(None, (_best(document[kind], kind) for kind in KINDS)))


def _best(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    swept = [entry for entry in entries if entry["mean_p"] is not None]
    if not swept:
        return ""
    best = max(swept, key=lambda entry: entry["mean_p"])
    return f"best of {len(entries)} {name}: {best['value']:g} (P {best['mean_p']:.2f} at layer {best['best_layer']})"


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    document, settings = folder.read(SWEEPS_FILE), status.settings
    swept = [tuple(entry["value"] for entry in document.get(kind, ())) for kind in KINDS]
    same = swept == [settings.alpha_sweep, settings.alpha_sweep_relative, settings.k_sweep]
    yield Check(folder.path(SWEEPS_FILE), "the alphas and k of qid_status.json", same)


STAGE = Stage(
    "step6_sweeps",
    "Other alphas and numbers of heads, at every layer (--alpha_sweep, --alpha_sweep_relative, --k_sweep).",
    _sweep,
    reads=(ZERO_SHOT_TRIALS, CIE, MEANS, FV),
    writes=(SWEEPS_FILE,),
    settings=(*MODEL_SETTINGS, "alpha", "topk", "score_key", "n_eval", "allow_query_duplicates"),
    agrees=_agrees,
    asked=lambda settings: settings.sweeps,
)
