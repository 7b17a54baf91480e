"""Read-out of copies: from final hidden states through the vocabulary to three numbers a copy, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from relfv.engine.arithmetic import kernels
from relfv.engine.arithmetic.matmul import product
from relfv.engine.arithmetic.products import Differences, Pieces, takes_bf16
from relfv.models.architecture import Architecture
from relfv.models.packed import weight_of

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Memory for one chunk's float32 logits and their temporaries."""
_TILE_ROWS, _TILE_TOKENS = 512, 2048
"""Rows and tokens of a CPU's tiles: 4 MiB of logits, which its cache still holds when they are read again."""
_FEW_ROWS = 32
"""Rows whose logits of a large vocabulary are whole in memory, several times over."""

N_LIKELIEST = 4096
"""Likeliest tokens that ``likeliest_tokens`` gives: 1/64 of a vocabulary of 262,144."""
N_OTHERS = 2048
"""Further tokens that it gives, which stand for all others."""
_FLATTENED = 0.7
"""Power of the probabilities by which the ``N_OTHERS`` tokens are chosen. With 1 hardly any is one that an edit makes
likely, and P comes out too high; with less, what is likely already is known less well. Measured: docs/statistics.md."""

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logit and log-probability of the target, and the most probable token."""

_Chunks = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Likeliest:
    """The tokens that stand for all others where copies of N prompts are read out in brief, and what they say of the
    others without an edit."""

    tokens: torch.Tensor
    """int64 (N, 1 + N_LIKELIEST + N_OTHERS): the target, the ``N_LIKELIEST`` tokens that are likeliest without an edit,
    and ``N_OTHERS`` of the others."""
    rest: torch.Tensor
    """float32 (N, 1): log of the sum over all others, without an edit."""
    shares: torch.Tensor
    """float32 (N, N_OTHERS): log of the share of that sum that each of the ``N_OTHERS`` stands for, less its logit, so
    that with an edit the sum has grown by the sum of these shares."""

    def __getitem__(self, part: slice) -> Likeliest:
        """Those of some of the prompts."""
        return Likeliest(self.tokens[part], self.rest[part], self.shares[part])


def score(
    arch: Architecture,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    pieces: Pieces | None,
    may_use_kernels: bool,
    likeliest: Likeliest | None = None,
) -> Scores:
    """Score copies as ``Arithmetic.read_out`` does, over the ``likeliest`` tokens if they are given. ``pieces`` is None
    where ``lm_head`` does not multiply in pieces."""
    n_prompts, n_copies, _ = hidden.shape
    if likeliest:
        return _together(_score_over_likeliest(arch, hidden, likeliest), n_prompts, n_copies)
    if in_tiles(arch.lm_head, hidden.device):
        rows = hidden.flatten(0, 1).split(_TILE_ROWS)
        wanted = targets.repeat_interleave(n_copies).split(_TILE_ROWS)
        tiled = [_score_in_tiles(arch, *part) for part in zip(rows, wanted, strict=True)]
        return _together(tiled, n_prompts, n_copies)
    by_kernel = may_use_kernels and kernels.usable(hidden)
    base, chunks = _raw_logits(arch, hidden, pieces, may_use_kernels)
    scores = [
        _score_by_kernel(arch, raw, base, targets, start, n_copies)
        if by_kernel
        else _score_plainly(arch, raw, base, targets, start, n_copies)
        for start, raw in chunks
    ]
    return _together(scores, n_prompts, n_copies)


def _together(scores: Iterable[Scores], n_prompts: int, n_copies: int) -> Scores:
    logit, logprob, top = (torch.cat(parts).view(n_prompts, n_copies) for parts in zip(*scores, strict=True))
    return logit, logprob, top


def in_tiles(head: nn.Module, device: torch.device) -> bool:
    """Whether a CPU reads a vocabulary out in tiles: a large one, of float weights as PyTorch multiplies them."""
    if device.type != "cpu" or type(head) is not nn.Linear:
        return False
    return len(head.weight) > 4 * _TILE_TOKENS and head.weight.is_floating_point()


def _tiles(arch: Architecture, rows: torch.Tensor) -> _Chunks:
    """Logits of ``rows`` (R, resid_dim), some tokens at a time: (first token, float32 (R, tokens)).

    A row of a large vocabulary is a megabyte: in whole rows the logits are written to memory and read back four times,
    and the weights once for every few rows. A tile of both stays in the cache; in all it takes less than half the time.
    """
    head: Any = arch.lm_head
    rows = rows.float()
    for start in range(0, len(head.weight), _TILE_TOKENS):
        part = slice(start, start + _TILE_TOKENS)
        bias = None if head.bias is None else head.bias[part].float()
        yield start, arch.final_logits(nn.functional.linear(rows, head.weight[part].float(), bias))


def _score_in_tiles(arch: Architecture, rows: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Scores of ``rows`` (R, resid_dim) for their ``targets`` (R,), read out in tiles."""
    logit, largest = torch.empty(len(rows)), torch.full((len(rows),), -torch.inf)
    top, sums = torch.zeros(len(rows), dtype=torch.int64), []
    for start, logits in _tiles(arch, rows):
        here = ((targets >= start) & (targets < start + logits.shape[1])).nonzero()[:, 0]
        logit[here] = logits[here, targets[here] - start]
        of_tile = logits.amax(dim=1)
        # Few rows have to look for a new most probable token; of equal logits it is the first, as in argmax.
        higher = (of_tile > largest).nonzero()[:, 0]
        top[higher] = start + logits[higher].argmax(dim=1)
        largest = torch.maximum(of_tile, largest)
        sums.append(logits.logsumexp(dim=1))
    return logit, logit - torch.stack(sums, dim=1).logsumexp(dim=1), top


def likeliest_tokens(arch: Architecture, unedited: torch.Tensor, targets: torch.Tensor) -> Likeliest:
    """The tokens over which copies are read out of prompts with these final, normed hidden states ``unedited``
    (N, resid_dim). The ``N_OTHERS`` are importance sampling, at even steps of the cumulated chances and so without
    random numbers."""
    parts = [_likeliest(arch, *some) for some in zip(unedited.split(_FEW_ROWS), targets.split(_FEW_ROWS), strict=True)]
    return Likeliest(*map(torch.cat, zip(*map(astuple, parts), strict=True)))


def _likeliest(arch: Architecture, unedited: torch.Tensor, targets: torch.Tensor) -> Likeliest:
    base = torch.cat([logits for _, logits in _tiles(arch, unedited)], dim=1)
    wanted = base.scatter(1, targets[:, None], torch.inf)  # the target comes first, whatever its logit
    first = wanted.topk(1 + N_LIKELIEST, dim=1).indices
    rest = base.scatter_(1, first, -torch.inf).logsumexp(dim=1, keepdim=True)
    chances = (_FLATTENED * base).log_softmax(dim=1)
    upto = chances.exp().cumsum(1, dtype=torch.float64)
    places = (torch.arange(N_OTHERS, dtype=torch.float64) + 0.5) / N_OTHERS * upto[:, -1:]
    others = torch.searchsorted(upto, places).clamp_(max=base.shape[1] - 1)  # past the end where a logit is NaN
    chance = chances.gather(1, others)
    shares = -chance - (base.gather(1, others) - chance).logsumexp(1, keepdim=True)
    return Likeliest(torch.cat([first, others], dim=1), rest, shares)


def _score_over_likeliest(arch: Architecture, hidden: torch.Tensor, likeliest: Likeliest) -> Iterator[Scores]:
    """Scores of each prompt's copies (N, C, resid_dim) over fewer tokens.

    A token that only an edit makes likely is either not among them, and P is read too high, or stands there for others
    as well, and P is read too low (docs/statistics.md has the sizes).
    """
    head: Any = arch.lm_head
    for copies, tokens, rest, shares in zip(hidden, likeliest.tokens, likeliest.rest, likeliest.shares, strict=True):
        bias = None if head.bias is None else head.bias[tokens].float()
        weight = head.weight.index_select(0, tokens).float()  # a quarter of the time that [tokens] takes
        logits = arch.final_logits(nn.functional.linear(copies.float(), weight, bias))
        of_first, of_others = logits.tensor_split([1 + N_LIKELIEST], dim=1)
        total = torch.logaddexp(of_first.logsumexp(dim=1), rest + (of_others + shares).logsumexp(dim=1))
        yield of_first[:, 0], of_first[:, 0] - total, tokens[of_first.argmax(dim=1)]


def _raw_logits(
    arch: Architecture, hidden: torch.Tensor, pieces: Pieces | None, may_use_kernels: bool
) -> tuple[torch.Tensor, _Chunks]:
    """Output of ``lm_head`` for the copies, as two float32 parts to be added: one of each prompt, (N, V), or (1, V) if
    it is the same for all, and chunks of rows, (start, (R, V)), in the order of the copies."""
    head = arch.lm_head
    rows = hidden.reshape(-1, hidden.shape[-1])
    vocabulary = int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[union-attr]
    chunks = _row_chunks(len(rows), vocabulary, hidden.device.type)
    if pieces is not None and isinstance(head, nn.Linear):
        differences = Differences(pieces)
        split = differences.split(hidden.float())
        base = differences.base(split, head, len(rows), len(hidden))
        return base, differences.products(split, head, len(rows), chunks)
    nothing = torch.zeros(1, vocabulary, device=hidden.device)
    if may_use_kernels and hidden.dtype == torch.bfloat16 and takes_bf16(head, hidden.device):
        base = nothing if head.bias is None else head.bias.float()[None]  # type: ignore[union-attr]
        weight = weight_of(head)
        return base, ((part.start, product(rows[part], weight)) for part in chunks)
    return nothing, ((part.start, head(rows[part].float()).float()) for part in chunks)


def _score_by_kernel(
    arch: Architecture, raw: torch.Tensor, base: torch.Tensor, targets: torch.Tensor, start: int, n_copies: int
) -> Scores:
    return kernels.read(
        raw, base, targets, row_0=start, n_copies=n_copies, scale=arch.logit_scale, softcap=arch.logit_softcap
    )


def _score_plainly(
    arch: Architecture, raw: torch.Tensor, base: torch.Tensor, targets: torch.Tensor, start: int, n_copies: int
) -> Scores:
    prompt = torch.arange(start, start + len(raw), device=raw.device) // n_copies
    logits = arch.final_logits(raw + base[prompt if len(base) > 1 else 0])
    target_logit = logits.gather(1, targets[prompt, None])[:, 0]
    return target_logit, target_logit - logits.logsumexp(dim=1), logits.argmax(dim=1)


def _row_chunks(n_rows: int, vocabulary: int, device: str) -> list[slice]:
    size = max(1, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"]) // (vocabulary * 4 * 3))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
