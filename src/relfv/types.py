"""The values that flow between stages: frozen, with every tensor's shape and unit named.

Axes: ``trial`` T, ``layer`` L, ``head`` H, ``prompt`` N; everything is read at the last prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # needed for type annotations alone
    import numpy as np
    import torch

MEASURES = ("p", "logit", "logprob")
"""How a target token is scored: probability, raw logit, natural-log probability."""


@dataclass(frozen=True, order=True)
class HeadId:
    """One attention head. Layers and heads count from 0. Sorts by layer, then head."""

    layer: int
    head: int


@dataclass(frozen=True)
class WordPair:
    """One row of the relation CSV: ``output`` is the right answer to ``input``."""

    input: str
    output: str


@dataclass(frozen=True)
class Relation:
    """All pairs of one q_id, in file order. Row indices count from 0 within the q_id."""

    q_id: str
    pairs: tuple[WordPair, ...]
    csv_answers: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The distinct answers of all relations of the CSV: labels that have nothing to do with this one."""
    name: str = field(default="", compare=False)
    """The relation in words, where the CSV has them; no part of the experiment."""
    csv_pairs: Mapping[str, tuple[WordPair, ...]] = field(default_factory=dict, repr=False, compare=False)
    """q_id -> pairs, for all relations of the CSV, this one included."""

    def answers_to(self, word: str) -> tuple[str, ...]:
        """All answers that the relation gives to the input ``word``; each of them is right."""
        return tuple(dict.fromkeys(pair.output for pair in self.pairs if pair.input == word))


@dataclass(frozen=True)
class Trial:
    """One frozen trial: a query and its demonstrations, clean and with corrupted labels."""

    q_id: str
    trial_id: str
    trial_idx: int
    query: WordPair
    query_source_index: int
    demo_source_indices: tuple[int, ...]
    demos_clean: tuple[WordPair, ...]
    demos_corrupted: tuple[WordPair, ...]
    n_labels_in_place: int
    """Demos whose corrupted label is still a right answer to their input (0 whenever that can be avoided)."""
    n_demos_of_query_input: int
    """Demos that give the query's own input another answer (0 wherever enough other rows remain)."""


@dataclass(frozen=True)
class Target:
    """The token that a prompt is scored on: the first token of the answer (Todd et al. 2024, section 2), or a later
    one."""

    answer_ids: tuple[int, ...]
    joint: bool
    """True if the ids come from tokenising prompt + answer together with the prompt's own ids as a prefix. False if
    the tokenizer merges across that boundary; then the answer was tokenised on its own, and the snapshot says so."""
    space_ids: tuple[int, ...] = ()
    """Tokens of the space before the answer, where the tokenizer makes tokens of white space alone of it (before digits
    in Llama-3's tokenizer). They are fed as the end of the prompt, since every answer has them, and are not in
    ``answer_ids``."""
    n_fed: int = 0
    """Number of first tokens of ``answer_ids`` that are fed with the prompt, because other answers share them
    (``--target distinguishing``)."""

    @property
    def token_id(self) -> int:
        """The token that is scored."""
        return self.answer_ids[self.n_fed]

    @property
    def fed_ids(self) -> tuple[int, ...]:
        """Token ids that the model reads after the prompt's text."""
        return self.space_ids + self.answer_ids[: self.n_fed]

    @property
    def n_to_come(self) -> int:
        """Number of the answer's tokens after those that are fed."""
        return len(self.answer_ids) - self.n_fed


@dataclass(frozen=True)
class PromptedTrial:
    """A trial with its two prompts (no trailing space) and its target."""

    trial: Trial
    clean_prompt: str
    corrupted_prompt: str
    target: Target
    accepted: tuple[tuple[str, int | None], ...]
    """Other right answers to the query's input, each with the token that identifies it after the same prompt; None
    where the answer would need other tokens to be fed."""


@dataclass(frozen=True)
class Question:
    """The query, answer and target of a frozen trial, without its demos."""

    q_id: str
    trial_id: str
    trial_idx: int
    query: WordPair
    query_source_index: int | None
    """Row of the query within the q_id; None in snapshots of other tools that do not say it."""
    answer: str
    target: Target
    accepted: tuple[tuple[str, int | None], ...] = ()
    """Other right answers with their tokens, as in PromptedTrial."""

    @property
    def right_ids(self) -> tuple[int, ...]:
        """Distinct token ids that count as right: the scored token, and the tokens that identify the other right
        answers."""
        others = (token_id for _, token_id in self.accepted if token_id is not None)
        return tuple(dict.fromkeys((self.target.token_id, *others)))


@dataclass(frozen=True)
class Snapshot:
    """A file of frozen trials, with their demos or zero-shot, as later stages use it."""

    meta: dict[str, Any]
    """The file's own ``meta`` object."""
    questions: tuple[Question, ...]
    prompts: tuple[str, ...]
    """The prompts that effects are measured on: the corrupted ones, or the zero-shot ones."""
    clean_prompts: tuple[str, ...]
    """The clean prompts; empty in a zero-shot snapshot."""
    clusters: tuple[int, ...]
    """(trial,): the first row that has the input of the trial's query. Trials that share it are no independent
    observations."""

    def only(self, chosen: Sequence[int]) -> Snapshot:
        """The snapshot of the trials at the indices ``chosen`` alone."""
        return Snapshot(
            self.meta,
            tuple(self.questions[i] for i in chosen),
            tuple(self.prompts[i] for i in chosen),
            tuple(self.clean_prompts[i] for i in chosen) if self.clean_prompts else (),
            tuple(self.clusters[i] for i in chosen),
        )


@dataclass(frozen=True)
class Prompts:
    """N prompts as a model reads them, and the token that each is scored on."""

    ids: Sequence[Sequence[int]]
    """Token ids of each prompt, BOS included, never padded."""
    targets: Sequence[int]
    """(N,): the token of each answer that is scored, its first unless --target says otherwise."""
    clusters: Sequence[int] = ()
    """(N,): row of each prompt's query word. Prompts that share it are no independent observations (stats.py)."""
    accepted: Sequence[Sequence[int]] = ()
    """(N, any): tokens that count as right, the target included; empty where the target alone counts."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, some: slice) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.ids[some], self.targets[some], self.clusters[some], self.accepted[some])

    @property
    def right(self) -> Sequence[Sequence[int]]:
        """(N, any): ``accepted``, or the target of each prompt where that is empty."""
        return self.accepted or [[target] for target in self.targets]


@dataclass(frozen=True)
class TokenScores:
    """How a model scores one target token in each of some forward passes; all tensors share one shape, on the CPU."""

    logit: torch.Tensor
    """float32, raw logit of the target token."""
    logprob: torch.Tensor
    """float32, natural-log probability of the target token from a float32 log-softmax."""
    top_id: torch.Tensor
    """int64, the most probable token."""

    @cached_property
    def p(self) -> torch.Tensor:
        """float64 probability of the target token."""
        return self.logprob.double().exp()

    def measure(self, name: str) -> np.ndarray:
        """One of MEASURES as a float64 array of the fields' shape."""
        return getattr(self, name).double().numpy()

    def measures(self) -> dict[str, np.ndarray]:
        """Name -> array, for all of MEASURES."""
        return {name: self.measure(name) for name in MEASURES}

    def correct(self, right: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 (N, ...): 1 where the most probable token is one that is right for the prompt, else 0."""
        import numpy as np

        if len(right) != len(self.top_id):
            raise ValueError(f"{len(right)} prompts' right tokens for scores of {len(self.top_id)} prompts")
        width = max(map(len, right), default=0)
        padded = np.array([[*its, *[-1] * (width - len(its))] for its in right], dtype=np.int64)  # no token is -1
        tops = self.top_id.numpy()
        its = padded.reshape(len(right), *[1] * (tops.ndim - 1), width)
        return (tops[..., None] == its).any(-1).astype(np.float64)

    def __getitem__(self, index: Any) -> TokenScores:
        """The scores with ``index`` applied to every field."""
        return TokenScores(self.logit[index], self.logprob[index], self.top_id[index])


@dataclass(frozen=True)
class Effects:
    """Scores without an intervention and with each of C interventions, from the same batch and the same kernels."""

    base: TokenScores
    """Scores without an intervention, of shape (N,)."""
    edited: TokenScores
    """Scores with each intervention, of shape (N, C)."""
    per_pass: int = 1
    """Prompts that shared a forward pass. Batch shapes change low-order bits: the same bytes need the same number."""
    lengths: torch.Tensor | None = field(default_factory=lambda: None)  # no default that ``to_come`` would find
    """float32 (N, layer), for injections: length of the untouched hidden state after each of their layers."""

    @staticmethod
    def to_come(per_pass: int, arrived: Callable[[], Effects]) -> Effects:
        """Effects that a device still computes. The first read of one of their tensors waits for ``arrived``; until
        then the host is free."""
        effects = object.__new__(Effects)
        effects.__dict__.update(per_pass=per_pass, _arrived=arrived)
        return effects

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in ("base", "edited", "lengths") or "_arrived" not in self.__dict__:
                raise AttributeError(f"Effects have no {name!r}")
            self.__dict__.update(vars(self.__dict__["_arrived"]()))
            del self.__dict__["_arrived"]
            return getattr(self, name)

    def delta(self, measure: str) -> np.ndarray:
        """float64 (N, C): the measure, one of MEASURES, with each intervention minus without."""
        return self.edited.measure(measure) - self.base.measure(measure)[:, None]


@dataclass(frozen=True)
class MeanActivations:
    """Mean clean activation of every head (Todd et al. 2024, eq. 2: the conditioned mean a-bar)."""

    values: np.ndarray
    """float32 (layer, head, head_dim): mean over clean prompts of the output projection's input at the last token."""
    n_prompts: int


@dataclass(frozen=True)
class HeadEffects:
    """Causal indirect effect of each swept head on each trial (Todd et al. 2024, eq. 3)."""

    heads: tuple[HeadId, ...]
    """The C swept heads, by layer then head: the second axis of ``effects.edited``."""
    effects: Effects
    """Target scores on the corrupted prompt, unpatched (``base``, (trial,)) and patched (``edited``, (trial, head))."""

    @property
    def per_pass(self) -> int:
        """Trials that shared a forward pass."""
        return self.effects.per_pass


@dataclass(frozen=True)
class ScoredHead:
    """One head with its mean scores over trials, as in a row of cie_scores.csv / aie_scores.csv."""

    id: HeadId
    scores: dict[str, float]
    n_trials: int
