"""Whole answers instead of first tokens, with the function vector held on while the answer is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from relfv.engine.base import Backbone, TokenIds, last_hidden, pad_right
from relfv.engine.hooks import editing_outputs
from relfv.engine.memory import shrinking
from relfv.language_model import LanguageModel

N_TOP = 5
N_DECODED = 10
MAX_TOKENS = 16
"""Of an answer that is written out; longer ones count as not matched."""

_PROMPTS_A_PASS, _TOKENS_A_CHUNK = 50, 64


@dataclass(frozen=True)
class Injection:
    """``vector`` (resid_dim,), or (prompt, resid_dim) where each prompt has its own, already times alpha, added after
    block ``layer``."""

    layer: int
    vector: torch.Tensor

    def of(self, prompts: slice | list[int]) -> Injection:
        """For some of the prompts."""
        return self if self.vector.dim() == 1 else Injection(self.layer, self.vector[prompts])


@dataclass(frozen=True)
class ScoredAnswer:
    """One prompt and its answer."""

    logprob: float
    """Natural-log probability of all its tokens, one after the other."""
    rank: int
    """Of its first token among all tokens, from 1."""
    top: list[tuple[int, float]]
    """The most probable first tokens and their probabilities."""
    written: list[int]
    """As many tokens as the answer has, each the most probable one after those before it."""


def score_answers(
    model: LanguageModel, prompts: Sequence[str], answers: Sequence[Sequence[int]], injection: Injection | None = None
) -> list[ScoredAnswer]:
    """Score ``answers`` (token ids) after ``prompts``, with ``injection`` from the last prompt token on, if given."""
    ids = [model.tokens.encode(prompt) for prompt in prompts]

    def attempt(size: int) -> list[ScoredAnswer]:
        parts = model.backbone.passes(ids, size)
        scored = [_score(model.backbone, ids[p], answers[p], injection and injection.of(p)) for p in parts]
        return list(itertools.chain.from_iterable(scored))

    with model.backbone.running():
        return shrinking(_PROMPTS_A_PASS, attempt)[0]


def decode_vector(model: LanguageModel, vector: torch.Tensor) -> list[tuple[int, float]]:
    """The tokens that final norm and unembedding make of ``vector`` (resid_dim,) in the place of the last hidden state,
    most probable first, with probabilities (Todd et al. 2024, section 3.2)."""
    backbone, bos = model.backbone, model.tokens.encode("a")[:1]

    def replace(hidden: torch.Tensor) -> torch.Tensor:
        return vector.to(hidden).expand_as(hidden)

    with backbone.running():
        with editing_outputs([(backbone.arch.blocks[-1], replace)]):
            hidden = last_hidden(backbone, [bos])
        best = _logprobs(backbone, hidden)[0].exp().topk(N_DECODED)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _score(
    backbone: Backbone, prompts: TokenIds, answers: Sequence[Sequence[int]], injection: Injection | None
) -> list[ScoredAnswer]:
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]
    hidden = _hidden(backbone, whole, starts, injection)
    # One row for each token of each answer: the hidden state that it is predicted from.
    rows = torch.cat([hidden[n, starts[n] : starts[n] + len(answer)] for n, answer in enumerate(answers)])
    tokens = torch.tensor([token for answer in answers for token in answer], device=rows.device)
    parts = []
    for some, wanted in zip(rows.split(_TOKENS_A_CHUNK), tokens.split(_TOKENS_A_CHUNK), strict=True):
        logprobs = _logprobs(backbone, some)
        parts.append((logprobs.gather(1, wanted[:, None])[:, 0], logprobs.argmax(-1)))
    logprob, likeliest = (torch.cat(part).tolist() for part in zip(*parts, strict=True))

    ends = list(itertools.accumulate(len(answer) for answer in answers))
    begins = [0, *ends[:-1]]
    first = _logprobs(backbone, rows[begins])
    rank = 1 + (first > first.gather(1, tokens[begins, None])).sum(1)
    best = first.exp().topk(N_TOP)
    told = [likeliest[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return [
        ScoredAnswer(
            logprob=math.fsum(logprob[begin:end]),
            rank=n_before,
            top=list(zip(top_ids, top_p, strict=True)),
            written=written,
        )
        for begin, end, n_before, top_ids, top_p, written in zip(
            begins,
            ends,
            rank.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            _written(backbone, prompts, answers, told, injection),
            strict=True,
        )
    ]


def _written(
    backbone: Backbone,
    prompts: TokenIds,
    answers: Sequence[Sequence[int]],
    likeliest: Sequence[Sequence[int]],
    injection: Injection | None,
) -> list[list[int]]:
    """Greedy continuations as long as the answers. ``likeliest`` are the most probable tokens where the answer itself was
    fed: up to the first that differs from the answer, they are what the model writes. From there on whole passes,
    without a cache: answers are a few tokens long."""
    written = []
    for answer, tokens in zip(answers, likeliest, strict=True):
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer, tokens, strict=True)))
        written.append(list(tokens[: min(right + 1, MAX_TOKENS)]))
    while going := [n for n, answer in enumerate(answers) if len(written[n]) < min(len(answer), MAX_TOKENS)]:
        texts = [[*prompts[n], *written[n]] for n in going]
        starts = [len(prompts[n]) - 1 for n in going]
        hidden = _hidden(backbone, texts, starts, injection and injection.of(going))
        last = hidden[torch.arange(len(going)), [len(text) - 1 for text in texts]]
        for n, token in zip(going, _logprobs(backbone, last).argmax(-1).tolist(), strict=True):
            written[n].append(token)
    return written


def _hidden(backbone: Backbone, texts: TokenIds, starts: Sequence[int], injection: Injection | None) -> torch.Tensor:
    """Final normed hidden states (N, P, resid_dim), the vector added at every token from ``starts[n]`` on."""
    ids, mask, _ = pad_right(texts, backbone.device)
    with _held_on(backbone, starts, injection):
        return backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]


def _held_on(backbone: Backbone, starts: Sequence[int], injection: Injection | None) -> AbstractContextManager[None]:
    if injection is None:
        return nullcontext()
    vectors = injection.vector.to(backbone.device).reshape(-1, 1, injection.vector.shape[-1])
    begin = torch.tensor(list(starts), device=backbone.device)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        on = torch.arange(hidden.shape[1], device=hidden.device)[None] >= begin[:, None]
        return hidden + on[..., None] * vectors.to(hidden.dtype)

    return editing_outputs([(backbone.arch.blocks[injection.layer], add)])


def _logprobs(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """float32 (R, vocabulary)"""
    arch = backbone.arch
    return arch.final_logits(arch.lm_head(hidden.float()).float()).log_softmax(-1)
