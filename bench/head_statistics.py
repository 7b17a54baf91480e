"""Whether the per-head statistics of StepD hold on the demo model: false alarms where labels carry no relation, and how
often the interval of a real effect covers it. Feeds docs/statistics.md.

    python bench/head_statistics.py null                          # 40 relations without a relation, of each kind
    python bench/head_statistics.py coverage --q_id Q4            # 60 runs on the same 25 rows
    python bench/head_statistics.py coverage --q_id Q4 --rows 12  # 60 runs, each on 12 of them

Null relations. ``scrambled``: inputs and outputs drawn from the whole CSV, none a true pair; the model gives such
answers no probability. ``mixed``: for each input the right answer under a relation drawn at random among those that
share the input; each answer is plausible (P about 0.3), and the labels say nothing about which relation is meant.

Coverage. The truth is a head's mean effect over endless trials of all the relation's rows, patched with the clean mean
of endless trials; --truth trials stand for endless. Runs patch with ``own`` clean mean, as StepD does, and with the
``true`` one, which no real run has: the difference is what the interval does not know of. ``--leave_out`` adds the
interval that leaves out a query's trials from the clean mean too, as top_heads.json has it of its heads, here of all
(ten times slower).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from relfv.engine.clean import run_clean
from relfv.language_model import LanguageModel, open_model
from relfv.relations import load_relations
from relfv.settings import SPEC_CSV
from relfv.stages.cie import head_effects
from relfv.stages.leave_query_out import with_error_of_means
from relfv.stages.prompts import AnswerTokens, prompts_to_read
from relfv.stages.trials import sample_trials
from relfv.stats import FDR, LEVEL, clustered_mean, false_discovery, sign_flip_p_values
from relfv.types import HeadId, MeanActivations, Prompts, Relation, WordPair

LARGE = 0.01
"""Mean delta_p from which a head counts as one with an effect."""


@dataclass(frozen=True)
class Trials:
    """The frozen trials of one StepD, read once."""

    prompts: Prompts
    """The corrupted ones."""
    z: torch.Tensor
    """float32 (trial, layer, head, head_dim): clean activations."""

    def mean(self) -> np.ndarray:
        """float32 (layer, head, head_dim)"""
        return self.z.double().mean(0).float().numpy()


@dataclass(frozen=True)
class Estimate:
    """Of every head, in one run; arrays are (head,)."""

    mean: np.ndarray
    se: np.ndarray
    df: float
    p_value: np.ndarray

    @property
    def half(self) -> np.ndarray:
        """Of the interval."""
        return stats.t.ppf(0.5 + LEVEL / 2, self.df) * self.se

    @property
    def called(self) -> np.ndarray:
        """bool (head,)"""
        return false_discovery(self.p_value) <= FDR


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    kinds = parser.add_subparsers(dest="kind", required=True)
    null = kinds.add_parser("null")
    null.add_argument("--relations", type=int, default=40)
    null.add_argument("--rows", type=int, default=12)
    coverage = kinds.add_parser("coverage")
    coverage.add_argument("--q_id", default="Q4")
    coverage.add_argument("--runs", type=int, default=60)
    coverage.add_argument("--rows", type=int, default=0, help="each run draws so many of the rows; 0: all of them")
    coverage.add_argument("--truth", type=int, default=1000)
    coverage.add_argument("--leave_out", action="store_true")
    args = parser.parse_args()
    model = open_model(args.model, "auto")
    relations = load_relations(SPEC_CSV)
    if args.kind == "null":
        for line in null_table(model, relations, args.relations, args.rows):
            print(line, flush=True)
    else:
        print(coverage_table(model, relations[args.q_id], args))


def null_table(model: LanguageModel, relations: dict[str, Relation], n: int, rows: int) -> Iterator[str]:
    """A row for each kind of null relation, with what taking trials for independent would give beside it."""
    yield "| labels | relations | P | heads with p < 0.05 | relation by relation | called | in relations | trials as independent: p < 0.05, called |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|---|"
    for kind, make in (("scrambled", scrambled), ("mixed", mixed)):
        shares, called, naive_shares, naive_called, p, n_heads = [], [], [], [], [], 0
        for i in range(n):
            trials = read(model, make(relations, rows, random.Random(f"{kind}:{i}")), seed=0)
            deltas, base = effects(model, trials, trials.mean())
            p.append(base.mean())
            n_heads += deltas.shape[1]
            for clusters, share, calls in (
                (trials.prompts.clusters, shares, called),
                (list(range(len(deltas))), naive_shares, naive_called),
            ):
                p_values = sign_flip_p_values(deltas, clusters)
                share.append((p_values < 0.05).mean())
                calls.append(int((false_discovery(p_values) <= FDR).sum()))
        yield (
            f"| {kind} | {n} of {rows} rows | {np.mean(p):.2g} | {np.mean(shares):.2%} (se "
            f"{np.std(shares, ddof=1) / n**0.5:.2%}) | {min(shares):.1%} to {max(shares):.1%}, sd "
            f"{np.std(shares, ddof=1):.1%} | {sum(called)} of {n_heads} "
            f"| {np.count_nonzero(called)} | {np.mean(naive_shares):.1%}, {sum(naive_called)} in "
            f"{np.count_nonzero(naive_called)} |"
        )


def coverage_table(model: LanguageModel, relation: Relation, args: argparse.Namespace) -> str:
    """How often the interval covers the truth, by size of the true effect."""
    endless = read(model, relation, seed=10_000, n_trials=args.truth)
    true_mean = endless.mean()
    truth = effects(model, endless, true_mean)[0].mean(0)
    found: dict[str, list[Estimate]] = {}
    n_queries = []
    for seed in range(args.runs):
        rng = random.Random(f"rows:{seed}")
        pairs = tuple(rng.sample(relation.pairs, args.rows)) if args.rows else relation.pairs
        trials = read(model, Relation(relation.q_id, pairs), seed=seed)
        n_queries.append(len(set(trials.prompts.clusters)))
        for name, mean in (("own", trials.mean()), ("true", true_mean)):
            deltas = effects(model, trials, mean)[0]
            clusters = trials.prompts.clusters
            now, p_value = clustered_mean(deltas, clusters), sign_flip_p_values(deltas, clusters)
            found.setdefault(name, []).append(Estimate(now.mean, now.se, now.df, p_value))
            if name == "own" and args.leave_out:
                left_out, _ = with_error_of_means(model, trials.prompts, trials.z, all_heads(model), deltas)
                found.setdefault("own, left out too", []).append(Estimate(now.mean, left_out.se, left_out.df, p_value))
    lines = [
        f"{relation.q_id}: {args.runs} runs of {args.rows or len(relation.pairs)} of {len(relation.pairs)} rows, "
        f"{np.mean(n_queries):.1f} distinct queries; truth from {args.truth} trials",
        "",
        "| clean mean | true effect | heads | covered | worst head | truth above / below it | mean se / sd of the "
        "estimates | called a run | of the wrong sign |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        mean, se = np.stack([run.mean for run in runs]), np.stack([run.se for run in runs])
        half = np.stack([run.half for run in runs])
        called = np.stack([run.called for run in runs])
        above, below = truth > mean + half, truth < mean - half
        covered = ~(above | below)
        wrong = called & (np.sign(mean) != np.sign(truth))
        ratio = se.mean(0) / mean.std(0, ddof=1)
        for words, group in ((f"at least {LARGE}", np.abs(truth) >= LARGE), ("smaller", np.abs(truth) < LARGE)):
            lines.append(
                f"| {name} | {words} | {group.sum()} | {covered[:, group].mean():.1%} | "
                f"{covered[:, group].mean(0).min():.0%} | {above[:, group].mean():.1%} / "
                f"{below[:, group].mean():.1%} | {np.median(ratio[group]):.2f} "
                f"| {called[:, group].sum(1).mean():.1f} | "
                f"{wrong[:, group].sum() / max(1, called[:, group].sum()):.1%} |"
            )
    return "\n".join(lines)


def scrambled(relations: dict[str, Relation], rows: int, rng: random.Random) -> Relation:
    """Inputs and outputs of the whole CSV, none of them a true pair."""
    true = {pair for relation in relations.values() for pair in relation.pairs}
    inputs, outputs = sorted({pair.input for pair in true}), sorted({pair.output for pair in true})
    while True:
        drawn = zip(rng.sample(inputs, rows), rng.sample(outputs, rows), strict=True)
        pairs = tuple(WordPair(*words) for words in drawn)
        if not true.intersection(pairs):
            return Relation("scrambled", pairs)


def mixed(relations: dict[str, Relation], rows: int, rng: random.Random) -> Relation:
    """Inputs of one relation, each with its answer under a relation drawn among those that have this input."""
    answers: dict[str, list[str]] = {}
    for relation in relations.values():
        for pair in relation.pairs:
            answers.setdefault(pair.input, []).append(pair.output)
    wide = {q: [pair.input for pair in r.pairs if len(answers[pair.input]) > 2] for q, r in relations.items()}
    inputs = wide[rng.choice([q for q, shared in wide.items() if len(shared) >= rows])]
    return Relation("mixed", tuple(WordPair(word, rng.choice(answers[word])) for word in rng.sample(inputs, rows)))


def read(model: LanguageModel, relation: Relation, *, seed: int, n_trials: int = 25) -> Trials:
    """Sample trials at the spec's settings and run their clean prompts."""
    trials = sample_trials(relation, seed=seed, n_trials=n_trials, n_demos=9)
    answers = AnswerTokens(relation, model.tokens)
    prompted = [answers.prompted(trial) for trial in trials]
    targets, queries = [item.target for item in prompted], [t.query_source_index for t in trials]
    clean, corrupted = (
        prompts_to_read(texts, targets, model.tokens, queries)
        for texts in ([item.clean_prompt for item in prompted], [item.corrupted_prompt for item in prompted])
    )
    return Trials(corrupted, run_clean(model.backbone, clean).activations)


def effects(model: LanguageModel, trials: Trials, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """delta_p (trial, head) of patching every head with ``mean``, and P without a patch (trial,)."""
    means = MeanActivations(mean, len(trials.prompts))
    found = head_effects(model, trials.prompts, means, all_heads(model)).effects
    return found.delta("p"), found.base.measure("p")


def all_heads(model: LanguageModel) -> list[HeadId]:
    """By layer, then head."""
    return [HeadId(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]


if __name__ == "__main__":
    main()
