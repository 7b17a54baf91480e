"""Several independent draws of a relation's trials (draws.py), on request, to see whether the trials are enough: how
alike heads, scores and vectors are, and how that grows with the number of trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from relfv.stages.agreement import agreement, cosines, shared_heads
from relfv.stages.cie import METRICS
from relfv.stages.draws import all_draws, draw_name, draw_seeds, prompts_swept, snapshot_of_draw
from relfv.stages.function_vector import FV, TOP_HEADS, heads_of
from relfv.stages.judging import by_layer
from relfv.stages.means import MEANS
from relfv.stages.measured import Kept, Measured, cosine_of_random_heads, read_measured
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import STAGE as TRIALS_STAGE
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated_prompts
from relfv.stats import LEVEL
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import Snapshot
from relfv.words import ci, first_sentence

MEANING = {
    "draws": "draw i has the trials of --seed seed + i; draw 0 is this run's own",
    "ladder": "n_trials: of one draw its first, all, or two draws together (0 and 1, 2 and 3, ...), each with a clean "
    "mean and a head sweep of its own. Means over all pairs of n_draws draws; low and high at ci_level by a jackknife "
    "that leaves out one draw with all its pairs; null with fewer than 3 draws",
    "heads_by_chance": "mean: of the top k that two random lists share (hypergeometric). p_value: that all lists are "
    "random, twice the mean over pairs, which holds however they depend on each other; null, as heads_shared, where "
    "equal scores leave a list open",
    "cosine_of_random_heads": "mean cosine between vectors that are made of k random heads in the same way: what a "
    "cosine is to be held against",
    "curve": "each draw's vector on the same zero-shot prompts, those of this run: they are queries of draw 0",
    "samples": "draws are of the same rows and share queries: they say what other trials of these rows would give, "
    "not what other rows would. queries_shared: mean over pairs, of the distinct queries of either",
}


def ladder(draws: Mapping[int, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Agreement of the draws (agreement.py) for each number of trials, ascending, that has two draws or more."""
    return [
        {
            "n_trials": n_trials,
            "n_draws": len(some),
            **agreement(
                np.stack([one.vector for one in some]),
                [one.heads for one in some],
                np.stack([one.scores for one in some]),
            ),
        }
        for n_trials, some in sorted(draws.items())
        if len(some) > 1
    ]


def verdict(document: Mapping[str, Any]) -> str:
    """The numbers of replicates.json in words."""
    n_trials, k, rungs = document["n_trials"], document["k"], document["ladder"]
    at = next(rung for rung in rungs if rung["n_trials"] == n_trials)
    words = f"Another draw of {n_trials} trials gives {_alike(at, k, interval=True)}"
    random_heads, n = document["cosine_of_random_heads"], at["heads_by_chance"]["mean"]
    words += f"; random heads cosine {_short(random_heads)} and {n:.1f}" if random_heads is not None else ""
    others = [f"{rung['n_trials']} trials {_alike(rung, k)}" for rung in rungs if rung is not at]
    words += f"; with {', with '.join(others)}" if others else ""
    curve, n_rows = document["curve"], document["samples"]["n_rows"]
    p = [value for value in curve["at_best_layer"]["mean_p"] if value is not None]  # None: the vector overflows
    spread = f"{min(p):.3f} to {max(p):.3f}" if p else "not finite"
    return (
        f"{words} ({document['n_draws']} draws). At layer {curve['best_layer']} P with the draws' vectors is {spread} "
        f"({curve['zero_shot']['mean_p']:.3f} without). All draws are of the same {n_rows} rows: of other words this "
        "says nothing."
    )


def _alike(rung: Mapping[str, Any], k: int, *, interval: bool = False) -> str:
    """Words such as "the same vector to cosine 0.97 (95% CI 0.95 to 0.99) and 16.2 of 20 heads"."""
    cosine, shared = rung["cosine"], rung["heads_shared"]
    words = f"{'the same vector to ' * interval}cosine {_short(cosine['mean'])}" if cosine else "a vector of zeros"
    if interval and cosine and cosine["low"] is not None:
        words += f" ({ci(cosine['low'], cosine['high'], _short)})"
    return f"{words} and " + (f"{shared['mean']:.1f} of {k} heads" if shared else "heads that equal scores leave open")


def _short(cosine: float) -> str:
    """The cosine with two decimals, or with four from 0.995."""
    return f"{cosine:.2f}" if cosine < 0.995 else f"{cosine:.4f}"


# --- files ---------------------------------------------------------------------------------------------------------

REPLICATES = File("replicates/replicates.json", read_json)
DRAWS = File("replicates/draws.safetensors", read_measured)
_SO_FAR = File("replicates/.draws_so_far.safetensors", read_measured)
# --- the stage -----------------------------------------------------------------------------------------------------


def _replicate(work: Work) -> str:
    settings, kept = work.settings, Kept(work, DRAWS, _SO_FAR)
    draws = all_draws(work, kept)
    full = draws[settings.n_trials_per_q]
    snapshots = [snapshot_of_draw(work, number) for number in range(settings.replicates)]
    assert work.relation
    document: dict[str, Any] = {
        "q_id": work.q_id,
        "verdict": "",
        "meaning": MEANING,
        "n_draws": settings.replicates,
        "n_trials": settings.n_trials_per_q,
        "k": settings.topk,
        "score_key": settings.score_key,
        "n_heads": len(full[0].scores),
        "precision": work.model.precision,
        "ci_level": LEVEL,
        "samples": {"n_rows": len(work.relation.pairs), "queries_shared": _queries_shared(snapshots)},
        "ladder": ladder(draws),
        "cosine_of_random_heads": cosine_of_random_heads(work, full),
        "cosine": [[finite(value) for value in row] for row in cosines(np.stack([one.vector for one in full]))],
        "heads_shared": shared_heads([one.heads for one in full]).astype(int).tolist(),
        "curve": _curve(work, full),
        "draws": [
            {
                "seed": seed,
                "n_queries": len(set(snapshot.clusters)),
                "norm": float(np.linalg.norm(one.vector.astype(np.float64))),
                "heads": [[head.layer, head.head] for head in one.heads],
            }
            for seed, snapshot, one in zip(draw_seeds(settings), snapshots, full, strict=True)
        ],
    }
    document["verdict"] = verdict(document)
    work.write(REPLICATES, json_bytes(document), content=document)
    kept.finish()
    return first_sentence(document["verdict"])


def _queries_shared(snapshots: Sequence[Snapshot]) -> float:
    queries = [{question.query.input for question in snapshot.questions} for snapshot in snapshots]
    pairs = [(one, other) for i, one in enumerate(queries) for other in queries[:i]]
    return float(np.mean([len(one & other) / len(one | other) for one, other in pairs]))


def _curve(work: Work, draws: Sequence[Measured]) -> dict[str, Any]:
    """Every draw's vector, added at every layer to the same zero-shot prompts."""
    prompts, best = work.once(evaluated_prompts), work.read(STEP6_SUMMARY)["best_layer"]
    vectors = np.float32(work.settings.alpha) * np.stack([one.vector for one in draws])
    names, model = [str(number) for number in range(len(draws))], work.model
    effects = work.repeatable(STAGE.name, model.engine.inject, prompts, vectors, range(model.arch.n_layers))
    of_draws = {
        "mean_p": by_layer(effects.edited.measure("p"), names).mean(0),
        "acc": by_layer(effects.edited.correct(prompts.right), names).mean(0),
    }
    per_layer = [
        {name: [finite(value) for value in values[layer]] for name, values in of_draws.items()}
        for layer in range(model.arch.n_layers)
    ]
    base = effects.base
    return {
        "n_eval": len(prompts),
        "zero_shot": {"acc": float(base.correct(prompts.right).mean()), "mean_p": float(base.measure("p").mean())},
        "best_layer": best,
        "at_best_layer": per_layer[best],
        "best_layer_of_draws": np.nan_to_num(of_draws["mean_p"]).argmax(0).tolist(),
        "per_layer": {str(layer): numbers for layer, numbers in enumerate(per_layer)},
    }


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    path, document, settings = folder.path(REPLICATES), folder.read(REPLICATES), status.settings
    same = [one["seed"] for one in document["draws"]] == draw_seeds(settings)
    yield Check(path, "the draws of qid_status.json", same)
    draws, _ = folder.read(DRAWS)
    full = [draws[draw_name(settings.n_trials_per_q, i)] for i in range(settings.replicates)]
    own = np.array_equal(full[0].vector, folder.read(FV)) and [*full[0].heads] == heads_of(folder.read(TOP_HEADS))
    yield Check(folder.path(DRAWS), "the q_id's own heads and vector as draw 0", own)
    there = np.array(document["cosine"], dtype=np.float64)
    same = np.allclose(there, cosines(np.stack([one.vector for one in full])), atol=1e-6, equal_nan=True)
    yield Check(path, "the cosines of draws.safetensors", same)


STAGE = Stage(
    "replicates",
    "Other draws of trials: how alike are their heads and vectors, with how many trials? (--replicates)",
    _replicate,
    reads=(TRIALS, MEANS, METRICS, TOP_HEADS, FV, ZERO_SHOT_TRIALS, STEP6_SUMMARY),
    writes=(REPLICATES, DRAWS),
    settings=TRIALS_STAGE.settings,
    agrees=_agrees,
    asked=lambda settings: settings.replicates,
    prompts=prompts_swept,
)
