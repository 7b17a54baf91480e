"""StepE: the top heads, and the function vector: the output projection of their mean activations, summed (Todd et al.
2024, eq. 5); what is known of each head's score; and a quick check of the vector on the frozen trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import RunError
from relfv.settings import MODEL_SETTINGS
from relfv.stages.cie import METRICS, corrupted_prompts
from relfv.stages.head_evidence import evidence_of_head, evidence_of_list, head_entry
from relfv.stages.head_stability import HEAD_STABILITY, head_stability, stability_document
from relfv.stages.injection import TOKEN_RULE, Injections, inject_at_every_layer, length, summaries
from relfv.stages.leave_query_out import with_error_of_means
from relfv.stages.means import MEANS, clean_run
from relfv.stages.noise_floor import NOISE_FLOOR
from relfv.stages.scores import CIE, rank_heads, require_score, select_heads
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json, read_tensors, tensor_bytes
from relfv.store.status import QidStatus
from relfv.types import MEASURES, HeadId, MeanActivations, ScoredHead, TokenScores

if TYPE_CHECKING:
    from relfv.engine.writing import Writing
    from relfv.models.architecture import Architecture


@dataclass(frozen=True)
class BuiltVector:
    """A function vector, and the parts that it was built from."""

    total: np.ndarray
    """float32 (resid_dim,): the function vector."""
    by_layer: dict[int, np.ndarray]
    """layer -> float32 (resid_dim,): the part that this layer's selected heads contribute; the parts sum to total."""
    heads: tuple[HeadId, ...]


def build_function_vector(
    arch: Architecture, means: MeanActivations, heads: Sequence[HeadId], writing: Writing | None = None
) -> BuiltVector:
    """Sum over ``heads`` of W_O[layer][:, slice of head] @ mean activation, without the output bias.

    Summed in float64 and kept as float32 (resid_dim,), as a whole and split by layer. With ``writing`` each part times
    the gain of its layer's norm.
    """
    import torch

    activations = torch.from_numpy(means.values)
    of_layers = {
        layer: [head.head for head in some] for layer, some in groupby(sorted(heads), key=lambda head: head.layer)
    }
    queued = {layer: arch.project_heads(layer, some, activations[layer, some]) for layer, some in of_layers.items()}
    by_layer = {layer: part.cpu() for layer, part in queued.items()}
    if writing:
        by_layer = {layer: writing.gained(layer, part) for layer, part in by_layer.items()}
    total = torch.stack(list(by_layer.values())).sum(0)
    return BuiltVector(
        total=total.float().numpy(),
        by_layer={layer: part.float().numpy() for layer, part in by_layer.items()},
        heads=tuple(heads),
    )


def parts_add_up(by_layer: Mapping[int, np.ndarray], total: np.ndarray) -> bool:
    """Whether the parts by layer sum to ``total``, but for the rounding of each when it was written."""
    rest = sum(part.astype(np.float64) for part in by_layer.values()) - total.astype(np.float64)
    return bool(np.linalg.norm(rest) <= 1e-5 * np.linalg.norm(total.astype(np.float64)))


def reference_point(scores: TokenScores, right: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Accuracy and means of untouched prompts, and which of them are answered right."""
    correct = scores.correct(right)
    means = {f"mean_{m}": float(scores.measure(m).mean()) for m in MEASURES}
    return {"acc": float(correct.mean()), **means, "n": len(correct), "right": correct.astype(int).tolist()}


# --- files ---------------------------------------------------------------------------------------------------------


def read_function_vector(path: Path) -> np.ndarray:
    """The vector, float32 (resid_dim,), of a fv_global_resid.pt. Raises RunError for anything but finite numbers in one
    dimension."""
    content = read_tensors(path)
    vector = content.get("fv_global_resid") if isinstance(content, dict) else None
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind != "f":
        raise RunError(f"{path}: has no float tensor 'fv_global_resid' (resid_dim,)")
    vector = vector.astype(np.float32)
    if not np.isfinite(vector).all():
        raise RunError(f"{path}: its fv_global_resid holds NaN or infinities; expected finite numbers")
    return vector


def read_fv_by_layer(path: Path) -> dict[int, np.ndarray]:
    """layer -> float32 (resid_dim,) of a fv_by_layer.pt."""
    content = read_tensors(path)
    parts = content.get("fv_by_layer") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, np.ndarray) for part in parts.values()):
        raise RunError(f"{path}: has no vectors by layer")
    return {int(layer): part.astype(np.float32) for layer, part in parts.items()}


def read_top_heads(path: Path) -> dict[str, Any]:
    """The content of top_heads.json."""
    content = read_json(path)
    try:
        heads_of(content)
    except (KeyError, TypeError):
        raise RunError(f"{path}: is not a list of top heads as StepE writes it") from None
    return content


def heads_of(top_heads: Mapping[str, Any]) -> list[HeadId]:
    """The function vector's heads, best first, from what ``read_top_heads`` gives."""
    return [HeadId(head["layer"], head["head"]) for head in top_heads["heads"]]


TOP_HEADS = File("top_heads.json", read_top_heads)
FV = File("fv_global_resid.pt", read_function_vector)
FV_META = File("fv_global_resid_meta.json", read_json)
FV_BY_LAYER = File("fv_by_layer.pt", read_fv_by_layer)
STEP_E_EVAL = File("stepE_eval.json", read_json)


# --- the stage -----------------------------------------------------------------------------------------------------


def _build(work: Work) -> str:
    settings, folder, model = work.settings, work.folder, work.model
    scored = work.read(CIE)
    require_score(scored, settings.score_key, folder.path(CIE))
    top = select_heads(rank_heads(scored, settings.score_key), settings.topk)
    prompts = work.once(corrupted_prompts)
    fv = build_function_vector(model.arch, work.read(MEANS), [head.id for head in top])
    injections = work.repeatable("stepE", inject_at_every_layer, model, prompts, fv.total, settings.alpha)
    heads = _judged(work, top)  # while a GPU computes the injections
    called = [head["distinguishable"] for head in heads if "distinguishable" in head]
    of_calls = evidence_of_list(top, called, len(scored), work.read(TRIALS).clusters) if called else {}
    shared: dict[str, Any] = {
        "k": settings.topk,
        "score_key": settings.score_key,
        "model": model.name,
        "model_spec": model.spec,
        **of_calls,
        "q_id": work.q_id,
    }
    work.write(TOP_HEADS, json_bytes({"meta": shared, "heads": heads}))
    norm = _write_vector(work, fv, shared)
    work.write(STEP_E_EVAL, json_bytes(_quick_check(work, injections)))
    said = f"{len(top)} heads in {len(fv.by_layer)} layers, |FV| {norm:.2f}"
    return f"{said}; {sum(called)} distinguishable from noise" if called else said


def _judged(work: Work, top: Sequence[ScoredHead]) -> list[dict[str, Any]]:
    """The top heads with what is known of their scores. Folders of other tools may lack what that takes."""
    settings, folder = work.settings, work.folder
    noise = work.read(NOISE_FLOOR)["other_shape"]["p"]["max"] if folder.has(NOISE_FLOOR) else 0.0
    shares: dict[HeadId, float] = {}
    if folder.has(METRICS):
        stability, shares = head_stability(work.read(METRICS), work.read(TRIALS).clusters, settings, work.q_id)
        work.write(HEAD_STABILITY, json_bytes(stability_document(stability, shares, settings, work.q_id)))
    p_clean = float(work.once(clean_run).scores.measure("p").mean())
    heads = [
        {**head_entry(head, settings.score_key), **evidence_of_head(head, noise, shares.get(head.id), p_clean)}
        for head in top
    ]
    if shares and "mean_delta_p_fdr" in top[0].scores:
        for head, interval in zip(heads, _leave_query_out(work, top), strict=True):
            head["leave_query_out"] = interval
    return heads


def _leave_query_out(work: Work, top: Sequence[ScoredHead]) -> list[dict[str, float | None]]:
    deltas = work.read(METRICS)
    intervals, work.trials_per_pass["stepE_heads"] = with_error_of_means(
        work.model,
        work.once(corrupted_prompts),
        work.once(clean_run).activations,
        [head.id for head in top],
        deltas.of["p"][:, [deltas.heads.index(head.id) for head in top]],
        trials_per_pass=work.trials_per_pass.get("stepE_heads"),
    )
    columns = {"se": intervals.se, "ci_low": intervals.low, "ci_high": intervals.high}
    return [{name: finite(float(values[i])) for name, values in columns.items()} for i in range(len(top))]


def _write_vector(work: Work, fv: BuiltVector, shared: Mapping[str, Any]) -> float:
    """Write the three files of the vector. -> its length."""
    arch = work.model.arch
    norm = length(fv.total)
    sizes = {"resid_dim": fv.total.size, "n_heads": arch.n_heads, "head_dim": arch.head_dim}
    work.write(FV, tensor_bytes({"fv_global_resid": fv.total, **sizes}), content=fv.total)
    meta = {
        **shared,
        "heads": [[head.layer, head.head] for head in fv.heads],
        "token_position_rule": TOKEN_RULE,
        "fv_norm": norm,
        "precision": work.model.precision,
        "output_bias": "left out: it belongs to the layer, not to a head",
        "notes": list(arch.notes),
    }
    work.write(FV_META, json_bytes(meta))
    by_layer = {
        "fv_by_layer": fv.by_layer,
        "selected_k": len(fv.heads),
        "alpha_default": work.settings.alpha,
        **sizes,
        "model_spec": shared["model_spec"],
    }
    work.write(FV_BY_LAYER, tensor_bytes(by_layer), content=fv.by_layer)
    return norm


def _quick_check(work: Work, injections: Injections) -> dict[str, Any]:
    """The vector added at each layer to the frozen corrupted prompts, and the untouched prompts for reference."""
    model, right = work.model, work.once(corrupted_prompts).right
    per_layer = {}
    for layer, numbers in enumerate(summaries(injections.effects, right)):
        injections.require_sound(layer)
        kept = {name: numbers[name] for name in ("mean_delta_logit", "mean_delta_p", "acc_with")}
        per_layer[str(layer)] = {**kept, "n": len(right)}
    overall = {
        key: sum(layer[key] for layer in per_layer.values()) / len(per_layer)
        for key in ("mean_delta_logit", "mean_delta_p")
    }
    return {
        "meta": {
            "what": "alpha * fv_global_resid added after each layer at the last token of corrupted_prompt_str; "
            "overall is the mean over layers; reference is the same trials' prompts untouched",
            "alpha": work.settings.alpha,
            "model": model.name,
            "model_spec": model.spec,
            "token_position_rule": TOKEN_RULE,
        },
        "per_layer": per_layer,
        "overall": {**overall, "n": len(right)},
        "reference": {
            "clean": reference_point(work.once(clean_run).scores, right),
            "corrupted": reference_point(injections.effects.base, right),
        },
    }


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    score_key, topk = status.settings.score_key, status.settings.topk
    scores = {head.id: head.scores[score_key] for head in folder.read(CIE)}
    top = {HeadId(head["layer"], head["head"]): head["rank_score"] for head in folder.read(TOP_HEADS)["heads"]}
    ranked = len(top) == topk and top.items() <= scores.items()
    yield Check(folder.path(TOP_HEADS), f"{topk} heads with their {score_key} of cie_scores.csv", ranked)
    same = [HeadId(*head) for head in folder.read(FV_META)["heads"]] == [*top]
    yield Check(folder.path(FV_META), "the heads of top_heads.json", same)
    parts = folder.read(FV_BY_LAYER)
    same = set(parts) == {head.layer for head in top}
    yield Check(folder.path(FV_BY_LAYER), "the layers of top_heads.json", same)
    add_up = parts_add_up(parts, folder.read(FV))
    yield Check(folder.path(FV_BY_LAYER), "parts that sum to fv_global_resid.pt", add_up)


STAGE = Stage(
    "stepE",
    "The top heads, their function vector, and a quick check of it on the frozen trials.",
    _build,
    reads=(CIE, MEANS, TRIALS, NOISE_FLOOR, METRICS),
    writes=(HEAD_STABILITY, TOP_HEADS, FV, FV_META, FV_BY_LAYER, STEP_E_EVAL),
    settings=(*MODEL_SETTINGS, "score_key", "topk", "alpha", "seed"),
    agrees=_agrees,
    share=0.15,
)
