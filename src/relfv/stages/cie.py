"""StepD, CIE: the causal indirect effect of every head on every trial (Todd et al. 2024, eq. 3), its mean over trials,
and how much of it arithmetic alone could make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relfv.errors import InputError, RunError
from relfv.settings import MODEL_SETTINGS, Settings, parse_index_list
from relfv.stages.means import MEANS
from relfv.stages.noise_floor import N_TRIALS, NOISE_FLOOR, measure_noise_floor, noise_floor_document
from relfv.stages.scores import AIE, CIE, aie_bytes, cells_of, cie_bytes, rank_heads, score_heads
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.store.folder import File, QidFolder
from relfv.store.formats import digits, json_bytes, read_jsonl
from relfv.store.status import QidStatus
from relfv.types import MEASURES, HeadEffects, HeadId, MeanActivations, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel


def heads_to_sweep(model: LanguageModel, settings: Settings) -> list[HeadId]:
    """``--layers`` x ``--heads``, of a hybrid's layers those with attention. Raises InputError for indices that the
    model does not have, or if none of the layers has attention."""
    layers = parse_index_list(settings.layers, model.arch.n_layers, "--layers")
    heads = parse_index_list(settings.heads, model.arch.n_heads, "--heads")
    with_heads = [*model.arch.out_projs]
    if not set(layers) & set(with_heads):
        raise InputError(
            f"--layers {settings.layers}: {model.name} has attention in layers {', '.join(map(str, with_heads))} "
            "alone; expected one of them"
        )
    return [HeadId(layer, head) for layer in layers if layer in with_heads for head in heads]


def head_effects(
    model: LanguageModel,
    prompts: Prompts,
    means: MeanActivations,
    heads: Sequence[HeadId],
    *,
    per_pass: int | None = None,
) -> HeadEffects:
    """On each corrupted prompt set each head, one at a time, to its clean mean and score the target.

    ``per_pass`` None: as many as the engine has room for. Raises InputError if ``means`` is of another shape
    than the model's heads.
    """
    arch = model.arch
    shape = (arch.n_layers, arch.n_heads, arch.head_dim)
    if means.values.shape != shape:
        raise InputError(f"clean means of shape {means.values.shape} do not fit {model.name}, which has {shape}")
    ordered = tuple(sorted(heads))
    return HeadEffects(ordered, model.engine.sweep_heads(prompts, means.values, ordered, per_pass=per_pass))


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialDeltas:
    """The effects of heads on trials, as trial_metrics.jsonl has them."""

    heads: tuple[HeadId, ...]
    """The heads, by layer, then head."""
    of: dict[str, np.ndarray]
    """Measure -> float64 (trial, head): with the patch minus without."""


def read_deltas(path: Path) -> TrialDeltas:
    """The effects of a trial_metrics.jsonl. Raises RunError if it is missing or not one."""
    rows = read_jsonl(path)
    try:
        heads = sorted({HeadId(row["layer"], row["head"]) for row in rows})
        column = {head: i for i, head in enumerate(heads)}
        n_trials = 1 + max(row["trial_idx"] for row in rows)
        distinct = {(row["trial_idx"], row["layer"], row["head"]) for row in rows}
        if not len(distinct) == len(rows) == n_trials * len(heads):
            every = f"one for each of {n_trials} trials and {len(heads)} heads"
            raise RunError(f"{path}: rows are missing or there twice; expected {every}")
        deltas = {m: np.full((n_trials, len(heads)), np.nan) for m in MEASURES if f"delta_{m}" in rows[0]}
        for row in rows:
            at = row["trial_idx"], column[HeadId(row["layer"], row["head"])]
            for m, values in deltas.items():
                values[at] = row[f"delta_{m}"]
    except (ValueError, KeyError, TypeError, IndexError) as problem:
        raise RunError(f"{path}: is not a file of head effects as StepD writes them ({problem!r})") from None
    for m, values in deltas.items():
        require_finite(values, f"{path.name}, {m}")
    return TrialDeltas(tuple(heads), deltas)


METRICS = File("trial_metrics.jsonl", read_deltas)


def _metrics_bytes(q_id: str, effects: HeadEffects, target_ids: Sequence[int]) -> bytes:
    """A row for every (trial, layer, head), written by hand: 25,600 rows of an 8B model take a second by way of
    dicts."""
    base, patched = effects.effects.base.measures(), effects.effects.edited.measures()
    heads = [f'"layer": {head.layer}, "head": {head.head}' for head in effects.heads]
    parts = []
    for trial_idx, target in enumerate(target_ids):
        of_row = [f'{{"q_id": {json.dumps(q_id)}, "trial_idx": {trial_idx}, ', heads, f', "target_id": {target}']
        for m in MEASURES:
            before, after = base[m][trial_idx], patched[m][trial_idx]
            require_finite(after, f"{METRICS.name}, trial {trial_idx}, {m}")
            of_row += [f', "{m}_base": {digits(before[None])[0]}, "{m}_patch": ', digits(after)]
            of_row += [f', "delta_{m}": ', digits(after - before)]
        parts.append(_rows([*of_row, "}\n"], len(heads)))
    return "".join(parts).encode()


def _rows(parts: Sequence[str | list[str]], n: int) -> str:
    """``n`` rows, put together from texts that all share and columns of their own."""
    cells = [""] * (n * len(parts))
    for i, part in enumerate(parts):
        cells[i :: len(parts)] = [part] * n if isinstance(part, str) else part
    return "".join(cells)


def require_finite(values: np.ndarray, where: str) -> None:
    """Raise RunError, naming ``where``, for scores that are NaN or infinite."""
    if not np.isfinite(values).all():
        raise RunError(
            f"{where}: the model gave NaN or infinite scores; expected finite numbers (fp16 overflows in some models: "
            "use --dtype bf16, or --precision exact)"
        )


# --- the stage -----------------------------------------------------------------------------------------------------


def corrupted_prompts(work: Work) -> Prompts:
    """The frozen trials' corrupted prompts (``work.once(corrupted_prompts)``)."""
    return work.tokenised(work.read(TRIALS))


def _sweep(work: Work) -> str:
    model, settings, means = work.model, work.settings, work.read(MEANS)
    prompts = work.once(corrupted_prompts)
    effects = work.repeatable(STAGE.name, head_effects, model, prompts, means, heads_to_sweep(model, settings))
    model.engine.prepare(prompts[:N_TRIALS])  # for the noise floor, while a GPU computes the sweep
    work.meanwhile()
    scored = score_heads(effects, means, prompts.clusters)
    ranked = rank_heads(scored, settings.score_key)
    deltas = TrialDeltas(effects.heads, {m: effects.effects.delta(m) for m in MEASURES})
    work.write(METRICS, _metrics_bytes(work.q_id, effects, prompts.targets), content=deltas)
    cells, without_number = cells_of(scored), [replace(head, n_trials=0) for head in ranked]
    work.write(CIE, cie_bytes(work.q_id, scored, cells), content=scored)
    work.write(AIE, aie_bytes(ranked, cells), content=without_number)
    floor = measure_noise_floor(model, prompts, means, effects, ranked)
    facts = model.facts()
    arithmetic = {
        name: facts[name] for name in ("engine", "precision", "dtype", "quant", "device", "products", "kernels")
    }
    document = noise_floor_document(
        floor, work.q_id, trials_per_pass=effects.per_pass, n_heads=len(effects.heads), arithmetic=arithmetic
    )
    work.write(NOISE_FLOOR, json_bytes(document))
    best = ranked[0]
    return (
        f"{len(effects.heads)} heads; best layer {best.id.layer} head {best.id.head}, "
        f"{settings.score_key} {best.scores[settings.score_key]:+.4f}; "
        f"noise floor {floor.other_shape.largest['p']:.1g} in P"
    )


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    n_trials, cie, aie = len(folder.read(TRIALS).questions), folder.read(CIE), folder.read(AIE)
    deltas = folder.read(METRICS)
    same = sorted(head.id for head in cie) == [*deltas.heads] and len(deltas.of["p"]) == n_trials
    yield Check(folder.path(METRICS), "one row a trial and head of cie_scores.csv", same)
    counted = all(head.n_trials == n_trials for head in cie)
    yield Check(folder.path(CIE), "n_trials as in sampled_trials.json", counted)
    scores = [{head.id: head.scores for head in table} for table in (cie, aie)]
    same = scores[0] == scores[1] and len(cie) == len(aie)
    yield Check(folder.path(AIE), "the heads and scores of cie_scores.csv", same)
    same = folder.read(NOISE_FLOOR)["trials_per_pass"] == status.trials_per_pass.get("stepD_cie")
    yield Check(folder.path(NOISE_FLOOR), "trials_per_pass as in qid_status.json", same)


STAGE = Stage(
    "stepD_cie",
    "Causal indirect effect of every head on every trial, its mean, and the noise floor.",
    _sweep,
    reads=(TRIALS, MEANS),
    writes=(METRICS, CIE, AIE, NOISE_FLOOR),
    settings=(*MODEL_SETTINGS, "layers", "heads", "score_key"),
    agrees=_agrees,
    share=0.2,
)
