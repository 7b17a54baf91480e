"""StepD for MLPs, on request (``--extras mlp``): the causal indirect effect of every layer's MLP at the last token, as
further rows of the head sweep.

Todd et al. (2024) look at heads alone. On the corrupted prompt an MLP's output at the last token is set to its mean
over clean prompts, as a head's is in eq. 3, and by the same engine: L more versions of the last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from relfv.errors import InputError
from relfv.settings import MODEL_SETTINGS
from relfv.stages.cie import corrupted_prompts
from relfv.stages.means import clean_prompts
from relfv.stages.scores import CIE, uncertainty
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.stats import LEVEL
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import MEASURES

_PROMPTS_A_PASS = 25
_MEANING = (
    "An entry a layer: on each trial's corrupted prompt the output of the layer's MLP at the last token is set to its "
    "mean over the clean prompts, one MLP at a time. Columns are those of cie_scores.csv. An MLP also passes on what "
    "heads of its own and earlier layers wrote, so its effect and theirs do not add up. best_head: of the heads of "
    "that layer the one with the largest mean_delta_p, for comparison."
)

# --- files ---------------------------------------------------------------------------------------------------------

MLP_CIE = File("stepD_mlp/mlp_cie.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def clean_means(work: Work) -> dict[int, Any]:
    """Layer -> float32 (resid_dim,): mean over the frozen trials' clean prompts of the output of its MLP at the last
    token. Raises InputError for a model whose MLPs are no modules of their own."""
    import torch

    from relfv.engine.memory import in_passes
    from relfv.engine.passes import capture_mlps
    from relfv.models.mlps import mlps_of

    backbone, prompts = work.model.backbone, work.once(clean_prompts)
    if not mlps_of(backbone.arch):
        raise InputError(
            f"--extras mlp: the MLPs of {work.model.name} are no modules of their own that take a hidden state and "
            "give one (so it is in OPT, Bloom and Llama 4); expected a model with a module 'mlp' in its blocks"
        )

    with backbone.running():
        parts, _ = in_passes(
            backbone, prompts.ids, _PROMPTS_A_PASS, lambda part: capture_mlps(backbone, prompts.ids[part])
        )
    return {layer: torch.cat([part[layer] for part in parts]).double().mean(0).float() for layer in parts[0]}


def _sweep(work: Work) -> str:
    import torch

    from relfv.engine.base import Together

    prompts, means, n_layers = work.once(corrupted_prompts), clean_means(work), work.model.arch.n_layers
    versions = []
    for layer, mean in means.items():
        values = torch.full((1, n_layers, len(mean)), torch.nan)
        values[0, layer] = mean
        versions.append(Together(mlps=values))
    effects = work.repeatable(STAGE.name, work.model.engine.edit_together, prompts, versions)
    deltas = {m: effects.delta(m) for m in MEASURES}
    columns = {f"mean_delta_{m}": delta.mean(0) for m, delta in deltas.items()}
    columns |= uncertainty(deltas["p"], prompts.clusters)
    columns["clean_mean_norm"] = np.array([float(mean.double().norm()) for mean in means.values()])
    best = _best_heads(work)
    mlps = [
        {"layer": layer, **{name: finite(values[i]) for name, values in columns.items()}, "best_head": best.get(layer)}
        for i, layer in enumerate(means)
    ]
    document = {
        "q_id": work.q_id,
        "meaning": _MEANING,
        "n_trials": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "precision": work.model.precision,
        "ci_level": LEVEL,
        "mlps": mlps,
        "by_trial": {
            "query_source_index": list(prompts.clusters),
            "p_base": effects.base.measure("p").tolist(),
            "delta_p": {str(layer): [finite(p) for p in deltas["p"][:, i]] for i, layer in enumerate(means)},
        },
    }
    work.write(MLP_CIE, json_bytes(document), content=document)
    top = max(mlps, key=lambda mlp: mlp["mean_delta_p"] or 0.0)
    return f"{len(mlps)} MLPs; best layer {top['layer']}, mean_delta_p {top['mean_delta_p'] or 0.0:+.4f}"


def _best_heads(work: Work) -> dict[int, dict[str, Any]]:
    """Layer -> its head with the largest mean_delta_p, for each layer swept."""
    best: dict[int, dict[str, Any]] = {}
    for head in work.read(CIE):
        p = head.scores["mean_delta_p"]
        if head.id.layer not in best or p > best[head.id.layer]["mean_delta_p"]:
            best[head.id.layer] = {"head": head.id.head, "mean_delta_p": p}
    return best


def _agrees(folder: QidFolder, _: QidStatus) -> Iterator[Check]:
    document = folder.read(MLP_CIE)
    same = document["by_trial"]["query_source_index"] == [*folder.read(TRIALS).clusters]
    yield Check(folder.path(MLP_CIE), "the queries of sampled_trials.json", same)


STAGE = Stage(
    "stepD_mlp",
    "Causal indirect effect of every layer's MLP (--extras mlp).",
    _sweep,
    reads=(TRIALS, CIE),
    writes=(MLP_CIE,),
    settings=MODEL_SETTINGS,
    agrees=_agrees,
    asked=lambda settings: "mlp" in settings.studies,
)
