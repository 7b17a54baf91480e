"""Whole answers instead of first tokens, with a vector added at every token while the answer is generated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from relfv.engine.arithmetic import replaced
from relfv.engine.attention import attending_within
from relfv.engine.base import Array, Backbone, TokenIds, sent, slices
from relfv.engine.hooks import called_instead, editing_outputs
from relfv.engine.memory import in_passes
from relfv.engine.passes import last_hidden, masks_without_waiting, pad_right
from relfv.engine.readout import logprobs

N_TOP = 5
N_DECODED = 10
MAX_TOKENS = 17
"""Tokens generated at most; an answer that has not ended by then counts as not matched."""

_PROMPTS_A_PASS = 50
_TOKENS_A_CHUNK = 64
"""Rows of logits over the whole vocabulary at a time."""


@dataclass(frozen=True)
class Injection:
    """Addition of ``vector``, (resid_dim,) or one for each prompt, (prompt, resid_dim), already times alpha, after
    block ``layer`` from the last prompt token on."""

    layer: int
    vector: Array

    def of(self, prompts: slice | list[int]) -> Injection:
        """The injection for some of the prompts."""
        return self if self.vector.ndim == 1 else Injection(self.layer, self.vector[prompts])


@dataclass(frozen=True)
class ScoredAnswer:
    """Scores of one answer after its prompt."""

    logprob: float
    """Natural-log probability of the whole answer: the sum over its tokens."""
    rank: int
    """Rank of its first token by probability, from 1."""
    top: list[tuple[int, float]]
    """The ``N_TOP`` most probable first tokens and their probabilities."""
    written: list[int]
    """The greedy continuation of the prompt, as long as was asked for, at most ``MAX_TOKENS``."""


def score_answers(
    backbone: Backbone,
    ids: TokenIds,
    answers: TokenIds,
    injection: Injection | None = None,
    *,
    lengths: Sequence[int] | None = None,
) -> list[ScoredAnswer]:
    """Score ``answers[n]`` after the prompt ``ids[n]``, both token ids, with ``injection`` if given, and continue the
    prompt for ``lengths[n]`` tokens, by default as many as the answer has.

    Raises RunError if memory is too small for one prompt.
    """
    wanted = [min(n, MAX_TOKENS) for n in lengths or map(len, answers)]

    def score(part: slice) -> list[ScoredAnswer]:
        return _score(backbone, ids[part], answers[part], wanted[part], injection and injection.of(part))

    with backbone.running():
        return list(itertools.chain.from_iterable(in_passes(backbone, ids, _PROMPTS_A_PASS, score)[0]))


def decode_vector(backbone: Backbone, bos: list[int], vector: Array) -> list[tuple[int, float]]:
    """The ``N_DECODED`` most probable tokens, with probabilities, where ``vector`` (resid_dim,) goes through final norm
    and unembedding in place of the last hidden state (Todd et al. 2024, section 3.2).

    ``bos`` is a prompt of one token, whose hidden state is replaced: any token gives the same.
    """

    def replace(hidden: torch.Tensor) -> torch.Tensor:
        place = backbone.device_of(backbone.arch.n_layers - 1)
        return torch.as_tensor(vector).to(place, hidden.dtype).expand_as(hidden)

    with backbone.running():
        with _passing_blocks_by(backbone), editing_outputs([(backbone.arch.blocks[-1], replace)]):
            hidden = last_hidden(backbone, [bos])
        best = logprobs(backbone, hidden)[0].exp().topk(N_DECODED)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@contextmanager
def _passing_blocks_by(backbone: Backbone) -> Iterator[None]:
    """While open, blocks after the first pass on the first one's output, in whatever form: where the last one's output
    is replaced anyway, they need not run. The hooks of those between, which bring weights, do not run either."""
    first, *others = backbone.arch.blocks
    given: list[Any] = []
    handle = first.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        instead: list[tuple[Any, Any]] = [(block, lambda *_, **__: given[-1]) for block in others]
        with called_instead(instead[:-1]), replaced(instead[-1:]):
            yield
    finally:
        handle.remove()


def _score(
    backbone: Backbone,
    prompts: TokenIds,
    answers: TokenIds,
    lengths: Sequence[int],
    injection: Injection | None,
) -> list[ScoredAnswer]:
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]
    hidden = _hidden(backbone, whole, starts, injection)
    # One row for each token of each answer: the hidden state that it is predicted from.
    at = [(n, starts[n] + i) for n, answer in enumerate(answers) for i in range(len(answer))]
    of_prompts, places = (sent(numbers, hidden.device) for numbers in zip(*at, strict=True))
    rows, tokens = hidden[of_prompts, places], sent([t for answer in answers for t in answer], hidden.device)
    ends = list(itertools.accumulate(len(answer) for answer in answers))
    begins = [0, *ends[:-1]]
    parts = []
    for some in slices(len(rows), _TOKENS_A_CHUNK):
        of_all = logprobs(backbone, rows[some])
        its_own = of_all.gather(1, tokens[some, None])
        # Ranks and top tokens for first tokens alone: for all tokens they would cost as much as the logits.
        firsts = torch.tensor([n - some.start for n in begins if some.start <= n < some.stop], dtype=torch.int64)
        firsts = sent(firsts, hidden.device)
        of_firsts = of_all[firsts]
        rank = 1 + (of_firsts > its_own[firsts]).sum(1)
        best = of_firsts.topk(N_TOP)
        parts.append((its_own[:, 0], of_all.argmax(-1), rank, best.indices, best.values.exp()))
    logprob, likeliest, rank, top_ids, top_p = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
    per_answer = [likeliest[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return [
        ScoredAnswer(
            logprob=math.fsum(logprob[begin:end]),
            rank=its_rank,
            top=list(zip(its_ids, its_p, strict=True)),
            written=written,
        )
        for begin, end, its_rank, its_ids, its_p, written in zip(
            begins,
            ends,
            rank,
            top_ids,
            top_p,
            _written(backbone, prompts, answers, per_answer, lengths, injection),
            strict=True,
        )
    ]


def _written(
    backbone: Backbone,
    prompts: TokenIds,
    answers: TokenIds,
    likeliest: TokenIds,
    lengths: Sequence[int],
    injection: Injection | None,
) -> list[list[int]]:
    """Greedy continuations of these ``lengths``. ``likeliest`` are the most probable tokens where the answer itself
    was the input: up to and with the first that differs from the answer, they are the greedy continuation. The rest
    takes whole passes, without a cache: answers are a few tokens long."""
    written = []
    for answer, tokens, length in zip(answers, likeliest, lengths, strict=True):
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer, tokens, strict=True)))
        written.append(list(tokens[: min(right + 1, length)]))
    while going := [n for n in range(len(answers)) if len(written[n]) < lengths[n]]:
        texts = [[*prompts[n], *written[n]] for n in going]
        starts = [len(prompts[n]) - 1 for n in going]
        hidden = _hidden(backbone, texts, starts, injection and injection.of(going))
        rows, ends = (sent(numbers, hidden.device) for numbers in (range(len(going)), [len(t) - 1 for t in texts]))
        last = hidden[rows, ends]
        for n, token in zip(going, logprobs(backbone, last).argmax(-1).tolist(), strict=True):
            written[n].append(token)
    return written


def _hidden(backbone: Backbone, texts: TokenIds, starts: Sequence[int], injection: Injection | None) -> torch.Tensor:
    """Final normed hidden states (N, P, resid_dim), the vector added at every token from ``starts[n]`` on."""
    ids, mask, _ = pad_right(texts, backbone.device)
    is_padded = len({*map(len, texts)}) > 1
    with _adding(backbone, starts, injection), masks_without_waiting(is_padded=is_padded), attending_within(backbone):
        return backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]


def _adding(backbone: Backbone, starts: Sequence[int], injection: Injection | None) -> AbstractContextManager[None]:
    if injection is None:
        return nullcontext()
    place = backbone.device_of(injection.layer)
    vectors = sent(injection.vector, place).reshape(-1, 1, injection.vector.shape[-1])
    begin = sent(starts, place)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        on = torch.arange(hidden.shape[1], device=hidden.device)[None] >= begin[:, None]
        return hidden + on[..., None] * vectors.to(hidden.dtype)

    return editing_outputs([(backbone.arch.blocks[injection.layer], add)])
