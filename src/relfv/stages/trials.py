"""Freezing the trials of a q_id: random query, demonstrations that exclude it, corrupted labels.

Every q_id has a random generator of its own, seeded by (seed, q_id), so its trials do not depend on which other
relations are in the file or in the run.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Literal

from relfv.types import Relation, Trial, WordPair

Corruption = Literal["derange", "shuffle"]

_ATTEMPTS = 200


def ineligible_reason(relation: Relation, n_demos: int) -> str | None:
    """Why this relation cannot give a query and ``n_demos`` demos without overlap, or None if it can."""
    n_rows, needed = len(relation.pairs), n_demos + 1
    if n_rows < needed:
        return f"{n_rows} rows, fewer than the {needed} that 1 query + {n_demos} demos need"
    n_distinct = len(set(relation.pairs))
    if n_distinct < needed:
        return f"{n_rows} rows but only {n_distinct} distinct pairs, fewer than the {needed} that 1 query + {n_demos} demos need"
    return None


def sample_trials(
    relation: Relation, *, seed: int, n_trials: int, n_demos: int, corruption: Corruption = "derange"
) -> list[Trial]:
    """``n_trials`` trials: a random query row, and demos drawn without replacement from the other distinct pairs.

    The relation must be eligible (``ineligible_reason`` is None); else ValueError.
    """
    if reason := ineligible_reason(relation, n_demos):
        raise ValueError(f"{relation.q_id}: {reason}")
    # A string seed is hashed with SHA-512 by random.Random: the same trials on every machine and Python version.
    rng = random.Random(f"relfv:{seed}:{relation.q_id}")
    first_row = {pair: row for row, pair in reversed(list(enumerate(relation.pairs)))}
    distinct = sorted(first_row.values())
    return [_sample_trial(relation, rng, trial_idx, distinct, n_demos, corruption) for trial_idx in range(n_trials)]


def _sample_trial(
    relation: Relation,
    rng: random.Random,
    trial_idx: int,
    distinct: list[int],
    n_demos: int,
    corruption: Corruption,
) -> Trial:
    pairs = relation.pairs
    query_row = rng.randrange(len(pairs))
    pool = [row for row in distinct if pairs[row] != pairs[query_row]]
    demo_rows = rng.sample(pool, n_demos)
    demos = [pairs[row] for row in demo_rows]
    right = [{pair.output for pair in pairs if pair.input == demo.input} for demo in demos]
    labels = corrupt_labels([demo.output for demo in demos], right, rng, corruption)
    return Trial(
        q_id=relation.q_id,
        trial_id=f"{relation.q_id}-{trial_idx:03d}",
        trial_idx=trial_idx,
        query=pairs[query_row],
        query_source_index=query_row,
        demo_source_indices=tuple(demo_rows),
        demos_clean=tuple(demos),
        demos_corrupted=tuple(WordPair(demo.input, label) for demo, label in zip(demos, labels, strict=True)),
        n_labels_in_place=sum(label in answers for label, answers in zip(labels, right, strict=True)),
    )


def corrupt_labels(
    labels: Sequence[str], right: Sequence[Collection[str]], rng: random.Random, corruption: Corruption
) -> list[str]:
    """A permutation of ``labels``: for ``shuffle`` any (Todd et al. 2024), for ``derange`` one that puts no label where
    it is right, if there is such a one, and else one that does so as rarely as possible.

    ``right[i]`` are all answers that the relation gives to demo i's input.
    """
    shuffled = rng.sample(labels, len(labels))
    if corruption == "shuffle":
        return shuffled
    for _ in range(_ATTEMPTS):
        if not any(label in answers for label, answers in zip(shuffled, right, strict=True)):
            return shuffled
        shuffled = rng.sample(labels, len(labels))
    return _fewest_in_place(shuffled, right)


def _fewest_in_place(labels: list[str], right: Sequence[Collection[str]]) -> list[str]:
    """Maximum matching of demos with labels that are wrong for them (Kuhn's algorithm); the rest go where is room."""
    demo_of: dict[int, int] = {}

    def place(demo: int, tried: set[int]) -> bool:
        for i, label in enumerate(labels):
            if i not in tried and label not in right[demo]:
                tried.add(i)
                if i not in demo_of or place(demo_of[i], tried):
                    demo_of[i] = demo
                    return True
        return False

    unplaced = [demo for demo in range(len(labels)) if not place(demo, set())]
    for i in range(len(labels)):
        if i not in demo_of:
            demo_of[i] = unplaced.pop()
    label_of = {demo: labels[i] for i, demo in demo_of.items()}
    return [label_of[demo] for demo in range(len(labels))]
