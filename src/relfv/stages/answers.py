"""Whole answers instead of first tokens, with the function vector held on while the answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from relfv.engine.base import Backbone, Prompts, last_hidden, pad_right
from relfv.engine.hooks import editing_outputs
from relfv.engine.language_model import LanguageModel

N_TOP = 5
N_DECODED = 10
MAX_TOKENS = 16
"""Of an answer that is written out; longer ones count as not matched."""

_PROMPTS_A_PASS = 25


@dataclass(frozen=True)
class Injection:
    """``vector`` (resid_dim,), already times alpha, added after block ``layer``."""

    layer: int
    vector: torch.Tensor


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
    found: list[ScoredAnswer] = []
    with model.backbone.running():
        for part in model.backbone.passes(ids, _PROMPTS_A_PASS):
            found += _score(model.backbone, ids[part], answers[part], injection)
    return found


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
    backbone: Backbone, prompts: Prompts, answers: Sequence[Sequence[int]], injection: Injection | None
) -> list[ScoredAnswer]:
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]
    hidden = _hidden(backbone, whole, starts, injection)
    written = _written(backbone, prompts, [min(len(answer), MAX_TOKENS) for answer in answers], injection)
    found = []
    for n, answer in enumerate(answers):
        logprobs = _logprobs(backbone, hidden[n, starts[n] : starts[n] + len(answer)])
        first, tokens = logprobs[0], torch.tensor(list(answer), device=logprobs.device)
        best = first.exp().topk(N_TOP)
        found.append(
            ScoredAnswer(
                logprob=float(logprobs.gather(1, tokens[:, None]).double().sum()),
                rank=1 + int((first > first[answer[0]]).sum()),
                top=list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
                written=written[n],
            )
        )
    return found


def _written(
    backbone: Backbone, prompts: Prompts, lengths: Sequence[int], injection: Injection | None
) -> list[list[int]]:
    """Greedy continuations of the given lengths. Whole passes, no cache: answers are a few tokens long."""
    texts = [list(prompt) for prompt in prompts]
    for step in range(max(lengths)):
        going = [n for n, length in enumerate(lengths) if step < length]
        hidden = _hidden(backbone, [texts[n] for n in going], [len(prompts[n]) - 1 for n in going], injection)
        last = hidden[torch.arange(len(going)), [len(texts[n]) - 1 for n in going]]
        for n, token in zip(going, _logprobs(backbone, last).argmax(-1).tolist(), strict=True):
            texts[n].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _hidden(backbone: Backbone, texts: Prompts, starts: Sequence[int], injection: Injection | None) -> torch.Tensor:
    """Final normed hidden states (N, P, resid_dim), the vector added at every token from ``starts[n]`` on."""
    ids, mask, _ = pad_right(texts, backbone.device)
    with _held_on(backbone, starts, injection):
        return backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]


def _held_on(backbone: Backbone, starts: Sequence[int], injection: Injection | None) -> AbstractContextManager[None]:
    if injection is None:
        return nullcontext()
    vector, begin = injection.vector.to(backbone.device), torch.tensor(list(starts), device=backbone.device)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        on = torch.arange(hidden.shape[1], device=hidden.device)[None] >= begin[:, None]
        return hidden + on[..., None] * vector.to(hidden.dtype)

    return editing_outputs([(backbone.arch.blocks[injection.layer], add)])


def _logprobs(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """float32 (R, vocabulary)"""
    arch = backbone.arch
    return arch.final_logits(arch.lm_head(hidden.float()).float()).log_softmax(-1)
