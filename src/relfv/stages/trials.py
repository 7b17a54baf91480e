"""Freezing the trials of a q_id: random query, demonstrations that exclude it, corrupted labels.

Every q_id has a random generator of its own, seeded by (seed, q_id), so its trials do not depend on which other
relations are in the file or in the run.
"""

from __future__ import annotations

import random
from collections import Counter
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
    labels = corrupt_labels([demo.output for demo in demos], rng, corruption)
    return Trial(
        q_id=relation.q_id,
        trial_id=f"{relation.q_id}-{trial_idx:03d}",
        trial_idx=trial_idx,
        query=pairs[query_row],
        query_source_index=query_row,
        demo_source_indices=tuple(demo_rows),
        demos_clean=tuple(demos),
        demos_corrupted=tuple(WordPair(demo.input, label) for demo, label in zip(demos, labels, strict=True)),
        n_labels_in_place=sum(demo.output == label for demo, label in zip(demos, labels, strict=True)),
    )


def corrupt_labels(labels: list[str], rng: random.Random, corruption: Corruption) -> list[str]:
    """A permutation of ``labels``: for ``shuffle`` any (Todd et al. 2024), for ``derange`` one that leaves no value
    in its place where such a one exists, and as few as possible otherwise."""
    shuffled = rng.sample(labels, len(labels))
    if corruption == "shuffle":
        return shuffled
    for _ in range(_ATTEMPTS):
        if not any(old == new for old, new in zip(labels, shuffled, strict=True)):
            return shuffled
        shuffled = rng.sample(labels, len(labels))
    return _rotated(labels, rng)


def _rotated(labels: list[str], rng: random.Random) -> list[str]:
    """Line equal labels up next to each other and move all by the size m of the largest group. No value meets itself
    if 2m <= n; otherwise 2m - n labels of that group do, which is the least possible."""
    counts = Counter(labels)
    values = rng.sample(sorted(counts), len(counts))
    order = [
        i
        for value in values
        for i in rng.sample([j for j, label in enumerate(labels) if label == value], counts[value])
    ]
    shift = max(counts.values())
    out = list(labels)
    for place, i in enumerate(order):
        out[i] = labels[order[(place + shift) % len(order)]]
    return out
