"""Attention of each copy to its prompt's prefix and to itself, where attention.py has the plain form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from relfv.engine.arithmetic.kernels.formulas import SHAPES, tanh


@triton.jit
def _cut(x):
    """Cut float32 numbers into three bf16 pieces that sum to them."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, a_2, a_3, b, EXACT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Compute a @ b (or its transpose); ``a`` is cut already. It sums the products of pieces that float32 would see,
    the smallest first: six bf16 products take less time than the three TF32 ones of the same numbers."""
    if EXACT:
        b, b_2, b_3 = _cut(b)
        if TRANSPOSED:
            b, b_2, b_3 = tl.trans(b), tl.trans(b_2), tl.trans(b_3)
        out = tl.dot(a_3, b)
        out = tl.dot(a, b_3, out)
        out = tl.dot(a_2, b_2, out)
        out = tl.dot(a_2, b, out)
        out = tl.dot(a, b_2, out)
        return tl.dot(a, b, out)
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.dot(a, tl.trans(b) if TRANSPOSED else b)


@triton.jit
def _whole(
    x, at, base, base_at, cos, sin, columns, mask,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, BASED: tl.constexpr,
):  # fmt: skip
    """Load rows of queries, keys or values, rotated and with their base added where that has waited."""
    value = tl.load(x + at[:, None] + columns[None, :], mask=mask, other=0.0)
    if ROTATED:
        paired = (columns + HEAD_DIM // 2) % HEAD_DIM
        other = tl.load(x + at[:, None] + paired[None, :], mask=mask, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * cos[None, :] + other * sin[None, :]
    if BASED:
        value += tl.load(base + base_at[:, None] + columns[None, :], mask=mask, other=0.0)
    return value.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=SHAPES)
def _attend_kernel(
    q, k, v, k_prefix, v_prefix, lengths, sinks, cos_of, sin_of, q_base, k_base, v_base, out,
    n_copies, n_prefix, window, scale, softcap, q_prompt, q_head, q_copy, k_prompt, k_head, k_copy,
    v_prompt, v_head, v_copy, kp_prompt, kp_head, kp_token, vp_prompt, vp_head, vp_token,
    out_prompt, out_copy, out_head, angle_prompt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    CAUSAL: tl.constexpr, ROTATED: tl.constexpr, BASED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    prompt, kv_head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    # Heads that share keys are rows of one tile: the prefix is read, and cut into pieces, once for all of them.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    copies, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, DIM)
    inside = columns < HEAD_DIM
    mask = (copies < n_copies)[:, None] & inside[None, :]
    cos, sin = columns, columns
    if ROTATED:
        cos = tl.load(cos_of + prompt * angle_prompt + columns, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_of + prompt * angle_prompt + columns, mask=inside, other=0.0).to(tl.float32)
        sin = tl.where(columns < HEAD_DIM // 2, -sin, sin)
    # Bases, (N, heads, head_dim), are one for all copies of a prompt.
    in_base = (prompt * tl.num_programs(1) * GROUP + head) * HEAD_DIM
    own_in_base = (prompt * tl.num_programs(1) + kv_head) * HEAD_DIM + tl.zeros_like(head)
    query = _whole(q, prompt * q_prompt + head * q_head + copies * q_copy, q_base, in_base, cos, sin, columns, mask,
                   HEAD_DIM, ROTATED, BASED)  # fmt: skip
    # Before the prefix is read: from then on registers hold the queries' pieces, not the queries.
    own_key = _whole(k, prompt * k_prompt + kv_head * k_head + copies * k_copy, k_base, own_in_base, cos, sin, columns,
                     mask, HEAD_DIM, ROTATED, BASED)  # fmt: skip
    own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scale
    if CAPPED:
        own = softcap * tanh(own / softcap)
    part, part_2, part_3 = _cut(query) if EXACT else (query, 0, 0)
    # Tokens of a prompt are copies that see those before them.
    last = copies[:, None] if CAUSAL else tl.load(lengths + prompt)
    first = tl.maximum(last - window + 1, 0)
    stop = tl.minimum(n_prefix, tl.max(last) if CAUSAL else last)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, stop, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        seen = (tokens[None, :] < last) & (tokens[None, :] >= first)
        loaded = (tokens < n_prefix)[:, None] & inside[None, :]
        keys = tl.load(k_prefix + prompt * kp_prompt + kv_head * kp_head + tokens[:, None] * kp_token
                       + columns[None, :], mask=loaded, other=0.0)  # fmt: skip
        values = tl.load(v_prefix + prompt * vp_prompt + kv_head * vp_head + tokens[:, None] * vp_token
                       + columns[None, :], mask=loaded, other=0.0)  # fmt: skip
        scores = _dot(part, part_2, part_3, keys, EXACT, True) * scale
        if CAPPED:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(seen, scores, float("-inf"))
        # -inf minus -inf is NaN: a block in which nothing is seen keeps the maximum finite.
        higher = tl.maximum(tl.maximum(best, tl.max(scores, 1)), -1e30)
        shrink = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weight, weight_2, weight_3 = _cut(weights) if EXACT else (weights.to(values.dtype), 0, 0)
        mixed = mixed * shrink[:, None] + _dot(weight, weight_2, weight_3, values, EXACT, False)
        best = higher
    own_value = _whole(v, prompt * v_prompt + kv_head * v_head + copies * v_copy, v_base, own_in_base, cos, sin,
                       columns, mask, HEAD_DIM, False, BASED).to(tl.float32)  # fmt: skip
    highest = tl.maximum(best, own)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    prefix_weight = tl.exp(best - highest)
    own_weight = tl.exp(own - highest)
    denominator = total * prefix_weight + own_weight
    if SINKS:
        denominator += tl.exp(sink - highest)
    result = (mixed * prefix_weight[:, None] + own_value * own_weight[:, None]) / denominator[:, None]
    tl.store(out + prompt * out_prompt + (copies * out_copy + head * out_head)[:, None] + columns[None, :],
             result.to(out.dtype.element_ty), mask=mask)  # fmt: skip


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    lengths: torch.Tensor | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    bases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The formula of engine/attention.py in one pass over the prefix: q (N, heads, C, d), k, v (N, kv_heads, C, d),
    prefixes (N, kv_heads, P, d), lengths (N,) -> (N, C, heads, d), contiguous, in q's dtype. float32 inputs are
    multiplied in three bf16 pieces.

    Without lengths copy c sees the first c tokens of the prefix: with k and v for prefixes, attention of whole prompts.
    ``angles``, cos and sin (N or 1, 1, d), rotate q and k, halves paired; then ``bases`` of q, k and v, each (N, heads
    or kv_heads, d), contiguous and rotated themselves, are added.
    """
    n_prompts, n_heads, n_copies, head_dim = q.shape
    n_prefix = k_prefix.shape[2]
    out = torch.empty(n_prompts, n_copies, n_heads, head_dim, dtype=q.dtype, device=q.device)
    group, rows = n_heads // k.shape[1], 64
    grid = (triton.cdiv(n_copies * group, rows), k.shape[1], n_prompts)
    tensors = [q, k, v, k_prefix, v_prefix]
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    strides: list[int] = [s for t in tensors for s in t.stride()[:3]]
    cos, sin = (x.contiguous().expand(n_prompts, 1, head_dim) for x in angles) if angles else (q, q)
    _attend_kernel[grid](
        *tensors, q if lengths is None else lengths, q if sinks is None else sinks, cos, sin, *(bases or (q, k, v)),
        out, n_copies, n_prefix, window if window is not None else 2**31 - 1, scale, softcap or 0.0,
        *strides, *out.stride()[:3], cos.stride(0),
        group, head_dim, max(16, triton.next_power_of_2(head_dim)),
        softcap is not None, sinks is not None, lengths is None, angles is not None, bases is not None,
        rows, 32, q.dtype == torch.float32, num_stages=1,
    )  # fmt: skip
    return out
