"""One function a stage: read what earlier stages wrote, compute, write.

The science is in stages/, the files' form in artifacts.py; here the two meet. The scripts call these with the paths of
their flags, the pipeline with the paths of the layout.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from relfv.errors import RunError
from relfv.language_model import LanguageModel
from relfv.models.tokens import fed_text
from relfv.settings import Settings, parse_index_list
from relfv.stages.answers import Injection, decode_vector, score_answers
from relfv.stages.cie import head_effects, measure_of, rank_heads, score_heads, trial_scores, with_error_of_means
from relfv.stages.clean_trials import CleanTrials, run_clean_trials
from relfv.stages.conclusions import conclusions, judge_candidates, judge_vectors
from relfv.stages.controls import CONTROLS, candidate_vectors, inject_candidates
from relfv.stages.function_vector import build_function_vector, select_heads
from relfv.stages.injection import InjectionSweep, prompts_to_evaluate, summarize
from relfv.stages.noise_floor import measure_noise_floor
from relfv.stages.prompts import (
    PREFIXES,
    SEPARATORS,
    ZERO_SHOT_FORMAT,
    first_token_collisions,
    prompt_trial,
    zero_shot_prompt,
)
from relfv.stages.sweeps import CAUTION, sweep_vectors, tabulate
from relfv.stages.trials import sample_trials
from relfv.stats import FDR, top_k_stability
from relfv.store import artifacts
from relfv.store.artifacts import QidPaths
from relfv.store.files import read_json, write_atomic, write_json
from relfv.store.status import SWEEPS
from relfv.types import Effects, HeadId, Prompts, Relation, ScoredHead, TokenScores

log = logging.getLogger(__name__)

TOKEN_RULE = "last prompt token; the prompt is fed without a trailing space, with the tokenizer's own BOS"


@dataclass(frozen=True)
class StageResult:
    """What a stage wrote, and its result in a few words for the log."""

    files: list[Path]
    inputs: list[Path]
    said: str
    trials_per_pass: dict[str, int] = field(default_factory=dict)
    """For qid_status.json: the kind of stage, and how many prompts shared a forward pass."""


def heads_to_sweep(model: LanguageModel, settings: Settings) -> list[HeadId]:
    """``--layers`` x ``--heads``. Raises InputError for indices that the model does not have."""
    layers = parse_index_list(settings.layers, model.arch.n_layers, "--layers")
    heads = parse_index_list(settings.heads, model.arch.n_heads, "--heads")
    return [HeadId(layer, head) for layer in layers for head in heads]


def step_d_trials(
    model: LanguageModel, relation: Relation, settings: Settings, csv_sha256: str, paths: QidPaths
) -> StageResult:
    """Sample and freeze the trials: sampled_trials.json, read-only from here on.

    Raises RunError if another snapshot is already there: it may be what other results rest on.
    """
    trials = sample_trials(
        relation,
        seed=settings.seed,
        n_trials=settings.n_trials_per_q,
        n_demos=settings.n_demos,
        corruption=settings.corruption,  # type: ignore[arg-type]
    )
    prompted = [prompt_trial(trial, model.tokens) for trial in trials]
    meta = {
        "csv_path": settings.relation_csv_path,
        "csv_sha256": csv_sha256,
        "q_list": [relation.q_id],
        "n_trials_per_q": settings.n_trials_per_q,
        "n_demos": settings.n_demos,
        "seed": settings.seed,
        "corruption": settings.corruption,
        "prefixes": PREFIXES,
        "separators": SEPARATORS,
        "model": model.name,
        "model_spec": model.spec,
        "tok_add_special": True,
    }
    collisions = [
        {"token_id": token, "token": model.tokens.text(token), "answers": answers}
        for token, answers in first_token_collisions(relation, model.tokens)
    ]
    for collision in collisions:
        log.info(
            "%s: %d answers begin with the token %r (%s); first-token scores cannot tell them apart",
            relation.q_id,
            len(collision["answers"]),
            collision["token"],
            ", ".join(collision["answers"][:4]) + (", ..." if len(collision["answers"]) > 4 else ""),
        )
    document = artifacts.trials_document(prompted, meta, collisions)
    apart = document["meta"]["n_answers_tokenised_alone"]
    if apart:
        log.warning(
            "%s: in %d trials the tokenizer merges prompt and answer; there the answer was tokenised on its own",
            relation.q_id,
            apart,
        )
    if not paths.trials.exists():
        write_json(paths.trials, document, read_only=True)
    elif read_json(paths.trials).get("trials") != document["trials"]:
        raise RunError(
            f"{paths.trials}: already there and not what these settings give; the frozen trials are never overwritten. "
            "Move the folder aside, or use --force, which does that"
        )
    n_queries = len({trial.query.input for trial in trials})
    return StageResult(
        [paths.trials], [], f"{len(trials)} trials over {n_queries} queries of {len(relation.pairs)} rows"
    )


def clean_trials(model: LanguageModel, trials_path: Path) -> CleanTrials:
    """The frozen trials' clean prompts, run: several stages need them, and the pipeline runs them once."""
    snapshot = artifacts.read_trials(trials_path)
    return run_clean_trials(model, snapshot.prompts("clean_prompt_str"), snapshot.target_ids)


def step_d_means(model: LanguageModel, clean: CleanTrials, paths: QidPaths) -> StageResult:
    """Mean clean activation of every head: stepD_mean_acts/."""
    means = clean.means()
    files = [
        artifacts.write_means(path, means, [paths.q_id], model.arch.resid_dim)
        for path in (paths.means, paths.global_means)
    ]
    return StageResult(files, [paths.trials], f"{means.n_prompts} clean prompts")


def step_d_cie(
    model: LanguageModel, settings: Settings, paths: QidPaths, trials_per_pass: int | None = None
) -> StageResult:
    """Causal indirect effect of every head on every trial, and how much of it arithmetic alone could make:
    trial_metrics.jsonl, cie_scores.csv, aie_scores.csv, stepD_cie/noise_floor.json.

    ``trials_per_pass`` is what this q_id's sweep was made with before, if it was.
    """
    snapshot = artifacts.read_trials(paths.trials)
    means = artifacts.read_means(paths.means)
    prompts, targets = snapshot.prompts("corrupted_prompt_str"), snapshot.target_ids
    effects = head_effects(
        model, prompts, targets, means, heads_to_sweep(model, settings), trials_per_pass=trials_per_pass
    )
    scored = score_heads(effects, means, snapshot.queries)
    ranked = rank_heads(scored, settings.score_key)
    files = [artifacts.write_head_effects(paths, effects, targets)]
    files += artifacts.write_scores(paths, scored, ranked)
    floor = measure_noise_floor(model, prompts, targets, means, effects, ranked)
    per_pass = effects.effects.per_pass
    arithmetic = {
        "engine": model.engine.name,
        "precision": model.precision,
        "dtype": model.dtype,
        "quant": model.quant,
        "device": model.backbone.device.type,
        **model.backbone.arithmetic.facts(),
    }
    files.append(
        artifacts.write_noise_floor(
            paths, floor, trials_per_pass=per_pass, n_heads=len(effects.heads), arithmetic=arithmetic
        )
    )
    best = ranked[0]
    return StageResult(
        files,
        [paths.trials, paths.means],
        f"{len(effects.heads)} heads; best layer {best.id.layer} head {best.id.head}, "
        f"{settings.score_key} {best.scores[settings.score_key]:+.4f}; "
        f"noise floor {floor.other_shape.largest['p']:.1g} in P",
        {"stepD_cie": per_pass},
    )


def step_heatmap(paths: QidPaths, metric: str, topk: int, out: Path | None = None) -> StageResult:
    """Layers x heads with the top k marked: aie_heatmap_<Q>.png."""
    from relfv.report.figures import heatmap_png

    scored = artifacts.read_scores(paths.aie)
    artifacts.require_score(scored, metric, paths.aie)
    top = select_heads(rank_heads(scored, metric), topk)
    path = write_atomic(out or paths.heatmap, heatmap_png(scored, metric, top, paths.q_id))
    return StageResult([path], [paths.aie], f"{metric}, top {len(top)} marked")


def step_e(
    model: LanguageModel,
    settings: Settings,
    source: QidPaths,
    trials_path: Path,
    clean: CleanTrials,
    out: QidPaths,
    trials_per_pass: Mapping[str, int],
) -> StageResult:
    """Top heads and function vector from StepD's artifacts in ``source``, and a quick check of it on the trials, whose
    ``clean`` prompts are the reference.

    ``trials_per_pass`` is what its passes were made with before, if they were.
    """
    scored = artifacts.read_scores(source.cie)
    artifacts.require_score(scored, settings.score_key, source.cie)
    means = artifacts.read_means(source.means)
    snapshot = artifacts.read_trials(trials_path)
    top = select_heads(rank_heads(scored, settings.score_key), settings.topk)
    # Folders of other tools may lack these two; then heads are not judged.
    judged_by = [path for path in (source.noise_floor, source.metrics) if path.exists()]
    noise = 0.0
    if source.noise_floor in judged_by:
        noise = artifacts.read_noise_floor(source.noise_floor)["other_shape"]["p"]["max"]
    shares: dict[HeadId, float] = {}
    files: list[Path] = []
    if source.metrics in judged_by:
        swept, deltas = artifacts.read_deltas(source.metrics, measure_of(settings.score_key))
        stability = top_k_stability(
            trial_scores(deltas, settings.score_key),
            snapshot.queries,
            settings.topk,
            seed=f"{settings.seed}:{out.q_id}",
        )
        shares = dict(zip(swept, stability.in_top_k.tolist(), strict=True))
        files.append(
            artifacts.write_head_stability(out, stability, shares, k=settings.topk, score_key=settings.score_key)
        )
    left_out: dict[HeadId, dict[str, float | None]] = {}
    made_with = {}
    if shares and "mean_delta_p_fdr" in top[0].scores:
        left_out, made_with["stepE_heads"] = _left_out(model, snapshot, clean, top, trials_per_pass.get("stepE_heads"))
    fv = build_function_vector(model.arch, means, [head.id for head in top])
    norm = float(fv.total.double().norm())
    shared: dict[str, Any] = {
        "k": settings.topk,
        "score_key": settings.score_key,
        "model": model.name,
        "model_spec": model.spec,
    }
    heads = [
        {
            "layer": head.id.layer,
            "head": head.id.head,
            "score_key": settings.score_key,
            "rank_score": head.scores[settings.score_key],
            "mean_delta_p": head.scores["mean_delta_p"],
            "mean_delta_logprob": head.scores["mean_delta_logprob"],
            "n_trials": head.n_trials,
            **_marks(head, noise, shares.get(head.id)),
            **({"leave_query_out": left_out[head.id]} if left_out else {}),
        }
        for head in top
    ]
    called = [head["distinguishable"] for head in heads if "distinguishable" in head]
    if called:
        shared |= {"n_distinguishable": sum(called), "fdr_level": FDR}
    meta = {
        **shared,
        "q_id": out.q_id,
        "heads": [[head.id.layer, head.id.head] for head in top],
        "token_position_rule": TOKEN_RULE,
        "fv_norm": norm,
        "precision": model.precision,
        "output_bias": "left out: it belongs to the layer, not to a head",
        "notes": list(model.arch.notes),
    }
    files += [write_json(out.top_heads, {"meta": {**shared, "q_id": out.q_id}, "heads": heads})]
    files += artifacts.write_function_vector(
        out, fv, meta, alpha=settings.alpha, n_heads=model.arch.n_heads, head_dim=model.arch.head_dim
    )
    sweep = InjectionSweep(
        model, snapshot.prompts("corrupted_prompt_str"), snapshot.target_ids, fv.total, settings.alpha
    )
    made_with["stepE"] = sweep.at_layer(0, trials_per_pass.get("stepE")).per_pass
    files.append(write_json(out.step_e_eval, _step_e_eval(model, settings, snapshot.target_ids, sweep, clean)))
    inputs = [source.cie, source.means, trials_path, *judged_by]
    said = f"{len(top)} heads in {len(fv.by_layer)} layers, |FV| {norm:.2f}"
    if called:
        said += f"; {sum(called)} distinguishable from noise"
    return StageResult(files, inputs, said, made_with)


def _left_out(
    model: LanguageModel,
    snapshot: artifacts.TrialSnapshot,
    clean: CleanTrials,
    top: Sequence[ScoredHead],
    trials_per_pass: int | None,
) -> tuple[dict[HeadId, dict[str, float | None]], int]:
    """For each head what leaving queries out shows of its mean_delta_p's error, and the trials a pass."""
    found, per_pass = with_error_of_means(
        model,
        snapshot.prompts("corrupted_prompt_str"),
        snapshot.target_ids,
        clean.activations,
        [head.id for head in top],
        [head.scores["mean_delta_p"] for head in top],
        snapshot.queries,
        trials_per_pass=trials_per_pass,
    )
    columns = {"se": found.se, "ci_low": found.low, "ci_high": found.high}
    return {
        head.id: {name: artifacts.finite(float(values[i])) for name, values in columns.items()}
        for i, head in enumerate(top)
    }, per_pass


def _marks(head: ScoredHead, noise: float, share_in_top_k: float | None) -> dict[str, Any]:
    """What is known of a head's score beside the score. Scores of other tools come without, and then nothing is said."""
    found: dict[str, Any] = {
        column: artifacts.finite(head.scores[column])
        for column in (f"mean_delta_p_{name}" for name in ("ci_low", "ci_high", "p_value", "fdr"))
        if column in head.scores
    }
    if found:
        found["distinguishable"] = head.scores["mean_delta_p_fdr"] <= FDR and abs(head.scores["mean_delta_p"]) > noise
    if share_in_top_k is not None:
        found["in_top_k"] = share_in_top_k
    return found


def _step_e_eval(
    model: LanguageModel, settings: Settings, targets: list[int], sweep: InjectionSweep, clean: CleanTrials
) -> dict[str, Any]:
    """The vector added at each layer to the frozen corrupted prompts, and the untouched prompts for reference."""
    per_layer = {}
    for layer in range(model.arch.n_layers):
        numbers = summarize(sweep.at_layer(layer), targets)
        per_layer[str(layer)] = {
            "mean_delta_logit": numbers["mean_delta_logit"],
            "mean_delta_p": numbers["mean_delta_p"],
            "acc_with": numbers["acc_with"],
            "n": len(targets),
        }
    overall = {
        key: sum(layer[key] for layer in per_layer.values()) / len(per_layer)
        for key in ("mean_delta_logit", "mean_delta_p")
    }
    return {
        "meta": {
            "what": "alpha * fv_global_resid added after each layer at the last token of corrupted_prompt_str; "
            "overall is the mean over layers; reference is the same trials' prompts untouched",
            "alpha": settings.alpha,
            "model": model.name,
            "model_spec": model.spec,
            "token_position_rule": TOKEN_RULE,
        },
        "per_layer": per_layer,
        "overall": {**overall, "n": len(targets)},
        "reference": {
            "clean": _reference_point(clean.scores, targets),
            "corrupted": _reference_point(sweep.at_layer(0).base, targets),
        },
    }


def _reference_point(scores: TokenScores, targets: list[int]) -> dict[str, Any]:
    correct = [int(top == target) for top, target in zip(scores.top_id.tolist(), targets, strict=True)]
    return {
        "acc": sum(correct) / len(correct),
        **{f"mean_{m}": float(values.mean()) for m, values in scores.measures().items()},
        "n": len(correct),
    }


def step_zero_shot(trials_path: Path, out: Path) -> StageResult:
    """The same queries without demos: sampled_trials_zeroshot.json."""
    snapshot = artifacts.read_trials(trials_path)
    prompts = [zero_shot_prompt(trial["query"]["input"]) for trial in snapshot.trials]
    document = artifacts.zero_shot_document(snapshot, ZERO_SHOT_FORMAT, prompts)
    return StageResult([write_json(out, document)], [trials_path], f"{len(prompts)} prompts")


def evaluated(zero_shot: artifacts.TrialSnapshot, settings: Settings) -> artifacts.TrialSnapshot:
    """The trials whose prompts Step6 evaluates."""
    return zero_shot.only(
        prompts_to_evaluate(zero_shot.trials, settings.n_eval, allow_duplicates=settings.allow_query_duplicates)
    )


class Step6:
    """Injection on the zero-shot prompts, one integer layer a call. The loop over layers is the caller's."""

    def __init__(self, model: LanguageModel, settings: Settings, fv_path: Path, trials_path: Path) -> None:
        self._model, self._settings = model, settings
        snapshot = artifacts.read_trials(trials_path)
        self._n_trials = len(snapshot.trials)
        chosen = evaluated(snapshot, settings)
        self._trials, self._targets = chosen.trials, chosen.target_ids
        self._prompts = [fed_text(prompt) for prompt in chosen.prompts("corrupted_prompt_str")]
        self._vector = artifacts.read_function_vector(fv_path)
        self._inputs = [fv_path, trials_path]
        self._sources = {"fv_global_path": fv_path.name, "sampled_trials_path": trials_path.name}
        self._sweep = InjectionSweep(model, self._prompts, self._targets, self._vector, settings.alpha)

    def run(self, edit_layer: int, out_dir: Path, trials_per_pass: int | None = None) -> StageResult:
        """Evaluate one layer and write its four files into ``out_dir``; ``trials_per_pass`` is what any layer of this
        q_id was made with before, if it was."""
        effects = self._sweep.at_layer(edit_layer, trials_per_pass)
        numbers = summarize(effects, self._targets)
        rows = self._rows(effects)
        summary = {
            "n_eval": len(rows),
            "requested_n_eval": self._settings.n_eval,
            "n_trials": self._n_trials,
            **numbers,
        }
        meta = self._meta(edit_layer)
        norm = meta["fv_norm"]
        per_qid = {
            q_id: self._part(effects, [i for i, trial in enumerate(self._trials) if trial["q_id"] == q_id])
            for q_id in dict.fromkeys(trial["q_id"] for trial in self._trials)
        }
        files = artifacts.write_step6_layer(
            out_dir,
            results_name=artifacts.results_name(self._model.name, edit_layer, len(rows)),
            results={
                "config": meta,
                "fv": {"shape": list(self._vector.shape), "norm": norm},
                "summary": summary,
                "per_qid": per_qid,
                "metadata": {"trials": [trial["trial_id"] for trial in self._trials], **self._sources},
                "results": rows,
            },
            summary=summary,
            trials=rows,
            meta=meta,
        )
        said = f"layer {edit_layer}: P {numbers['mean_p_base']:.3f} -> {numbers['mean_p_with']:.3f}"
        return StageResult(files, self._inputs, said, {"step6": effects.per_pass})

    def _part(self, effects: Effects, rows: list[int]) -> dict[str, Any]:
        part = Effects(base=effects.base[rows], edited=effects.edited[rows])
        return {"n_eval": len(rows), **summarize(part, [self._targets[i] for i in rows])}

    def _meta(self, edit_layer: int) -> dict[str, Any]:
        model, settings = self._model, self._settings
        return {
            "model": model.name,
            "model_spec": model.spec,
            "edit_layer": edit_layer,
            "alpha": settings.alpha,
            "seed": settings.seed,
            "token_position_rule": TOKEN_RULE,
            "fv_norm": float(self._vector.double().norm()),
            "dtype": model.dtype,
            "quant": model.quant,
            "precision": model.precision,
            "engine": model.engine.name,
            "device": model.backbone.device.type,
            "n_eval": len(self._trials),
            "requested_n_eval": settings.n_eval,
            "sampling": "all trials" if settings.allow_query_duplicates else "unique queries",
        }

    def _rows(self, effects: Effects) -> list[dict[str, Any]]:
        base, edited = effects.base, effects.edited[:, 0]
        before, after = base.measures(), edited.measures()
        rows = []
        for i, trial in enumerate(self._trials):
            target, top_base, top_with = self._targets[i], int(base.top_id[i]), int(edited.top_id[i])
            row = {
                "idx": i,
                "q_id": trial["q_id"],
                "trial_idx": trial["trial_idx"],
                "prompt": self._prompts[i],
                "answer": trial["target_str"],
                "target_id": target,
                "target_token": self._model.tokens.text(target),
                "pred_id_base": top_base,
                "pred_id_with": top_with,
                "pred_token_base": self._model.tokens.text(top_base),
                "pred_token_with": self._model.tokens.text(top_with),
                "accuracy_base": int(top_base == target),
                "accuracy_with": int(top_with == target),
            }
            for m in ("logit", "logprob", "p"):
                row |= {f"{m}_base": float(before[m][i]), f"{m}_with": float(after[m][i])}
                row[f"delta_{m}"] = row[f"{m}_with"] - row[f"{m}_base"]
            rows.append(row)
        return rows


def step6_summary(paths: QidPaths, score_key: str, expected_layers: Sequence[int]) -> StageResult:
    """All layers together, from their files: step6_all_layers_summary.json. Layers without results are listed."""
    per_layer: dict[str, dict[str, Any]] = {}
    inputs: list[Path] = []
    for layer in expected_layers:
        folder = paths.step6_layer(layer)
        results, summary_path = artifacts.find_results(folder), folder / "eval_summary.json"
        if results is None or not summary_path.exists():
            continue
        summary = read_json(summary_path)
        inputs += [results, summary_path]
        per_layer[str(layer)] = {
            "results_path": str(results.relative_to(paths.artifacts)),
            "eval_summary_path": str(summary_path.relative_to(paths.artifacts)),
            "score_value": summary[layer_score(score_key)],
            "acc_base": summary["acc_base"],
            "acc_with": summary["acc_with"],
        }
    if not per_layer:
        raise RunError(f"{paths.step6}: no layer has results; run Step6 for each layer first")
    best = max(per_layer, key=lambda layer: (per_layer[layer]["score_value"], -int(layer)))
    document = {
        "q_id": paths.q_id,
        "score_key": layer_score(score_key),
        "expected_layers": list(expected_layers),
        "completed_layers": [layer for layer in expected_layers if str(layer) in per_layer],
        "missing_layers": [layer for layer in expected_layers if str(layer) not in per_layer],
        "best_layer": int(best),
        "best_score": per_layer[best]["score_value"],
        "per_layer": per_layer,
    }
    chosen = per_layer[best]
    said = (
        f"best of {len(per_layer)} layers: {best}, {document['score_key']} {document['best_score']:+.3f}, "
        f"accuracy {chosen['acc_base']:.2f} -> {chosen['acc_with']:.2f}"
    )
    return StageResult([write_json(paths.step6_summary, document)], inputs, said)


def layer_score(score_key: str) -> str:
    """The eval_summary column that compares layers: score_key itself, of which only signed means exist there."""
    return score_key.replace("mean_abs_delta", "mean_delta")


def step_curve(paths: QidPaths) -> StageResult:
    """P and accuracy over layers: step6/injection_curve.png."""
    from relfv.report.figures import injection_curve_png

    per_layer = read_json(paths.step6_summary)["per_layer"]
    summaries = {int(layer): paths.artifacts / entry["eval_summary_path"] for layer, entry in per_layer.items()}
    layers = {layer: read_json(path) for layer, path in summaries.items()}
    reference = read_json(paths.step_e_eval).get("reference")
    path = write_atomic(paths.curve, injection_curve_png(layers, reference, paths.q_id))
    inputs = [paths.step6_summary, paths.step_e_eval, *summaries.values()]
    return StageResult([path], inputs, f"{len(layers)} layers")


def step6_controls(
    model: LanguageModel, clean: CleanTrials, settings: Settings, paths: QidPaths, trials_per_pass: int | None
) -> StageResult:
    """The vector, held out and beside its controls, at every layer: step6/controls.json."""
    trial_queries = artifacts.read_trials(paths.trials).queries
    on = evaluated(artifacts.read_trials(paths.zero_shot_trials), settings)
    prompts, targets, queries = on.prompts("corrupted_prompt_str"), on.target_ids, on.queries
    heads, deltas = artifacts.read_deltas(paths.metrics, measure_of(settings.score_key))
    candidates = candidate_vectors(
        model.arch,
        clean,
        trial_queries,
        trial_scores(deltas, settings.score_key),
        heads,
        artifacts.read_function_vector(paths.fv),
        artifacts.read_top_heads(paths.top_heads),
        queries,
        seed=f"{settings.seed}:{paths.q_id}",
    )
    effects = inject_candidates(model, prompts, targets, candidates, settings.alpha, trials_per_pass=trials_per_pass)
    judged = judge_candidates(effects, targets, queries, candidates.names, clean.scores, trial_queries)
    document = {
        "q_id": paths.q_id,
        "meaning": {name: CONTROLS[name] for name in dict.fromkeys(candidates.names)},
        "alpha": settings.alpha,
        "n_eval": len(prompts),
        "n_queries": len(set(queries)),
        "precision": model.precision,
        "mean_norm_added": {name: settings.alpha * norm for name, norm in candidates.norms().items()},
        **judged,
    }
    inputs = [paths.trials, paths.zero_shot_trials, paths.metrics, paths.fv, paths.top_heads]
    files = [write_json(paths.controls, document)]
    said = f"{len(candidates.names)} vectors at {model.arch.n_layers} layers"
    return StageResult(files, inputs, said, {"step6_controls": effects.per_pass})


def step6_answers(model: LanguageModel, settings: Settings, paths: QidPaths) -> StageResult:
    """Whole answers without and with the vector held on, at the best layer, and what it decodes to: step6/answers.json."""
    on = evaluated(artifacts.read_trials(paths.zero_shot_trials), settings)
    layer = read_json(paths.step6_summary)["best_layer"]
    vector = artifacts.read_function_vector(paths.fv)
    prompts, answers = on.prompts("corrupted_prompt_str"), [trial["answer_ids"] for trial in on.trials]
    both = torch.stack([0 * vector, settings.alpha * vector]).repeat_interleave(len(prompts), 0)
    scored = score_answers(model, 2 * prompts, 2 * answers, Injection(layer, both))
    without, with_it = scored[: len(prompts)], scored[len(prompts) :]

    def tokens(best: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token_id": token, "token": model.tokens.text(token), "p": p} for token, p in best]

    rows = []
    for trial, answer, before, after in zip(on.trials, answers, without, with_it, strict=True):
        row: dict[str, Any] = {"query": trial["query"]["input"], "answer": trial["target_str"], "n_tokens": len(answer)}
        for name, scored in (("base", before), ("with", after)):
            row |= {
                f"logprob_answer_{name}": scored.logprob,
                f"rank_first_token_{name}": scored.rank,
                f"written_{name}": model.tokens.joined(scored.written),
                f"exact_{name}": int(scored.written == list(answer)),
                f"top_{name}": tokens(scored.top),
            }
        rows.append(row)
    document = {
        "q_id": paths.q_id,
        "meaning": "logprob_answer: of all the answer's tokens; written: the most probable token, as many times as the answer has "
        "tokens; with: alpha times the vector added after the layer at the last prompt token and at every token written.",
        "layer": layer,
        "alpha": settings.alpha,
        "n_eval": len(rows),
        "n_several_tokens": sum(row["n_tokens"] > 1 for row in rows),
        "summary": {
            f"{mean}_{name}": sum(row[f"{key}_{name}"] for row in rows) / len(rows)
            for name in ("base", "with")
            for mean, key in (("exact_match", "exact"), ("mean_logprob_answer", "logprob_answer"))
        },
        "fv_decoded": {
            "caution": "What final norm and unembedding make of the vector alone. A vector that works need not decode to "
            "anything telling, and one that decodes well need not work (Todd et al. 2024, section 3.2).",
            "top": tokens(decode_vector(model, vector)),
        },
        "rows": rows,
    }
    said = "whole answers at layer {}: {:.2f} -> {:.2f}".format(
        layer, document["summary"]["exact_match_base"], document["summary"]["exact_match_with"]
    )
    inputs = [paths.zero_shot_trials, paths.step6_summary, paths.fv]
    return StageResult([write_json(paths.answers, document)], inputs, said)


def step6_sweeps(model: LanguageModel, settings: Settings, paths: QidPaths, trials_per_pass: int | None) -> StageResult:
    """Other alphas and numbers of heads, at every layer: step6/sweeps.json."""
    on = evaluated(artifacts.read_trials(paths.zero_shot_trials), settings)
    ranked = rank_heads(artifacts.read_scores(paths.cie), settings.score_key)
    alphas, ks = settings.alpha_sweep, settings.k_sweep
    vectors = sweep_vectors(
        model.arch,
        artifacts.read_means(paths.means),
        ranked,
        topk=settings.topk,
        alpha=settings.alpha,
        alphas=alphas,
        ks=ks,
    )
    ids = [model.tokens.encode(prompt) for prompt in on.prompts("corrupted_prompt_str")]
    layers = range(model.arch.n_layers)
    effects = model.engine.inject(Prompts(ids, on.target_ids), vectors, layers, per_pass=trials_per_pass)
    names = [*(f"alpha {alpha}" for alpha in alphas), *(f"k {k}" for k in ks)]
    numbers = judge_vectors(effects, on.target_ids, on.queries, names)
    per_layer, n = numbers.pop("per_layer"), len(alphas)
    document = {
        "q_id": paths.q_id,
        "meaning": "alpha: the function vector added so many times. k: the vector of so many best heads, added as many times "
        "as the run's own alpha says. norm_added: length of what is added; acc and mean_p are those of the best layer by mean P.",
        "caution": CAUTION,
        "own": {"alpha": settings.alpha, "k": settings.topk},
        "n_eval": len(on.trials),
        "n_queries": len(set(on.queries)),
        "precision": model.precision,
        **numbers,
        "alpha": tabulate(per_layer, names[:n], alphas, vectors[:n]),
        "k": tabulate(per_layer, names[n:], ks, vectors[n:]),
    }
    said = []
    for name in ("alpha", "k"):
        swept = [entry for entry in document[name] if entry["mean_p"] is not None]
        if swept:
            best = max(swept, key=lambda entry: entry["mean_p"])
            where = f"P {best['mean_p']:.2f} at layer {best['best_layer']}"
            said.append(f"best of {len(document[name])} {name}: {best['value']:g} ({where})")
    inputs = [paths.zero_shot_trials, paths.cie, paths.means]
    return StageResult([write_json(paths.sweeps, document)], inputs, "; ".join(said), {SWEEPS: effects.per_pass})


def write_summary(paths: QidPaths) -> StageResult:
    """What may be concluded, from the other files alone: summary.json."""
    top, controls = read_json(paths.top_heads), read_json(paths.controls)
    stability = read_json(paths.head_stability) if paths.head_stability.exists() else None
    document = {"q_id": paths.q_id, **conclusions(top, controls, stability)}
    inputs = [path for path in (paths.top_heads, paths.controls, paths.head_stability) if path.exists()]
    return StageResult([write_json(paths.summary, document)], inputs, document["verdict"])
