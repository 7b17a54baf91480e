"""The values that flow between stages: frozen, with every tensor's shape and unit named.

Axes: ``trial`` T, ``layer`` L, ``head`` H, ``prompt`` N; everything is read at the last prompt token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Target:
    """What a prompt is scored on: the first token of the answer (Todd et al. 2024, section 2)."""

    first_token_id: int
    answer_ids: tuple[int, ...]
    joint: bool
    """True if the ids come from tokenising prompt + answer together with the prompt's own ids as a prefix. False if
    the tokenizer merges across that boundary; then the answer was tokenised on its own, and the snapshot says so."""


@dataclass(frozen=True)
class PromptedTrial:
    """A trial with its two prompts (no trailing space) and its target."""

    trial: Trial
    clean_prompt: str
    corrupted_prompt: str
    target: Target


@dataclass(frozen=True)
class Prompts:
    """N prompts as a model reads them, and the token that each is scored on."""

    ids: Sequence[Sequence[int]]
    """Token ids of each prompt, BOS included, never padded."""
    targets: Sequence[int]
    """(N,): first token of each answer."""
    clusters: Sequence[int] = ()
    """(N,): row of each prompt's query word. Prompts that share it are no independent observations (stats.py)."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, some: slice) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.ids[some], self.targets[some], self.clusters[some])


@dataclass(frozen=True)
class TokenScores:
    """How a model scores one target token in each of some forward passes; all tensors share one shape, on the CPU."""

    logit: torch.Tensor
    """float32, raw logit of the target token."""
    logprob: torch.Tensor
    """float32, natural-log probability of the target token from a float32 log-softmax."""
    top_id: torch.Tensor
    """int64, the most probable token."""

    @property
    def p(self) -> torch.Tensor:
        """float64 probability of the target token."""
        return self.logprob.double().exp()

    def measures(self) -> dict[str, np.ndarray]:
        """The three MEASURES as float64 arrays of the fields' shape."""
        return {
            "p": self.p.numpy(),
            "logit": self.logit.double().numpy(),
            "logprob": self.logprob.double().numpy(),
        }

    def __getitem__(self, index: Any) -> TokenScores:
        """The same index taken of every field."""
        return TokenScores(self.logit[index], self.logprob[index], self.top_id[index])


@dataclass(frozen=True)
class Effects:
    """Scores without an intervention and with each of C interventions, from the same batch and the same kernels."""

    base: TokenScores
    """shape (N,)."""
    edited: TokenScores
    """shape (N, C)."""
    per_pass: int = 1
    """Prompts that shared a forward pass. Batch shapes change low-order bits: the same bytes need the same number."""

    def delta(self, measure: str) -> np.ndarray:
        """float64 (N, C): ``measure``, one of MEASURES, with each intervention minus without."""
        return self.edited.measures()[measure] - self.base.measures()[measure][..., None]


@dataclass(frozen=True)
class MeanActivations:
    """Mean clean activation of every head (Todd et al. 2024, eq. 2: the conditioned mean a-bar)."""

    values: torch.Tensor
    """float32 (layer, head, head_dim): mean over clean prompts of the output projection's input at the last token."""
    n_prompts: int


@dataclass(frozen=True)
class HeadEffects:
    """Causal indirect effect of each swept head on each trial (Todd et al. 2024, eq. 3)."""

    heads: tuple[HeadId, ...]
    """The C swept heads, by layer then head: the second axis of ``effects.edited``."""
    effects: Effects
    """base (trial,), edited (trial, head): target scores on the corrupted prompt, unpatched and patched."""


@dataclass(frozen=True)
class ArithmeticNoise:
    """Differences between effects that would be equal if sums were exact, over some heads and trials."""

    per_pass: int
    """Prompts that shared a forward pass."""
    largest: dict[str, float]
    """For each of MEASURES the largest absolute difference."""
    median: dict[str, float]
    """Likewise the median."""


@dataclass(frozen=True)
class NoiseFloor:
    """What arithmetic alone makes of a head's effect on one trial."""

    heads: tuple[HeadId, ...]
    """The heads measured."""
    n_trials: int
    """The trials measured: the first so many."""
    identity: ArithmeticNoise
    """Effects of giving each head its own value back; in exact arithmetic 0."""
    other_shape: ArithmeticNoise
    """The sweep's effects against the same ones from batches of another shape."""


@dataclass(frozen=True)
class ScoredHead:
    """One head with its mean scores over trials, as in a row of cie_scores.csv / aie_scores.csv."""

    id: HeadId
    scores: dict[str, float]
    n_trials: int


@dataclass(frozen=True)
class FunctionVector:
    """The sum of the selected heads' mean outputs in the residual stream (Todd et al. 2024, eq. 5)."""

    total: torch.Tensor
    """float32 (resid_dim,)."""
    by_layer: dict[int, torch.Tensor]
    """layer -> float32 (resid_dim,): the part that this layer's selected heads contribute; the parts sum to total."""
    heads: tuple[HeadId, ...]
