"""Ablation, on request (``--extras ablation``): heads and directions are taken away from clean prompts, to see whether
what the relation was found in is also needed.

A head may carry a relation that the model would get elsewhere without it, and a vector that is enough need not be used.
So the selected heads are set to what they are on shuffled prompts, to their mean there or over prompts of other
relations, or to zero, and the vector's direction is taken out of the residual stream; beside as many random heads, the
least and the most harmful ones. All of it at the last token, as StepD patches it: what earlier tokens do stays as it is
(docs/statistics.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.settings import MODEL_SETTINGS, Settings
from relfv.shares import Gap
from relfv.stages.ablation_edits import (
    SETS,
    directions,
    directions_taken,
    heads_taken,
    held_out_taken,
    lengths_written,
    mean_length,
    sets_of_heads,
)
from relfv.stages.ablation_words import verdict_of_ablation
from relfv.stages.cie import METRICS, corrupted_prompts
from relfv.stages.controls import ground_of
from relfv.stages.function_vector import FV, TOP_HEADS, heads_of
from relfv.stages.judging import judge_vectors, mean_over_draws
from relfv.stages.means import clean_prompts
from relfv.stages.other_relations import as_recorded, measure_others, trials_of_others
from relfv.stages.scores import CIE, rank_heads
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.summary import SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.verdict import HELD_OUT
from relfv.stats import LEVEL, clustered_mean
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import Effects, HeadId, Prompts, Relation, TokenScores
from relfv.words import first_sentence

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun

SET_TO = {
    "swapped": "what they are on the same trial's shuffled prompt",
    "other_relations": "their mean over prompts of other relations",
    "mean": "their mean over shuffled prompts",
    "zero": "zero",
}
RIVALS = ("random_of_layers", "random_of_norm")
_MEANING = (
    "Clean prompts with something taken away at the last token, each beside the same prompts left alone. swapped: "
    "heads set to what they are on the same trial's shuffled prompt, so that only what the labels bring is taken. "
    "other_relations: set to their mean over clean prompts of the CSV's other relations, which keeps what every task "
    "in this format needs. mean: set to their mean over shuffled prompts. Both means take what they know of the query, "
    "too. zero: to zero. all: the direction taken out of the hidden state after every layer at once (h - (h . d) d); "
    "all_to_mean: set to what it is there on shuffled prompts on average; per_layer: taken out after that layer alone. "
    "Changes are those of P and log-probability of the first answer token, clustered by query. share_of_gap: of the P "
    "that right labels bring, clean minus shuffled, how much is lost."
)


def judge_ablations(effects: Effects, prompts: Prompts, names: Sequence[str], gap: Gap) -> dict[str, dict[str, Any]]:
    """Name -> accuracy, P, their changes with intervals, and the share of the ``gap`` that is lost. ``effects`` is
    (prompt, version), ``names`` has the versions' names; versions of one name are draws, and numbers are means over
    them."""
    numbers = judge_vectors(effects, prompts, names)["per_layer"]["0"]
    base, reached = effects.base.measure("p"), mean_over_draws(effects, names)
    for name, logprob in mean_over_draws(effects, names, "logprob").items():
        change = clustered_mean(logprob - effects.base.measure("logprob")[:, None], prompts.clusters)
        share = gap.share(base[:, None] - reached[name], 0)
        numbers[name] |= {
            "mean_delta_logprob": finite(change.mean[0]),
            "delta_logprob_ci_low": finite(change.low[0]),
            "delta_logprob_ci_high": finite(change.high[0]),
            "share_of_gap": share and vars(share),
        }
    return numbers


def against_random(effects: Effects, names: Sequence[str], clusters: Sequence[int], how: str) -> dict[str, Any]:
    """How much further P falls with the top heads set to one of SET_TO than with random ones, prompt by prompt; and how
    many draws of those make it fall as far. Empty where they are not set to it."""
    reached, found = mean_over_draws(effects, names), {}
    own = reached.get(f"top, {how}")
    if own is None:
        return {}
    for rival in (f"{which}, {how}" for which in RIVALS):
        if rival not in reached:
            continue
        further = clustered_mean(reached[rival] - own, clusters)
        draws = effects.edited.p.numpy()[:, [name == rival for name in names]].mean(0)
        found[rival.removesuffix(f", {how}")] = {
            "falls_further_by": finite(further.mean[0]),
            "ci_low": finite(further.low[0]),
            "ci_high": finite(further.high[0]),
            "n_draws": len(draws),
            "n_draws_as_low": int((draws <= own.mean()).sum()),
        }
    return found


def beside_sufficiency(summary: Mapping[str, Any], heads: Mapping[str, Any], of: Mapping[str, Any]) -> list[Any]:
    """The table: shares of what demos bring that vector and heads make, and of what right labels bring that is lost
    without them. ``heads`` and ``of`` are the numbers of sets of heads and of directions; where they are empty, nothing
    was measured, and what is necessary has no rows."""
    shares, carriers = summary["share_of_gap"], summary["carriers"]

    def carried(name: str) -> Any:
        return carriers.get(name, {}).get("share_of_gap")

    def lost(numbers: Mapping[str, Any], name: str, how: str) -> Any:
        return numbers.get(name, {}).get(how, {}).get("share_of_gap")

    sufficient = [
        (f"vector added at layer {summary['layer']}", *map(shares.get, ("fv", HELD_OUT, "random_heads"))),
        ("heads put in place", *map(carried, ("heads_in_place", "heads_in_place_held_out", "random_heads_in_place"))),
    ]
    necessary = [
        *(
            (f"heads set to {words}", *(lost(heads, name, how) for name in ("top", "top_held_out", "random_of_layers")))
            for how, words in SET_TO.items()
            if how in heads.get("top", ())
        ),
        *(
            (f"vector's direction {words} after every layer", lost(of, "fv", how), None, lost(of, "random_heads", how))
            for how, words in (("all", "taken out"), ("all_to_mean", "set to its mean on shuffled prompts"))
            if of
        ),
    ]
    return [
        {"asks": asks, "what": what, "share_of_gap": share, "held_out": held_out, "random": rival and rival["value"]}
        for asks, rows in (("sufficient", sufficient), ("necessary", necessary))
        for what, share, held_out, rival in rows
    ]


# --- files ---------------------------------------------------------------------------------------------------------

ABLATION = File("stepE/ablation.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def shuffled_run(work: Work) -> CleanRun:
    """The frozen trials' corrupted prompts, run as they are (``work.once(shuffled_run)``)."""
    from relfv.engine.clean import run_clean

    return run_clean(work.model.backbone, work.once(corrupted_prompts))


def _ablate(work: Work) -> str:
    settings, prompts, shuffled = work.settings, work.once(clean_prompts), work.once(shuffled_run)
    ground, ranked = ground_of(work, prompts.clusters), rank_heads(work.read(CIE), settings.score_key)
    cie = {head.id: head.scores["mean_delta_p"] for head in ranked}
    lengths = lengths_written(ground)
    sets, vectors = sets_of_heads(ground, [head.id for head in ranked], cie, lengths), directions(ground)
    others = measure_others(work)
    taken = heads_taken(ground, shuffled, others.means, sets) + held_out_taken(ground, shuffled, others.means)
    taken += directions_taken(vectors, shuffled)
    names = [one.name for one in taken]
    effects = work.repeatable(STAGE.name, work.model.engine.edit_together, prompts, [one.version for one in taken])
    gap = Gap(shuffled.scores.measure("p"), effects.base.measure("p"), prompts.clusters)
    numbers = judge_ablations(effects, prompts, names, gap)
    heads = {name: {**_about(draws, cie, lengths), **_of(name, numbers)} for name, draws in sets.items()}
    if "top_held_out, swapped" in numbers:
        heads["top_held_out"] = _of("top_held_out", numbers)
    found = {name: {"length": float(v.norm(dim=1).mean()), **_of(name, numbers)} for name, v in vectors.items()}
    document = {
        "q_id": work.q_id,
        "verdict": "",
        "meaning": _MEANING,
        "sets": {name: SETS.get(name, f"the {name.removeprefix('top_')} best heads") for name in heads},
        "k": len(ground.selected),
        "n_trials": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "precision": work.model.precision,
        "ci_level": LEVEL,
        "clean": untouched(effects.base, prompts),
        "shuffled": untouched(shuffled.scores, prompts),
        "heads": heads,
        "directions": found,
        "against_random": against_random(effects, names, prompts.clusters, "swapped"),
        "against_random_other_relations": against_random(effects, names, prompts.clusters, "other_relations"),
        "other_relations": others.record,
        "table": beside_sufficiency(work.read(SUMMARY), heads, found),
        "by_prompt": {
            "query_source_index": list(prompts.clusters),
            "p_clean": effects.base.measure("p").tolist(),
            "p_shuffled": shuffled.scores.measure("p").tolist(),
            "p_without": {
                name: [finite(p) for p in of_name[:, 0]] for name, of_name in mean_over_draws(effects, names).items()
            },
        },
    }
    document["verdict"] = verdict_of_ablation(document, work.read(SUMMARY))
    work.write(ABLATION, json_bytes(document), content=document)
    return first_sentence(document["verdict"])


def _about(
    draws: Sequence[Sequence[HeadId]], cie: Mapping[HeadId, float], lengths: Mapping[HeadId, float]
) -> dict[str, Any]:
    """Description of a set of heads: how many, their mean CIE, the mean length of what they write, and, where it is no
    draw, which heads."""
    its = [head for heads in draws for head in heads]
    return {
        "n_heads": len(draws[0]),
        "mean_cie": float(np.mean([cie[head] for head in its])),
        "mean_length_written": mean_length(draws, lengths),
        **({"heads": [vars(head) for head in its]} if len(draws) == 1 else {}),
    }


def _of(name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one set of heads or direction by what was done to it, those of single layers by layer."""
    own = {key.removeprefix(f"{name}, "): value for key, value in numbers.items() if key.startswith(f"{name}, ")}
    per_layer = {how: own.pop(how) for how in [*own] if how.isdecimal()}
    return {**own, **({"per_layer": per_layer} if per_layer else {})}


def untouched(scores: TokenScores, prompts: Prompts) -> dict[str, float]:
    """Accuracy, mean P and mean log-probability of prompts that are left alone."""
    return {
        "acc": float(scores.correct(prompts.right).mean()),
        "mean_p": float(scores.measure("p").mean()),
        "mean_logprob": float(scores.measure("logprob").mean()),
    }


def _agrees(folder: QidFolder, _: QidStatus) -> Iterator[Check]:
    document, path = folder.read(ABLATION), folder.path(ABLATION)
    top = [HeadId(**head) for head in document["heads"]["top"]["heads"]]
    yield Check(path, "the heads of top_heads.json", top == heads_of(folder.read(TOP_HEADS)))
    same = document["by_prompt"]["query_source_index"] == [*folder.read(TRIALS).clusters]
    yield Check(path, "the queries of sampled_trials.json", same)


def _made_for(folder: QidFolder, relation: Relation, settings: Settings) -> bool:
    """Whether the prompts of other relations in ablation.json are those that the CSV gives now."""
    there = folder.read(ABLATION).get("other_relations", {}).get("prompts")
    return there == as_recorded(trials_of_others(relation, settings))


STAGE = Stage(
    "stepE_ablation",
    "Clean prompts without the top heads, random ones, or the vector's direction (--extras ablation).",
    _ablate,
    reads=(TRIALS, METRICS, CIE, FV, TOP_HEADS, SUMMARY),
    writes=(ABLATION,),
    settings=(*MODEL_SETTINGS, "score_key", "seed"),
    agrees=_agrees,
    asked=lambda settings: "ablation" in settings.studies,
    made_for=_made_for,
)
