"""The vector on rows that no trial has as its query (``--extras new_queries``): more prompts, of words that had no part
in the choice of heads and layer, each with a clean prompt of its own to be held against."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np

from relfv.settings import MODEL_SETTINGS, Settings
from relfv.shares import Gap
from relfv.stages.function_vector import FV
from relfv.stages.injection import Injections, inject_at_every_layer
from relfv.stages.judging import judge_vectors
from relfv.stages.prompts import AnswerTokens, zero_shot_prompt
from relfv.stages.stage import Stage, Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import TRIALS, trial_of
from relfv.store.folder import File
from relfv.store.formats import json_bytes, read_json
from relfv.types import PromptedTrial, Prompts, Question, Relation, Snapshot, TokenScores, Trial
from relfv.words import ci, first_sentence, percent

MEANING = {
    "queries": "one prompt for each input of the relation that no frozen trial asks, n_eval of them at most; as demos "
    "of the frozen trials these rows were seen, so that the vector's means are not blind to their answers",
    "layer": "the best of step6_all_layers_summary.json: chosen on other queries, so that nothing here is the best of "
    "several on the same prompts",
    "p_clean": "of the same query after demos drawn anew, as for a trial",
    "share_of_gap": "as in summary.json, at that one layer",
}


def trials_of_new_queries(relation: Relation, settings: Settings, asked: Collection[str]) -> list[Trial]:
    """A trial for the first row of each input that is not among those ``asked``, in the CSV's order; of more than
    ``n_eval`` such rows so many at random. Rows, demos and labels are drawn by a random generator of their own,
    whatever the frozen trials drew."""
    rng = random.Random(f"relfv:new_queries:{settings.seed}:{relation.q_id}")
    first_rows = {pair.input: row for row, pair in reversed(list(enumerate(relation.pairs)))}
    rows = sorted(row for word, row in first_rows.items() if word not in asked)
    rows = sorted(rng.sample(rows, min(settings.n_eval, len(rows))))
    corruption: Any = settings.corruption
    return [trial_of(relation, rng, i, row, settings.n_demos, corruption) for i, row in enumerate(rows)]


def as_snapshot(prompted: list[PromptedTrial]) -> Snapshot:
    """The snapshot of some trials, with their zero-shot and clean prompts."""
    questions = [
        Question(
            one.trial.q_id, f"{one.trial.q_id}-new-{one.trial.trial_idx:03d}", one.trial.trial_idx, one.trial.query,
            one.trial.query_source_index, one.trial.query.output, one.target, one.accepted,
        )
        for one in prompted
    ]  # fmt: skip
    return Snapshot(
        {},
        tuple(questions),
        tuple(zero_shot_prompt(question.query.input) for question in questions),
        tuple(one.clean_prompt for one in prompted),
        tuple(one.trial.query_source_index for one in prompted),
    )


def numbers_of(prompts: Prompts, injections: Injections, clean: TokenScores, layer: int) -> dict[str, Any]:
    """Numbers from the vector at every layer of the zero-shot ``prompts`` and the scores of their ``clean`` ones,
    (prompt,)."""
    effects = injections.effects
    zero, p_clean = effects.base.measure("p"), clean.measure("p")
    reached = injections.at_layer(layer).edited[:, 0]
    share = Gap(zero, p_clean, prompts.clusters).share((reached.measure("p") - zero)[:, None], 0)
    judged = judge_vectors(effects, prompts, ["fv"])
    return {
        "ci_level": judged["ci_level"],
        "p": {
            "zero_shot": float(zero.mean()),
            "fv": float(reached.measure("p").mean()),
            "clean": float(p_clean.mean()),
        },
        "acc": {
            "zero_shot": float(effects.base.correct(prompts.right).mean()),
            "fv": float(reached.correct(prompts.right).mean()),
            "clean": float(clean.correct(prompts.right).mean()),
        },
        "share_of_gap": share and vars(share),
        "per_layer": {at: row["fv"] for at, row in judged["per_layer"].items()},
    }


def verdict_of(numbers: dict[str, Any], n: int, layer: int) -> str:
    """The verdict on the new queries, in a sentence or two."""
    p, acc, share = numbers["p"], numbers["acc"], numbers["share_of_gap"]
    said = (
        f"On {n} quer{'y' if n == 1 else 'ies'} that no trial asks, at layer {layer}, chosen on others: P "
        f"{p['zero_shot']:.2f} without the vector, {p['fv']:.2f} with it and {p['clean']:.2f} with demos (accuracy "
        f"{acc['zero_shot']:.2f}, {acc['fv']:.2f} and {acc['clean']:.2f})"
    )
    if not share:
        return f"{said}; the gap is too small or too uncertain to say what share of it is closed."
    shown = "" if share["low"] > 0 else ", so that it closes any of it is not shown"
    ends = ci(share["low"], share["high"], percent)
    return f"{said}; it closes {percent(share['value'])} of the gap ({ends}){shown}."


# --- files ---------------------------------------------------------------------------------------------------------

NEW_QUERIES = File("step6/new_queries.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _ask(work: Work) -> str:
    relation, model, settings = work.relation, work.model, work.settings
    assert relation is not None  # relfv run gives it, and nothing else runs this stage
    asked = {question.query.input for question in work.read(TRIALS).questions}
    answers = AnswerTokens(relation, model.tokens, settings.target)
    snapshot = as_snapshot([answers.prompted(trial) for trial in trials_of_new_queries(relation, settings, asked)])
    n, layer = len(snapshot.questions), work.read(STEP6_SUMMARY)["best_layer"]
    document: dict[str, Any] = {"q_id": work.q_id, "verdict": "", "meaning": MEANING, "layer": layer, "n_queries": n}
    if n:
        document |= _measured(work, snapshot, layer)
        document["verdict"] = verdict_of(document, n, layer)
    else:
        document["verdict"] = "The trials ask every row of the relation: none is left to try the vector on."
    work.write(NEW_QUERIES, json_bytes(document), content=document)
    return first_sentence(document["verdict"])


def _measured(work: Work, snapshot: Snapshot, layer: int) -> dict[str, Any]:
    from relfv.engine.clean import run_clean

    model, alpha, vector = work.model, work.settings.alpha, work.read(FV)
    prompts = work.tokenised(snapshot)
    injections = work.repeatable(STAGE.name, inject_at_every_layer, model, prompts, vector, alpha)
    clean = run_clean(model.backbone, work.tokenised(snapshot, clean=True)).scores
    base, reached = injections.effects.base, injections.at_layer(layer).edited[:, 0]
    columns: dict[str, np.ndarray] = {}
    for name, scores in (("zero_shot", base), ("fv", reached), ("clean", clean)):
        columns |= {f"p_{name}": scores.measure("p"), f"right_{name}": scores.correct(prompts.right).astype(int)}
    return {
        "alpha": alpha,
        "precision": model.precision,
        **numbers_of(prompts, injections, clean, layer),
        "queries": [
            {
                "query": question.query.input,
                "answer": question.answer,
                "query_source_index": question.query_source_index,
                **{name: values[i].item() for name, values in columns.items()},
            }
            for i, question in enumerate(snapshot.questions)
        ],
    }


STAGE = Stage(
    "new_queries",
    "The vector on rows that no trial asks.",
    _ask,
    reads=(TRIALS, FV, STEP6_SUMMARY),
    writes=(NEW_QUERIES,),
    settings=(*MODEL_SETTINGS, "alpha", "n_eval", "seed", "n_demos", "corruption", "target"),
    asked=lambda settings: "new_queries" in settings.studies,
)
