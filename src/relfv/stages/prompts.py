"""Prompts and targets: from a trial to the texts a model reads and the token it is scored on."""

from __future__ import annotations

from collections.abc import Sequence

from relfv.models.tokens import Tokens
from relfv.types import PromptedTrial, Relation, Target, Trial, WordPair

PREFIXES = {"input": "Q: ", "output": "A:", "instructions": ""}
SEPARATORS = {"input": "\n", "output": "\n\n", "instructions": ""}
ZERO_SHOT_FORMAT = "Q: <query>\nA: "


def few_shot_prompt(demos: Sequence[WordPair], query: str) -> str:
    """``Q: x\\nA: y\\n\\n`` for each demo, then ``Q: query\\nA:`` with no trailing space."""
    shown = "".join(
        f"{PREFIXES['input']}{demo.input}{SEPARATORS['input']}{PREFIXES['output']} {demo.output}{SEPARATORS['output']}"
        for demo in demos
    )
    return f"{shown}{PREFIXES['input']}{query}{SEPARATORS['input']}{PREFIXES['output']}"


def zero_shot_prompt(query: str) -> str:
    """``Q: query\\nA: `` with the trailing space of the spec's section 8; it is dropped when the prompt is fed."""
    return ZERO_SHOT_FORMAT.replace("<query>", query)


def prompt_trial(trial: Trial, tokens: Tokens) -> PromptedTrial:
    """The clean and the corrupted prompt of a trial, and its target."""
    for pair in (trial.query, *trial.demos_clean):
        tokens.require_plain(pair.input)
        tokens.require_plain(pair.output)
    clean = few_shot_prompt(trial.demos_clean, trial.query.input)
    return PromptedTrial(
        trial=trial,
        clean_prompt=clean,
        corrupted_prompt=few_shot_prompt(trial.demos_corrupted, trial.query.input),
        target=tokens.target(clean, trial.query.output),
    )


def first_token_collisions(relation: Relation, tokens: Tokens) -> list[tuple[int, list[str]]]:
    """Answers of one relation that begin with the same token: first-token scoring cannot tell them apart.

    -> (token id, the distinct answers that share it), for each token shared by at least two.
    """
    by_token: dict[int, list[str]] = {}
    for pair in dict.fromkeys(relation.pairs):
        target: Target = tokens.target(zero_shot_prompt(pair.input), pair.output)
        answers = by_token.setdefault(target.first_token_id, [])
        if pair.output not in answers:
            answers.append(pair.output)
    return [(token, answers) for token, answers in sorted(by_token.items()) if len(answers) > 1]
