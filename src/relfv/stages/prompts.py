"""Prompts and targets: from a trial to the texts a model reads and the token it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

from relfv.models.tokens import Tokens, fed_text
from relfv.types import PromptedTrial, Prompts, Relation, Target, Trial, WordPair

PREFIXES = {"input": "Q: ", "output": "A:", "instructions": ""}
SEPARATORS = {"input": "\n", "output": "\n\n", "instructions": ""}
ZERO_SHOT_FORMAT = "Q: <query>\nA: "


@dataclass(frozen=True)
class PromptFormat:
    """How pairs and a query are shown to the model."""

    name: str
    prompt: str
    """Form of a pair: ``{input}``, then one space and ``{output}``; a query is what stands before that space."""
    separator: str = "\n"
    """Text after each demo."""
    introduction: str = ""
    """Text before everything else."""
    demos: bool = True
    """Whether clean prompts have demos. If not, they have the introduction and no demos, corrupted ones neither."""

    def clean(self, demos: Sequence[WordPair], query: str) -> str:
        """The introduction, the demos, then the query, with no trailing space."""
        return f"{self.introduction}{self._shown(demos)}{self._asked(query)}"

    def corrupted(self, demos: Sequence[WordPair], query: str) -> str:
        """The prompt as in ``clean`` with corrupted ``demos``; in a format without demos, the query alone."""
        return self.clean(demos, query) if self.demos else self._asked(query)

    def zero_shot(self, query: str) -> str:
        """The query alone, with a trailing space as in the spec's section 8; it is dropped when the prompt is fed."""
        return f"{self._asked(query)} "

    def _shown(self, demos: Sequence[WordPair]) -> str:
        parts = self._before, self.prompt.partition("{output}")[2]
        return "".join(
            f"{parts[0].replace('{input}', demo.input)} {demo.output}{parts[1]}{self.separator}"
            for demo in (demos if self.demos else ())
        )

    def _asked(self, query: str) -> str:
        return self._before.replace("{input}", query)

    @property
    def _before(self) -> str:
        return self.prompt.partition(" {output}")[0]


SPEC_FORMAT = PromptFormat(
    "spec", f"{PREFIXES['input']}{{input}}{SEPARATORS['input']}{PREFIXES['output']} {{output}}", SEPARATORS["output"]
)
"""``Q: x\\nA: y\\n\\n`` for each demo, then ``Q: query\\nA:``."""


def zero_shot_prompt(query: str) -> str:
    """``Q: query\\nA: ``."""
    return SPEC_FORMAT.zero_shot(query)


def prompts_to_read(
    texts: Sequence[str],
    targets: Sequence[Target],
    tokens: Tokens,
    clusters: Sequence[int],
    accepted: Sequence[Sequence[int]] = (),
) -> Prompts:
    """Texts as the model reads them: token ids, with what is fed of each answer; fields as in Prompts."""
    ids = [[*tokens.encode(text), *target.fed_ids] for text, target in zip(texts, targets, strict=True)]
    return Prompts(ids, [target.token_id for target in targets], clusters, accepted)


class AnswerTokens:
    """The token that identifies each answer of a relation: with the target ``first`` the first (Todd et al. 2024), with
    ``distinguishing`` the first that no other answer shares."""

    def __init__(
        self, relation: Relation, tokens: Tokens, target: str = "first", shown: PromptFormat = SPEC_FORMAT
    ) -> None:
        self._relation, self._tokens, self._shown = relation, tokens, shown
        self._distinguishing = target == "distinguishing"

    @cached_property
    def _of(self) -> dict[str, Target]:
        """Answer -> target. An answer's tokens do not depend on what stands further in front of it than the end of the
        prompt."""
        return {answer: self._tokens.target(prompt, answer) for answer, prompt in self._alone.items()}

    @cached_property
    def _alone(self) -> dict[str, str]:
        """Answer -> the first query that has it, as a prompt without demos."""
        first_with = {pair.output: pair for pair in reversed(self._relation.pairs)}
        in_order = dict.fromkeys(pair.output for pair in self._relation.pairs)
        return {answer: self._shown.zero_shot(first_with[answer].input) for answer in in_order}

    def read_ahead(self, trials: Sequence[Trial]) -> None:
        """Have the tokenizer read in one go what ``prompted`` and ``collisions`` will ask for."""
        asked = [(prompt, answer) for answer, prompt in self._alone.items()]
        texts = [self._shown.corrupted(trial.demos_corrupted, trial.query.input) for trial in trials]
        for trial in trials:
            clean = self._shown.clean(trial.demos_clean, trial.query.input)
            asked += [(clean, answer) for answer in self._relation.answers_to(trial.query.input)]
        for prompt, answer in asked:
            texts += [fed_text(prompt), f"{fed_text(prompt)} ", f"{fed_text(prompt)} {answer}"]
        self._tokens.read_ahead(texts)

    def prompted(self, trial: Trial) -> PromptedTrial:
        """The clean and the corrupted prompt of a trial, its target, and what else is right."""
        for pair in (trial.query, *trial.demos_clean):
            self._tokens.require_plain(pair.input)
            self._tokens.require_plain(pair.output)
        word, clean = trial.query.input, self._shown.clean(trial.demos_clean, trial.query.input)
        target = self._told_apart(word, self._tokens.target(clean, trial.query.output))
        others = [answer for answer in self._relation.answers_to(word) if answer != trial.query.output]
        return PromptedTrial(
            trial=trial,
            clean_prompt=clean,
            corrupted_prompt=self._shown.corrupted(trial.demos_corrupted, word),
            target=target,
            accepted=tuple((other, _told_by(self._tokens.target(clean, other), target)) for other in others),
        )

    def collisions(self) -> list[tuple[int, list[str]]]:
        """Answers that begin with the tokens that identify another one: their scores cannot tell them apart.

        -> (the token that is scored, the distinct answers that share it and what is fed before it), for each token
        shared by at least two.
        """
        targets = [self._told_apart(pair.input, self._of[pair.output]) for pair in dict.fromkeys(self._relation.pairs)]
        alike: dict[tuple[int, ...], list[str]] = {(*target.fed_ids, target.token_id): [] for target in targets}
        lengths = sorted({len(tokens) for tokens in alike})
        for answer, target in self._of.items():
            whole = target.space_ids + target.answer_ids
            for tokens in {whole[:n] for n in lengths} & alike.keys():
                alike[tokens].append(answer)
        return [(tokens[-1], answers) for tokens, answers in sorted(alike.items()) if len(answers) > 1]

    def _told_apart(self, word: str, target: Target) -> Target:
        if not self._distinguishing:
            return target
        right = self._relation.answers_to(word)
        others = (other for answer, other in self._of.items() if answer not in right)
        shared = max((_n_shared(target, other) for other in others), default=0)
        return replace(target, n_fed=min(shared, len(target.answer_ids) - 1))


def _n_shared(one: Target, other: Target) -> int:
    """How many tokens two answers have in common from their beginning."""
    if one.space_ids != other.space_ids:
        return 0
    pairs = zip(one.answer_ids, other.answer_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _told_by(other: Target, target: Target) -> int | None:
    """The token that identifies ``other`` after what is fed for ``target``; None if it begins in another way."""
    fits = (*other.space_ids, *other.answer_ids[: target.n_fed]) == target.fed_ids
    return other.answer_ids[target.n_fed] if fits and len(other.answer_ids) > target.n_fed else None
