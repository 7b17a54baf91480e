"""StepD, trials: random query, demonstrations that exclude it, corrupted labels; frozen in sampled_trials.json.

Every q_id has a random generator of its own, seeded by (seed, q_id), so its trials do not depend on which other
relations are in the file or in the run.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from relfv.errors import RunError
from relfv.models.context import Context
from relfv.models.tokens import Tokens
from relfv.settings import Settings
from relfv.stages.prompts import PREFIXES, SEPARATORS, AnswerTokens, prompts_to_read
from relfv.stages.snapshot import read_snapshot, target_keys
from relfv.stages.stage import Check, Stage, Work
from relfv.store.folder import File, QidFolder
from relfv.store.formats import json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import PromptedTrial, Relation, Snapshot, Trial, WordPair

log = logging.getLogger(__name__)

Corruption = Literal["derange", "shuffle", "random", "other"]
"""Ways to make the labels of corrupted demos: the demos' own, none in its place (``derange``) or in any order
(``shuffle``, Todd et al. 2024); drawn with replacement from the relation's answers (``random``), or from the CSV's
other relations (``other``): of two labels a derangement teaches the inverse relation, these teach none."""

_ATTEMPTS = 200


def ineligible_reason(relation: Relation, n_demos: int, corruption: str = "derange") -> str | None:
    """Why this relation cannot give a query and ``n_demos`` demos without overlap, or corrupted labels, or None if it
    can."""
    n_rows, n_distinct, needed = len(relation.pairs), len(set(relation.pairs)), n_demos + 1
    fewer = f"fewer than the {needed} that 1 query + {n_demos} demos need"
    if n_rows < needed:
        return f"{n_rows} rows, {fewer}"
    if n_distinct < needed:
        return f"{n_rows} rows but only {n_distinct} distinct pairs, {fewer}"
    if corruption == "other" and not _labels_of_others(relation):
        return "the CSV has no other relation's answers, which --corruption other draws labels from"
    return None


def _labels_of_others(relation: Relation) -> list[str]:
    own = {pair.output for pair in relation.pairs}
    return [answer for answer in relation.csv_answers if answer not in own]


def sample_trials(
    relation: Relation, *, seed: int, n_trials: int, n_demos: int, corruption: Corruption = "derange"
) -> list[Trial]:
    """``n_trials`` trials: a random query row, and demos drawn without replacement from the other distinct pairs; pairs
    that give the query's own input another answer are left out as long as enough others remain.

    The relation must be eligible (``ineligible_reason`` is None); else ValueError.
    """
    if reason := ineligible_reason(relation, n_demos, corruption):
        raise ValueError(f"{relation.q_id}: {reason}")
    # A string seed is hashed with SHA-512 by random.Random: the same trials on every machine and Python version.
    rng = random.Random(f"relfv:{seed}:{relation.q_id}")
    n_rows = len(relation.pairs)
    return [trial_of(relation, rng, i, rng.randrange(n_rows), n_demos, corruption) for i in range(n_trials)]


def trial_of(
    relation: Relation, rng: random.Random, trial_idx: int, query_row: int, n_demos: int, corruption: Corruption
) -> Trial:
    """The trial of an eligible relation that asks row ``query_row``; demos and labels are drawn by ``rng``."""
    pairs = relation.pairs
    query = pairs[query_row]
    first_row = {pair: row for row, pair in reversed(list(enumerate(pairs)))}
    distinct = sorted(first_row.values())
    pool = [row for row in distinct if pairs[row].input != query.input]
    if len(pool) < n_demos:
        pool = [row for row in distinct if pairs[row] != query]
    demo_rows = rng.sample(pool, n_demos)
    demos = [pairs[row] for row in demo_rows]
    right = [relation.answers_to(demo.input) for demo in demos]
    if corruption in ("random", "other"):
        answers = list(dict.fromkeys(pair.output for pair in pairs))
        labels = rng.choices(answers if corruption == "random" else _labels_of_others(relation), k=n_demos)
    else:
        labels = corrupt_labels([demo.output for demo in demos], right, rng, corruption)
    return Trial(
        q_id=relation.q_id,
        trial_id=f"{relation.q_id}-{trial_idx:03d}",
        trial_idx=trial_idx,
        query=query,
        query_source_index=query_row,
        demo_source_indices=tuple(demo_rows),
        demos_clean=tuple(demos),
        demos_corrupted=tuple(WordPair(demo.input, label) for demo, label in zip(demos, labels, strict=True)),
        n_labels_in_place=sum(label in answers for label, answers in zip(labels, right, strict=True)),
        n_demos_of_query_input=sum(demo.input == query.input for demo in demos),
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


# --- files ---------------------------------------------------------------------------------------------------------


def read_trials(path: Path) -> Snapshot:
    """Read sampled_trials.json. Raises InputError if it is missing, RunError, naming key and trial, if it is not
    one."""
    return read_snapshot(path, with_demos=True)


TRIALS = File("sampled_trials.json", read_trials)


def draw(
    relation: Relation, settings: Settings, tokens: Tokens, *, csv_sha256: str = ""
) -> tuple[list[PromptedTrial], dict[str, Any]]:
    """-> (the trials of a relation, the content of sampled_trials.json but for what the prompts' length tells)."""
    trials = sample_trials(
        relation,
        seed=settings.seed,
        n_trials=settings.n_trials_per_q,
        n_demos=settings.n_demos,
        corruption=settings.corruption,  # type: ignore[arg-type]
    )
    answers = AnswerTokens(relation, tokens, settings.target)
    answers.read_ahead(trials)
    prompted = [answers.prompted(trial) for trial in trials]
    collisions = [
        {"token_id": token, "token": tokens.text(token), "answers": alike} for token, alike in answers.collisions()
    ]
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
        "model": settings.model,
        "model_spec": settings.model_spec,
        "tok_add_special": True,
        "n_labels_left_in_place": sum(item.trial.n_labels_in_place for item in prompted),
        "n_demos_of_query_input": sum(item.trial.n_demos_of_query_input for item in prompted),
        "target": settings.target,
        "n_answers_tokenised_alone": sum(not item.target.joint for item in prompted),
        "n_space_fed": sum(bool(item.target.space_ids) for item in prompted),
        "n_blank_targets": sum(not tokens.text(item.target.token_id).strip() for item in prompted),
        "first_token_collisions": collisions,
    }
    return prompted, {"meta": meta, "trials": [_trial(item) for item in prompted]}


def _trial(item: PromptedTrial) -> dict[str, Any]:
    trial, target = item.trial, item.target
    return {
        "q_id": trial.q_id,
        "trial_id": trial.trial_id,
        "trial_idx": trial.trial_idx,
        "query_source_index": trial.query_source_index,
        "demo_source_indices": list(trial.demo_source_indices),
        "demos_clean": [vars(pair) for pair in trial.demos_clean],
        "demos_corrupted": [vars(pair) for pair in trial.demos_corrupted],
        "query": vars(trial.query),
        "clean_prompt_str": item.clean_prompt,
        "corrupted_prompt_str": item.corrupted_prompt,
        "target_str": trial.query.output,
        **target_keys(target, item.accepted),
        "n_labels_in_place": trial.n_labels_in_place,
        "n_demos_of_query_input": trial.n_demos_of_query_input,
    }


# --- the stage -----------------------------------------------------------------------------------------------------


def _freeze(work: Work) -> str:
    """Sample the trials and write the snapshot, read-only from here on."""
    relation, tokens = work.relation, work.model.tokens
    assert relation is not None  # whatever runs StepD gives it
    prompted, document = draw(relation, work.settings, tokens, csv_sha256=work.csv_sha256)
    length, notes = longest_prompt(prompted, tokens, work.model.context)
    _warn(work.q_id, prompted, document["meta"]["first_token_collisions"])
    for note in notes:
        log.warning("%s: %s", work.q_id, note)
    document["meta"] |= {"longest_prompt_tokens": length, "context_notes": notes}
    path = work.folder.path(TRIALS)
    if not path.exists():
        work.folder.write(TRIALS, json_bytes(document), read_only=True)
    elif read_json(path).get("trials") != document["trials"]:
        raise RunError(
            f"{path}: already there and not what these settings give; the frozen trials are never overwritten. "
            "Move the folder aside, or use --force, which does that"
        )
    n_queries = len({item.trial.query.input for item in prompted})
    return f"{len(prompted)} trials over {n_queries} queries of {len(relation.pairs)} rows"


def longest_prompt(prompted: Sequence[PromptedTrial], tokens: Tokens, context: Context) -> tuple[int, list[str]]:
    """-> (tokens of the longest prompt and its answer, what a reader should know of that). Raises TooLong."""
    targets = [item.target for item in prompted]
    lengths = [
        len(ids) + target.n_to_come
        for texts in ([item.clean_prompt for item in prompted], [item.corrupted_prompt for item in prompted])
        for ids, target in zip(prompts_to_read(texts, targets, tokens, ()).ids, targets, strict=True)
    ]
    context.require_room(max(lengths))
    return max(lengths), context.notes(max(lengths))


def _warn(q_id: str, prompted: Sequence[PromptedTrial], collisions: Sequence[Mapping[str, Any]]) -> None:
    for collision in collisions:
        answers = collision["answers"]
        log.info(
            "%s: %d answers are told by the same token %r (%s); scores of that token cannot tell them apart",
            q_id,
            len(answers),
            collision["token"],
            ", ".join(answers[:4]) + (", ..." if len(answers) > 4 else ""),
        )
    apart = sum(not item.target.joint for item in prompted)
    if apart:
        log.warning(
            "%s: in %d trials the tokenizer merges prompt and answer; there the answer was tokenised on its own",
            q_id,
            apart,
        )


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    questions, n = folder.read(TRIALS).questions, status.settings.n_trials_per_q
    same = [question.q_id for question in questions] == [folder.q_id] * n
    yield Check(folder.path(TRIALS), f"{n} trials of {folder.q_id}", same)


STAGE = Stage(
    "stepD_trials",
    "Freeze the trials: random query, demos that exclude it, clean and corrupted prompts.",
    _freeze,
    writes=(TRIALS,),
    settings=("seed", "n_trials_per_q", "n_demos", "corruption", "target", "model_spec"),
    agrees=_agrees,
    share=0.01,
)
