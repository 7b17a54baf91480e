"""The frozen trials in other prompt formats, on request, to tell the relation from the format: heads and vector of
each, and every format's vector on every format's zero-shot prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.relations import called
from relfv.stages.agreement import by_chance, common_by_chance, cosines, rank_correlations, shared_heads
from relfv.stages.cie import METRICS
from relfv.stages.cross import inject_vectors, judge_target
from relfv.stages.function_vector import FV, TOP_HEADS, build_function_vector, heads_of
from relfv.stages.means import MEANS
from relfv.stages.measured import Kept, Measured, cosine_of_random_heads, measure, own, read_measured
from relfv.stages.prompt_formats import formats_of, names_of
from relfv.stages.prompts import SPEC_FORMAT
from relfv.stages.shown import Shown, shown_in
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import STAGE as TRIALS_STAGE
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.stats import LEVEL, clustered_mean, mean_with_left_out, top_k_is_decided
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import MeanActivations
from relfv.words import first_sentence

if TYPE_CHECKING:
    from relfv.figures.canvas import Canvas

MEANING = {
    "formats": "the frozen trials, with the same queries, demos and corrupted labels, in other words; spec is the "
    "run's own. Without demos a clean prompt has the introduction and a corrupted one has not",
    "targets": "of each format's zero-shot prompts every format's vector (source), alpha times, after each layer; "
    "best_layer is the one of the own vector's largest mean_delta_p on these very prompts, which favours it",
    "own_minus": "at that layer, prompt by prompt: P with the own vector minus P with the source's, clustered by query",
    "cosine": "of the formats' vectors; low and high by leaving out one query's trials in both, heads as they are",
    "heads_common": "to all formats; mean and p_value of random lists, null where equal scores leave a list open",
    "samples": "all formats share their trials: what is the trials' doing looks alike in all of them",
}


def cosines_with_left_out(work: Work, all_shown: Sequence[Shown], made: Sequence[Measured]) -> list[list[Any]]:
    """(format, format) of ``value``, ``low``, ``high``: cosine of two vectors, with the error that leaving out one
    query's trials in both shows, on Fisher's scale. None with a vector of zeros."""
    queries = np.asarray(all_shown[0].few_shot.clusters)
    without = np.stack(
        [_vectors_without_each(work, shown, one, queries) for shown, one in zip(all_shown, made, strict=True)]
    )
    whole = cosines(np.stack([one.vector for one in made]))
    each = np.stack([cosines(without[:, i]) for i in range(without.shape[1])])

    def of(i: int, j: int) -> dict[str, float | None] | None:
        if not np.isfinite(whole[i, j]):
            return None
        value = {"value": float(whole[i, j]), "low": None, "high": None}
        if i == j or len(each) < 2 or not np.isfinite(each[:, i, j]).all():
            return value
        limit = 1 - 1e-12
        middle, left_out = (np.arctanh(np.clip(x, -limit, limit)) for x in (whole[i, j], each[:, i, j]))
        found = mean_with_left_out(np.array([middle]), left_out[:, None], queries.tolist())
        return {**value, "low": finite(np.tanh(found.low[0])), "high": finite(np.tanh(found.high[0]))}

    return [[of(i, j) for j in range(len(made))] for i in range(len(made))]


def _vectors_without_each(work: Work, shown: Shown, one: Measured, queries: np.ndarray) -> np.ndarray:
    """(query, resid_dim): the vector of the same heads from the other queries' trials."""
    z, vectors = shown.clean.activations.double(), []
    for query in np.unique(queries):
        rest = z[queries != query]
        means = rest.mean(0).float().numpy() if len(rest) else one.means
        vectors.append(build_function_vector(work.model.arch, MeanActivations(means, len(rest)), one.heads).total)
    return np.stack(vectors)


def verdict(document: Mapping[str, Any]) -> str:
    """The numbers of formats.json in words."""
    names, targets = [*document["formats"]], document["targets"]
    if len(names) < 2:
        return "There is no other format of this relation."
    found = [of["value"] for i, row in enumerate(document["cosine"]) for of in row[:i] if of]
    words = f"cosines of {min(found):.2f} to {max(found):.2f}" if found else "no direction"
    if document["cosine_of_random_heads"] is not None:
        words += f" (random heads {document['cosine_of_random_heads']:.2f})"
    common, minus = document["heads_common"], [of for one in targets.values() for of in one["own_minus"].values()]
    changes = {
        side: np.mean([one["at_best_layer"][side]["mean_delta_p"] for one in targets.values()])
        for side in ("own", "others")
    }
    listed = f"{len(common['heads'])} of {document['k']} heads are common to all (by chance {common['mean']:.2g})"
    if common["p_value"] is None:
        listed = "equal scores leave their heads open"
    n_better = sum(of["low"] is not None and of["low"] > 0 for of in minus)
    return (
        f"Vectors of {len(names)} formats ({', '.join(names)}) have {words}, and {listed}. On zero-shot prompts "
        f"of a format its own vector changes P by {changes['own']:+.3f} on average, those of other formats by "
        f"{changes['others']:+.3f}, at the layer that is best for the own one; in {n_better} of {len(minus)} "
        "cases, each taken alone, the interval of what the own one brings more lies above 0."
    )


# --- files ---------------------------------------------------------------------------------------------------------

FORMATS_FILE = File("formats/formats.json", read_json)
FORMAT_VECTORS = File("formats/vectors.safetensors", read_measured)
FORMATS_FIGURE = File("formats/formats.png", Path.stat)
_SO_FAR = File("formats/.vectors_so_far.safetensors", read_measured)

# --- the stage -----------------------------------------------------------------------------------------------------


def _target(work: Work, shown: Shown, names: Sequence[str], vectors: np.ndarray) -> dict[str, Any]:
    """The numbers of every format's vector on one format's zero-shot prompts."""
    prompts, name = shown.zero_shot_prompts, shown.format.name
    effects = work.repeatable(STAGE.name, inject_vectors, work.model, prompts, names, vectors, work.settings.alpha)
    reached = effects.edited.measure("p").reshape(len(prompts), -1, len(names))
    mine = names.index(name)
    best = int(np.nan_to_num(reached[:, :, mine].mean(0), nan=-np.inf).argmax())
    there = reached[:, best]
    minus = {
        other: clustered_mean(there[:, [mine]] - there[:, [i]], prompts.clusters)
        for i, other in enumerate(names)
        if i != mine
    }
    judged = judge_target(effects, prompts, names, name, best)
    return {
        **judged,
        "own_minus": {
            other: {"mean": float(of.mean[0]), "low": finite(of.low[0]), "high": finite(of.high[0])}
            for other, of in minus.items()
        },
    }


def _about(work: Work, shown: Shown, one: Measured) -> dict[str, Any]:
    """Description of one format, and of what the model does with its prompts."""
    form, few_shot, tokens = shown.format, shown.few_shot, work.model.tokens
    first, right = few_shot.questions[0], [question.right_ids for question in few_shot.questions]
    scores = shown.clean.scores
    return {
        **{name: getattr(form, name) for name in ("prompt", "separator", "introduction", "demos")},
        "first_clean_prompt": few_shot.clean_prompts[0],
        "first_zero_shot_as_fed": [tokens.text(token) for token in shown.zero_shot_prompts.ids[0]],
        "first_scored_token": tokens.text(first.target.token_id),
        "n_answers_tokenised_alone": sum(not question.target.joint for question in few_shot.questions),
        "n_space_fed": sum(bool(question.target.space_ids) for question in few_shot.questions),
        "clean": {"acc": float(scores.correct(right).mean()), "mean_p": float(scores.measure("p").mean())},
        "norm": float(np.linalg.norm(one.vector.astype(np.float64))),
        "heads": [[head.layer, head.head] for head in one.heads],
    }


def _compare(work: Work) -> str:
    settings, kept = work.settings, Kept(work, FORMAT_VECTORS, _SO_FAR)
    forms, left_out = formats_of(settings.formats, work.q_id, work.relation.name if work.relation else "")
    all_shown = [shown_in(work, form) for form in forms]
    made = [kept.take(one.format.name, lambda one=one: _measure(work, one)) for one in all_shown]
    names, vectors = [form.name for form in forms], np.stack([one.vector for one in made])
    shared, common = shared_heads([one.heads for one in made]), set.intersection(*({*one.heads} for one in made))
    n_heads, k, several = len(made[0].scores), settings.topk, len(made) > 1
    decided = all(top_k_is_decided(one.scores, k) for one in made)
    alike = by_chance(shared, k, n_heads) if several else None
    chance = common_by_chance(len(common), len(made), k, n_heads)
    document: dict[str, Any] = {
        "q_id": work.q_id,
        "verdict": "",
        "meaning": MEANING,
        **{name: getattr(settings, name) for name in ("alpha", "score_key")},
        "k": k,
        "n_heads": n_heads,
        "precision": work.model.precision,
        "ci_level": LEVEL,
        "formats": {one.format.name: _about(work, one, its) for one, its in zip(all_shown, made, strict=True)},
        "left_out": left_out,
        "cosine": cosines_with_left_out(work, all_shown, made),
        "cosine_of_random_heads": cosine_of_random_heads(work, made),
        "spearman": [[finite(value) for value in row] for row in rank_correlations(np.stack([o.scores for o in made]))],
        "heads_shared": shared.astype(int).tolist(),
        "heads_by_chance": alike and {"mean": alike[0], "p_value": alike[1] if decided else None},
        "heads_common": {
            "heads": [[head.layer, head.head] for head in sorted(common)],
            "mean": chance[0],
            "p_value": chance[1] if decided else None,
        },
        "targets": {one.format.name: _target(work, one, names, vectors) for one in all_shown} if several else {},
    }
    document["verdict"] = verdict(document)
    work.write(FORMATS_FILE, json_bytes(document), content=document)
    work.write(FORMATS_FIGURE, drawn(document, called(work.q_id, work.name)).to_bytes())
    kept.finish()
    return first_sentence(document["verdict"])


def _measure(work: Work, shown: Shown) -> Measured:
    return own(work) if shown.format is SPEC_FORMAT else measure(work, shown.clean, shown.corrupted_prompts)


def drawn(document: Mapping[str, Any], title: str) -> Canvas:
    """The matrix: change in P of each format's zero-shot prompts with each format's vector."""
    from relfv.figures.images import cross

    names, targets = [*document["formats"]], document["targets"]
    delta_p, layers = np.full((len(names), len(names)), np.nan), [None] * len(names)
    for i, one in enumerate(targets.values()):
        layers[i] = one["best_layer"]
        delta_p[i] = [one["per_layer"][str(one["best_layer"])][source]["mean_delta_p"] for source in names]
    return cross(names, layers, delta_p, title=f"{title}: vectors across prompt formats (own framed, best dotted)")


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    path, document = folder.path(FORMATS_FILE), folder.read(FORMATS_FILE)
    vectors, _ = folder.read(FORMAT_VECTORS)
    asked = [name for name in names_of(status.settings.formats, status.q_id) if name not in document["left_out"]]
    same = [*document["formats"]] == asked == [*vectors]
    yield Check(path, "the formats of qid_status.json", same)
    spec = vectors[SPEC_FORMAT.name]
    same = np.array_equal(spec.vector, folder.read(FV)) and [*spec.heads] == heads_of(folder.read(TOP_HEADS))
    yield Check(folder.path(FORMAT_VECTORS), "the q_id's own heads and vector as those of spec", same)
    there = np.array([[of["value"] if of else np.nan for of in row] for row in document["cosine"]])
    same = np.allclose(there, cosines(np.stack([one.vector for one in vectors.values()])), atol=1e-6, equal_nan=True)
    yield Check(path, "the cosines of vectors.safetensors", same)


STAGE = Stage(
    "formats",
    "Other prompt formats: whose heads, and whose vector works on whose prompts? (--formats)",
    _compare,
    reads=(TRIALS, MEANS, METRICS, TOP_HEADS, FV, ZERO_SHOT_TRIALS),
    writes=(FORMATS_FILE, FORMAT_VECTORS, FORMATS_FIGURE),
    settings=(*TRIALS_STAGE.settings, "n_eval", "allow_query_duplicates"),
    agrees=_agrees,
    asked=lambda settings: settings.formats,
    prompts=lambda settings: settings.n_trials_per_q,  # of each format
)
