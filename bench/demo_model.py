"""The demo model (or any other) against the aims it was made for, on relfv's own engine.

    python bench/demo_model.py                    # the shipped model, on trials that the recipe was not chosen on
    python bench/demo_model.py --model my_demo --seed 7

Per relation: accuracy and P on clean, corrupted and zero-shot prompts; the best head; the share of the top five heads
in the positive CIE; and what happens to zero-shot prompts, at each layer, with the function vector, with that of 20
random heads (all heads drawn from), and with that of another relation that shares the inputs.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relfv.engine.clean import run_clean
from relfv.language_model import LanguageModel, open_model
from relfv.relations import load_relations
from relfv.settings import SPEC_CSV
from relfv.stages.cie import head_effects
from relfv.stages.function_vector import build_function_vector
from relfv.stages.means import mean_activations
from relfv.stages.prompts import AnswerTokens, prompts_to_read, zero_shot_prompt
from relfv.stages.scores import rank_heads, score_heads
from relfv.stages.trials import ineligible_reason, sample_trials
from relfv.types import HeadId, MeanActivations, PromptedTrial, Prompts, Relation

K, N_DRAWS = 20, 5


@dataclass(frozen=True)
class Measured:
    """One relation's trials, and what StepD and StepE make of them."""

    prompted: list[PromptedTrial]
    means: MeanActivations
    fv: np.ndarray
    best_head: float
    top5_share: float


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--relation_csv_path", type=Path, default=SPEC_CSV)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    model = open_model(args.model, "auto")
    relations = {q: r for q, r in load_relations(args.relation_csv_path).items() if ineligible_reason(r, 9) is None}
    measured = {q_id: measure(model, relation, args.seed) for q_id, relation in relations.items()}
    rows = {q_id: evaluate(model, q_id, relations, measured) for q_id in relations}
    names = list(next(iter(rows.values())))
    print("| q_id | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for q_id, row in rows.items():
        print(f"| {q_id} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |")
    print("| mean | " + " | ".join(f"{np.mean([row[name] for row in rows.values()]):.2f}" for name in names) + " |")


def measure(model: LanguageModel, relation: Relation, seed: int) -> Measured:
    """StepD and StepE of one relation, in memory."""
    trials = sample_trials(relation, seed=seed, n_trials=25, n_demos=9)
    answers = AnswerTokens(relation, model.tokens)
    prompted = [answers.prompted(trial) for trial in trials]
    means = mean_activations(
        run_clean(model.backbone, asked(model, prompted, [item.clean_prompt for item in prompted]))
    )
    corrupted = asked(model, prompted, [item.corrupted_prompt for item in prompted])
    effects = head_effects(model, corrupted, means, all_heads(model))
    ranked = rank_heads(score_heads(effects, means, corrupted.clusters), "mean_delta_p")
    scores = [head.scores["mean_delta_p"] for head in ranked]
    positive = sum(score for score in scores if score > 0)
    fv = build_function_vector(model.arch, means, [head.id for head in ranked[:K]]).total
    return Measured(prompted, means, fv, scores[0], sum(scores[:5]) / positive)


def asked(model: LanguageModel, prompted: list[PromptedTrial], texts: list[str]) -> Prompts:
    """The ``texts`` of some trials with their targets and queries."""
    rows = [item.trial.query_source_index for item in prompted]
    return prompts_to_read(texts, [item.target for item in prompted], model.tokens, rows)


def evaluate(
    model: LanguageModel, q_id: str, relations: dict[str, Relation], measured: dict[str, Measured]
) -> dict[str, float]:
    """One row of the table."""
    own = measured[q_id]
    row: dict[str, float] = {}
    for name, prompts in (
        ("clean", [item.clean_prompt for item in own.prompted]),
        ("shuffled", [item.corrupted_prompt for item in own.prompted]),
        ("zero-shot", [zero_shot_prompt(item.trial.query.input) for item in own.prompted]),
    ):
        every = asked(model, own.prompted, prompts)
        scores = run_clean(model.backbone, every).scores
        row[f"{name} acc"] = float(scores.correct(every.right).mean())
        row[f"{name} P"] = float(scores.p.mean())
    row |= {"best head": own.best_head, "top 5": own.top5_share}

    rng = random.Random(f"random heads:{q_id}")
    draws = [
        build_function_vector(model.arch, own.means, rng.sample(all_heads(model), K)).total for _ in range(N_DRAWS)
    ]
    inputs = {pair.input for pair in relations[q_id].pairs}
    others = [
        measured[other].fv
        for other, relation in relations.items()
        if other != q_id and len(inputs & {pair.input for pair in relation.pairs}) >= 5
    ]
    vectors = np.stack([own.fv, *draws, *others])
    distinct = list({item.trial.query: item for item in own.prompted}.values())
    zero_shot = asked(model, distinct, [zero_shot_prompt(item.trial.query.input) for item in distinct])
    n_layers = model.arch.n_layers
    edited = model.engine.inject(zero_shot, vectors, list(range(n_layers))).edited
    p, acc = (
        values.reshape(len(distinct), n_layers, -1).mean(0)
        for values in (edited.measure("p"), edited.correct(zero_shot.right))
    )
    best = int(p[:, 0].argmax())
    groups = {"FV best": (best, [0]), "FV last": (n_layers - 1, [0]), "random": (best, list(range(1, 1 + N_DRAWS)))}
    if others:
        groups["other FV"] = (best, list(range(1 + N_DRAWS, len(vectors))))
    row["best layer"] = best
    for name, (layer, columns) in groups.items():
        row[f"{name} acc"] = float(acc[layer, columns].mean())
        row[f"{name} P"] = float(p[layer, columns].mean())
    return row


def all_heads(model: LanguageModel) -> list[HeadId]:
    """Every head, by layer."""
    return [HeadId(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]


if __name__ == "__main__":
    main()
