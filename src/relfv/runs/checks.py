"""Checks of relations and of a tokenizer before any model runs: one small function for each, all of them in ``CHECKS``.

The trials are those that StepD would freeze, and what is said of them is what the verdict would say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from relfv.errors import InputError
from relfv.models.context import Context, TooLong
from relfv.models.tokens import Tokens
from relfv.relations import named
from relfv.settings import Settings
from relfv.stages.caveats import labels_in_place, trial_numbers
from relfv.stages.snapshot import snapshot_of
from relfv.stages.trials import TRIALS, draw, ineligible_reason, longest_prompt
from relfv.stats import called_at_once
from relfv.types import PromptedTrial, Relation, Snapshot

Level = Literal["pass", "warn", "fail"]

_SEVERAL = re.compile(r"\S\s*[/;|]\s*\S")
"""Separators that people put between several answers in one cell."""


@dataclass(frozen=True)
class Line:
    """One line of the report before a run: a check and its result."""

    check: str
    level: Level
    found: str
    remedy: str = ""
    by_q_id: dict[str, str] = field(default_factory=dict)
    """Findings by q_id, for the q_ids that are not as one would wish."""


@dataclass
class Evidence:
    """One relation as a run would see it."""

    relation: Relation
    settings: Settings
    tokens: Tokens | None = None
    """The tokenizer; None where there is none to ask."""
    context: Context | None = None
    """The model's context; None before the model's config is known."""

    @cached_property
    def skipped(self) -> str | None:
        """Reason why a run would skip the relation, as far as its rows say; None if it would not."""
        return ineligible_reason(self.relation, self.settings.n_demos, self.settings.corruption)

    @cached_property
    def drawn(self) -> tuple[list[PromptedTrial], Snapshot] | InputError | None:
        """The relation's trials as StepD would freeze them, or the error in drawing them; None where there can be
        none."""
        if self.skipped or self.tokens is None:
            return None
        try:
            prompted, document = draw(self.relation, self.settings, self.tokens)
        except InputError as problem:
            return problem
        return prompted, snapshot_of(document, Path(TRIALS.name), with_demos=True)

    @property
    def trials(self) -> Snapshot | None:
        """The relation's trials as a snapshot; None where they could not be drawn."""
        return self.drawn[1] if isinstance(self.drawn, tuple) else None

    @cached_property
    def numbers(self) -> dict[str, Any] | None:
        """Numbers of the trials that the verdict would state."""
        return trial_numbers(self.trials) if self.trials else None


@dataclass(frozen=True)
class Check:
    """One check of every relation."""

    name: str
    look: Callable[[Evidence], str | None]
    """Function that looks at one relation. -> what is not as one would wish, in words, or None."""
    fine: str
    """Text of the line where no relation has the problem."""
    remedy: str
    needs: Literal["rows", "tokenizer", "config"] = "tokenizer"
    """Data that the check needs; the model's config comes last."""
    level: Level = "warn"


def _skipped(of: Evidence) -> str | None:
    return of.skipped and f"skipped: {of.skipped}"


def _few_queries(of: Evidence) -> str | None:
    n = len(set(of.trials.clusters)) if of.trials else None
    # With so few queries even a single head with the smallest possible p-value would not be called.
    return f"{n} distinct queries" if n and called_at_once(1, n) > 1 else None


def _several_answers(of: Evidence) -> str | None:
    inputs = dict.fromkeys(pair.input for pair in of.relation.pairs)
    several = {word: right for word in inputs if len(right := of.relation.answers_to(word)) > 1}
    word = next(iter(several), None)
    return word and f"{len(several)} inputs stand there with several answers, as {word!r} with {_listed(several[word])}"


def _several_in_a_cell(of: Evidence) -> str | None:
    cells = [pair.output for pair in of.relation.pairs if _SEVERAL.search(pair.output)]
    return f"{len(cells)} rows have an answer such as {cells[0]!r}, which is taken as one" if cells else None


def _labels(of: Evidence) -> str | None:
    return labels_in_place(of.numbers["corruption"]) or None if of.numbers else None


def _shared(of: Evidence) -> str | None:
    token = of.numbers and of.numbers["scored_token"]
    if not token or not token["n_answer_shares_it"] or of.trials is None:
        return None
    most = max(of.trials.meta["first_token_collisions"], key=lambda collision: len(collision["answers"]))
    return (
        f"{token['n_answer_shares_it']} of {token['n_trials']} trials are scored on a token that other answers begin "
        f"with, too (as {most['token']!r}: {_listed(most['answers'])})"
    )


def _white_space(of: Evidence) -> str | None:
    token = of.numbers and of.numbers["scored_token"]
    if not token or not (token["n_white_space_alone"] or token["n_space_fed"]):
        return None
    if blank := token["n_white_space_alone"]:
        return f"{blank} of {token['n_trials']} trials are scored on white space alone, which every answer begins with"
    return (
        f"in {token['n_space_fed']} of {token['n_trials']} trials the answer begins with a token of white space alone: "
        "it is fed with the prompt, and the token after it is scored"
    )


def _merged(of: Evidence) -> str | None:
    n = of.trials.meta["n_answers_tokenised_alone"] if of.trials else 0
    return f"in {n} trials the tokenizer merges the prompt's end with the answer" if n else None


def _unusable(of: Evidence) -> str | None:
    return str(of.drawn) if isinstance(of.drawn, InputError) else None


def _length(of: Evidence) -> str | None:
    if of.context is None or of.tokens is None or not isinstance(of.drawn, tuple):
        return None
    try:
        _, notes = longest_prompt(of.drawn[0], of.tokens, of.context)
    except TooLong as problem:
        return f"skipped: {problem}"
    return "; ".join(notes) or None


CHECKS = (
    Check("rows", _skipped, "every q_id has enough of them", "add rows, or use fewer demos (--n_demos)", "rows"),
    Check(
        "answers of a row",
        _several_in_a_cell,
        "one in each row",
        "give each answer a row of its own with the same input: then each counts as right",
        "rows",
    ),
    Check(
        "answers of an input",
        _several_answers,
        "one for each",
        "nothing, if all are right: each counts as such, and demos with the query's own input are avoided",
        "rows",
    ),
    Check("words", _unusable, "the tokenizer can read them all", "change or leave out the word", level="fail"),
    Check(
        "queries",
        _few_queries,
        "enough distinct ones among the trials",
        "add rows or trials: with so few nothing can be told from noise",
    ),
    Check(
        "corruption",
        _labels,
        "no label has to stay right",
        "--corruption random or other, which draw labels that teach no other relation",
    ),
    Check(
        "first tokens",
        _shared,
        "each tells its answer from the others",
        "--target distinguishing scores a token that does; or read whole answers alone (step6/answers.json)",
    ),
    Check(
        "white space",
        _white_space,
        "no answer begins with a token of it",
        "read whole answers beside the scored token (step6/answers.json), or use --target distinguishing",
    ),
    Check(
        "merges",
        _merged,
        "none of prompt and answer",
        "nothing: there the answer is tokenised on its own, and the snapshot says so",
    ),
    Check("length", _length, "every prompt fits the model", "use fewer demos (--n_demos) or shorter words", "config"),
)
"""The checks, in the order in which they are reported."""


def check_relations(evidence: Iterable[Evidence], having: str) -> Iterator[Line]:
    """Yield a line over all relations for each check that needs exactly the data that is at hand now, ``having``."""
    of_all = list(evidence)
    for check in CHECKS:
        if check.needs != having:
            continue
        by_q_id = {of.relation.q_id: said for of in of_all if (said := check.look(of))}
        words = named([f"{q_id}: {said}" for q_id, said in by_q_id.items()], "; ")
        if by_q_id:
            yield Line(check.name, check.level, words, check.remedy, by_q_id)
        else:
            yield Line(check.name, "pass", check.fine)


def check_bos(tokens: Tokens) -> Line:
    """Check that the tokenizer puts a BOS in front, and only one."""
    tokenizer, ids = tokens.tokenizer, tokens.encode("Q: a\nA:")
    bos = tokenizer.bos_token_id
    if bos is None or bos not in ids:
        # Models with one token for the beginning and end of texts (GPT-2) are usually run without it.
        is_custom = bos is None or bos == tokenizer.eos_token_id
        said = "the tokenizer has none" if bos is None else f"the tokenizer adds none, though it has {tokens.text(bos)}"
        remedy = "" if is_custom else "if the model was trained with it, set add_bos_token in tokenizer_config.json"
        return Line("BOS", "pass" if is_custom else "warn", said, remedy)
    if ids.count(bos) > 1:
        said = f"the tokenizer adds {tokens.text(bos)} {ids.count(bos)} times"
        return Line("BOS", "warn", said, "correct the tokenizer's template: models are trained with one")
    return Line("BOS", "pass", f"{tokens.text(bos)}, once")


def _listed(words: Iterable[str]) -> str:
    """The first four of ``words``."""
    first, more = list(words)[:4], len(list(words)) > 4
    return ", ".join([*first, "..."] if more else first)
