"""Fused Triton kernels for what is left of a pass when the matrix products are taken away.

On a GPU the products of the sweep take a few hundred milliseconds, and elementwise PyTorch, one kernel and one trip
through memory per operation, would take as long again. Each kernel here does one module's elementwise work in one
trip. Triton compiles each in a fraction of a second and caches it on disk, so even a single q_id gains; torch.compile
of the same pieces takes tens of seconds first, more than a dozen q_ids give back.

Whatever a kernel does can be done without it: by plain PyTorch beside its caller (products.py, attention.py, readout.py)
or by the module whose place it takes (fusion.py). That is what runs without CUDA or Triton, and what tests compare
with. Nothing here knows models or modules.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # CPU builds of PyTorch come without Triton
    AVAILABLE = False

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_SHAPES = ["n_prompts", "n_copies", "n_rows", "n_prefix", "row_0", "window"]
"""Arguments that differ from pass to pass: a kernel made for one value of them would be made again for the next."""

_ROWS = 16
_COLUMNS = 256


def usable(tensor: torch.Tensor) -> bool:
    """True if kernels can run where ``tensor`` is."""
    return AVAILABLE and tensor.is_cuda


if AVAILABLE:

    @triton.jit
    def _tanh(x):
        # The quotient cancels near 0, where soft caps mostly are; the series is exact to float32 there.
        square = x * x
        series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        return tl.where(square < 0.09, series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)

    @triton.jit
    def _tile(n_copies, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """A tile of copies of one prompt: prompt, copies (ROWS, 1), columns (1, COLUMNS), mask."""
        blocks = tl.cdiv(n_copies, ROWS)
        prompt = tl.program_id(0) // blocks
        copies = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        return prompt.to(tl.int64), copies, columns, (copies < n_copies) & (columns < width)

    @triton.jit
    def _store_pieces(out, rows, n_rows, columns, width, value, mask, PIECES: tl.constexpr):
        """bf16 pieces that sum to ``value``: piece i goes to row ``rows + i * n_rows``."""
        for i in tl.static_range(PIECES):
            piece = value.to(tl.bfloat16)
            tl.store(out + (rows + i * n_rows) * width + columns, piece, mask=mask)
            value -= piece.to(tl.float32)

    @triton.jit
    def _sum_pieces(raw, rows, n_rows, columns, width, mask, PIECES: tl.constexpr):
        total = tl.load(raw + rows * width + columns, mask=mask, other=0.0)
        for i in tl.static_range(1, PIECES):
            total += tl.load(raw + (rows + i * n_rows) * width + columns, mask=mask, other=0.0)
        return total

    @triton.jit
    def _add_bias(total, bias, columns, width, HAS_BIAS: tl.constexpr):
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
        return total

    @triton.jit(do_not_specialize=_SHAPES)
    def _split_differences_kernel(
        x, out, n_prompts, n_copies, n_rows, width,
        DIFFERENCE: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
        rows = prompt * n_copies + copies
        base = tl.load(x + prompt * n_copies * width + columns, mask=columns < width, other=0.0)
        value = tl.load(x + rows * width + columns, mask=mask, other=0.0) - base
        _store_pieces(out, rows, n_rows, columns, width, value, mask, DIFFERENCE)
        first = (copies == 0) & (columns < width)
        base_rows = DIFFERENCE * n_rows + prompt + copies
        _store_pieces(out, base_rows, n_prompts, columns, width, tl.broadcast_to(base, [ROWS, COLUMNS]), first, BASE)

    @triton.jit(do_not_specialize=_SHAPES)
    def _join_differences_kernel(
        raw, bias, n_prompts, n_copies, n_rows, width,
        DIFFERENCE: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
        rows = prompt * n_copies + copies
        base = _sum_pieces(raw, DIFFERENCE * n_rows + prompt, n_prompts, columns, width, columns < width, BASE)
        base = _add_bias(base, bias, columns, width, HAS_BIAS)
        value = _sum_pieces(raw, rows, n_rows, columns, width, mask, DIFFERENCE)
        tl.store(raw + rows * width + columns, value + base, mask=mask)

    @triton.jit
    def _activate(x, KIND: tl.constexpr):
        if KIND == "silu":
            return x / (1.0 + tl.exp(-x))
        elif KIND == "gelu_tanh":  # noqa: RET505 (Triton compiles one branch)
            return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        else:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))

    @triton.jit(do_not_specialize=_SHAPES)
    def _gate_differences_kernel(
        gate, up, gate_bias, up_bias, out, n_prompts, n_copies, n_rows, width,
        KIND: tl.constexpr, DIFFERENCE: tl.constexpr, BASE: tl.constexpr,
        GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
        rows = prompt * n_copies + copies
        base_rows = DIFFERENCE * n_rows + prompt
        inside = columns < width
        gate_0 = _sum_pieces(gate, base_rows, n_prompts, columns, width, inside, BASE)
        gate_0 = _add_bias(gate_0, gate_bias, columns, width, GATE_BIAS)
        up_0 = _sum_pieces(up, base_rows, n_prompts, columns, width, inside, BASE)
        up_0 = _add_bias(up_0, up_bias, columns, width, UP_BIAS)
        base = _activate(gate_0, KIND) * up_0
        gate_c = gate_0 + _sum_pieces(gate, rows, n_rows, columns, width, mask, DIFFERENCE)
        up_c = up_0 + _sum_pieces(up, rows, n_rows, columns, width, mask, DIFFERENCE)
        value = _activate(gate_c, KIND) * up_c - base
        _store_pieces(out, rows, n_rows, columns, width, value, mask, DIFFERENCE)
        first = (copies == 0) & inside
        _store_pieces(
            out, base_rows + copies, n_prompts, columns, width, tl.broadcast_to(base, [ROWS, COLUMNS]), first, BASE
        )

    @triton.jit
    def _split_kernel(x, out, count, PIECES: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < count
        value = tl.load(x + index, mask=mask, other=0.0)
        for _ in tl.static_range(PIECES):
            piece = value.to(tl.bfloat16)
            tl.store(out + index, piece, mask=mask)
            value -= piece.to(tl.float32)
            index += count

    @triton.jit
    def _gate_kernel(gate, up, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < count
        value = _activate(tl.load(gate + index, mask=mask, other=0.0).to(tl.float32), KIND)
        value *= tl.load(up + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + index, value.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _rms_norm_kernel(x, weight, out, width, eps, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * width
        columns = tl.arange(0, BLOCK)
        mask = columns < width
        value = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / width + eps)
        factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
        tl.store(out + row + columns, (value * scale * factor).to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _rotate_heads(
        x, out, cos_1, cos_2, sin_1, sin_2, n_heads, half, x_head, out_head,
        HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        heads = tl.arange(0, HEADS)[:, None]
        columns = tl.arange(0, HALF)[None, :]
        mask = (heads < n_heads) & (columns < half)
        x_1 = tl.load(x + heads * x_head + columns, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x + heads * x_head + columns + half, mask=mask, other=0.0).to(tl.float32)
        out += heads * out_head + columns
        tl.store(out, (x_1 * cos_1 - x_2 * sin_1).to(out.dtype.element_ty), mask=mask)
        tl.store(out + half, (x_2 * cos_2 + x_1 * sin_2).to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=_SHAPES)
    def _rotate_kernel(
        q, k, cos, sin, q_out, k_out, n_copies, half,
        q_prompt, q_head, q_copy, k_prompt, k_head, k_copy, angle_prompt, angle_copy,
        Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        prompt = (tl.program_id(0) // n_copies).to(tl.int64)
        copy = (tl.program_id(0) % n_copies).to(tl.int64)
        columns = tl.arange(0, HALF)[None, :]
        angle = prompt * angle_prompt + copy * angle_copy + columns
        inside = columns < half
        cos_1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        row = prompt * n_copies + copy
        _rotate_heads(
            q + prompt * q_prompt + copy * q_copy, q_out + row * Q_HEADS * 2 * half, cos_1, cos_2, sin_1, sin_2,
            Q_HEADS, half, q_head, 2 * half, Q_BLOCK, HALF,
        )  # fmt: skip
        _rotate_heads(
            k + prompt * k_prompt + copy * k_copy, k_out + row * K_HEADS * 2 * half, cos_1, cos_2, sin_1, sin_2,
            K_HEADS, half, k_head, 2 * half, K_BLOCK, HALF,
        )  # fmt: skip

    @triton.jit(do_not_specialize=_SHAPES)
    def _attend_kernel(
        q, k, v, k_prefix, v_prefix, lengths, sinks, out,
        n_copies, n_prefix, window, scale, softcap,
        q_prompt, q_head, q_copy, k_prompt, k_head, k_copy, v_prompt, v_head, v_copy,
        kp_prompt, kp_head, kp_token, vp_prompt, vp_head, vp_token, out_prompt, out_copy, out_head,
        GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
        COPIES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        prompt, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
        kv_head = head // GROUP
        copies = tl.program_id(0) * COPIES + tl.arange(0, COPIES)
        columns = tl.arange(0, DIM)
        inside = columns < HEAD_DIM
        mask = (copies < n_copies)[:, None] & inside[None, :]
        query = tl.load(
            q + prompt * q_prompt + head * q_head + copies[:, None] * q_copy + columns[None, :], mask=mask, other=0.0
        )
        last = tl.load(lengths + prompt)
        first = tl.maximum(last - window + 1, 0)
        best = tl.full([COPIES], float("-inf"), tl.float32)
        total = tl.zeros([COPIES], tl.float32)
        mixed = tl.zeros([COPIES, DIM], tl.float32)
        for start in range(0, n_prefix, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            seen = (tokens < last) & (tokens >= first)
            loaded = (tokens < n_prefix)[:, None] & inside[None, :]
            keys = tl.load(
                k_prefix + prompt * kp_prompt + kv_head * kp_head + tokens[:, None] * kp_token + columns[None, :],
                mask=loaded, other=0.0,
            )  # fmt: skip
            values = tl.load(
                v_prefix + prompt * vp_prompt + kv_head * vp_head + tokens[:, None] * vp_token + columns[None, :],
                mask=loaded, other=0.0,
            )  # fmt: skip
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            if CAPPED:
                scores = softcap * _tanh(scores / softcap)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # -inf minus -inf is NaN: a block in which nothing is seen keeps the maximum finite.
            higher = tl.maximum(tl.maximum(best, tl.max(scores, 1)), -1e30)
            shrink = tl.exp(best - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
            best = higher
        own_key = tl.load(
            k + prompt * k_prompt + kv_head * k_head + copies[:, None] * k_copy + columns[None, :], mask=mask, other=0.0
        )
        own_value = tl.load(
            v + prompt * v_prompt + kv_head * v_head + copies[:, None] * v_copy + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scale
        if CAPPED:
            own = softcap * _tanh(own / softcap)
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
        tl.store(
            out + prompt * out_prompt + copies[:, None] * out_copy + head * out_head + columns[None, :],
            result.to(out.dtype.element_ty), mask=mask,
        )  # fmt: skip

    @triton.jit(do_not_specialize=_SHAPES)
    def _read_kernel(
        raw, base, targets, logit, logprob, top, row_0, vocabulary, n_copies, base_prompt, scale, softcap,
        CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        prompt = (row_0 + row) // n_copies
        raw += row * vocabulary
        base += prompt * base_prompt
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        where = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < vocabulary
            value = tl.load(raw + index, mask=mask, other=0.0) + tl.load(base + index, mask=mask, other=0.0)
            value *= scale
            if CAPPED:
                value = softcap * _tanh(value / softcap)
            value = tl.where(mask, value, float("-inf"))
            higher = tl.maximum(best, value)
            # A lane that has seen nothing has -inf on both sides; its sum stays 0.
            total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(best - higher) + tl.exp(value - higher))
            where = tl.where(value > best, index, where)
            best = higher
        highest = tl.max(best, 0)
        lse = highest + tl.log(tl.sum(total * tl.exp(best - highest), 0))
        target = tl.load(targets + prompt)
        value = (tl.load(raw + target) + tl.load(base + target)) * scale
        if CAPPED:
            value = softcap * _tanh(value / softcap)
        tl.store(logit + row, value)
        tl.store(logprob + row, value - lse)
        tl.store(top + row, tl.min(tl.where(best == highest, where, 2147483647), 0).to(tl.int64))


def split(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """float32 (R, d) -> bf16 (pieces * R, d): rows of pieces that sum to x, most significant first."""
    x = x.contiguous()
    out = torch.empty(pieces * x.shape[0], x.shape[1], dtype=torch.bfloat16, device=x.device)
    _split_kernel[(triton.cdiv(x.numel(), 2048),)](x, out, x.numel(), pieces, 2048)
    return out


def split_differences(x: torch.Tensor, difference: int, base: int) -> torch.Tensor:
    """float32 (N, C, d) -> bf16 (difference * N * C + base * N, d): pieces of x - x[:, :1], then of x[:, 0]."""
    n_prompts, n_copies, width = x.shape
    x = x.contiguous()
    rows = difference * n_prompts * n_copies + base * n_prompts
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    _split_differences_kernel[_grid(n_prompts, n_copies, width)](
        x, out, n_prompts, n_copies, n_prompts * n_copies, width, difference, base, _ROWS, _COLUMNS
    )
    return out


def join_differences(
    raw: torch.Tensor, bias: torch.Tensor | None, n_prompts: int, n_copies: int, difference: int, base: int
) -> torch.Tensor:
    """float32 rows of products, in the order of ``split_differences`` -> (N, C, d); writes over ``raw``."""
    width = raw.shape[1]
    _join_differences_kernel[_grid(n_prompts, n_copies, width)](
        raw, raw if bias is None else bias, n_prompts, n_copies, n_prompts * n_copies, width,
        difference, base, bias is not None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return raw[: n_prompts * n_copies].view(n_prompts, n_copies, width)


def gate_differences(
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    n_prompts: int,
    n_copies: int,
    difference: int,
    base: int,
) -> torch.Tensor:
    """act(gate) * up from rows of products to rows of pieces, both in the order of ``split_differences``."""
    width = gate.shape[1]
    out = torch.empty(gate.shape, dtype=torch.bfloat16, device=gate.device)
    _gate_differences_kernel[_grid(n_prompts, n_copies, width)](
        gate, up, gate if gate_bias is None else gate_bias, up if up_bias is None else up_bias, out,
        n_prompts, n_copies, n_prompts * n_copies, width, activation, difference, base,
        gate_bias is not None, up_bias is not None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return out


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, computed in float32, in the dtype of ``gate``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gate_kernel[(triton.cdiv(out.numel(), 2048),)](gate, up, out, out.numel(), activation, 2048)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / rms(x) * (weight + offset) over the last axis, computed in float32, in the dtype of ``x``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(x.numel() // width,)](
        x, weight, out, width, eps, offset, block, num_warps=min(16, max(1, block // 512))
    )
    return out


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of q, k (N, heads, C, d) by cos, sin (N or 1, C or 1, d), halves paired; computed in float32."""
    n_prompts, _, n_copies, width = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos = cos.contiguous().expand(n_prompts, n_copies, width)
    sin = sin.contiguous().expand(n_prompts, n_copies, width)
    # Laid out as (N, C, heads, d), which is how projections write it and the output projection reads it.
    q_out, k_out = (torch.empty(n_prompts, n_copies, x.shape[1], width, dtype=x.dtype, device=x.device) for x in (q, k))
    _rotate_kernel[(n_prompts * n_copies,)](
        q, k, cos, sin, q_out, k_out, n_copies, width // 2, *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2],
        q.shape[1], k.shape[1], triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(k.shape[1]),
        triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_prefix: torch.Tensor,
    v_prefix: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """attention.py's split form: q (N, heads, C, d), k, v (N, kv_heads, C, d), prefixes (N, kv_heads, P, d), lengths (N,)
    -> (N, C, heads, d), contiguous, in q's dtype. float32 inputs are multiplied in three TF32 parts."""
    n_prompts, n_heads, n_copies, head_dim = q.shape
    n_prefix = k_prefix.shape[2]
    out = torch.empty(n_prompts, n_copies, n_heads, head_dim, dtype=q.dtype, device=q.device)
    full = q.dtype == torch.float32
    copies = 32 if full else 64  # larger tiles of float32 spill
    grid = (triton.cdiv(n_copies, copies), n_heads, n_prompts)
    tensors = [q, k, v, k_prefix, v_prefix]
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    strides: list[int] = [s for t in tensors for s in t.stride()[:3]]
    _attend_kernel[grid](
        *tensors, lengths, q if sinks is None else sinks, out,
        n_copies, n_prefix, window if window is not None else 2**31 - 1, scale, softcap or 0.0,
        *strides, *out.stride()[:3],
        n_heads // k.shape[1], head_dim, max(16, triton.next_power_of_2(head_dim)), softcap is not None, sinks is not None,
        copies, 32, "tf32x3" if full else "ieee", num_stages=1 if full else 2,
    )  # fmt: skip
    return out


def read(
    raw: torch.Tensor,
    base: torch.Tensor,
    targets: torch.Tensor,
    *,
    row_0: int,
    n_copies: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row r of ``raw`` (R, V): logits = cap(scale * (raw[r] + base[n])), n = (row_0 + r) // n_copies; ``base`` is
    (N, V), or (1, V) for all.

    -> float32 logit and logprob of targets[n], int64 id of the largest logit (the lowest id of equals); each (R,).
    """
    rows, vocabulary = raw.shape
    logit = torch.empty(rows, dtype=torch.float32, device=raw.device)
    logprob = torch.empty_like(logit)
    top = torch.empty(rows, dtype=torch.int64, device=raw.device)
    _read_kernel[(rows,)](
        raw, base, targets, logit, logprob, top, row_0, vocabulary, n_copies,
        vocabulary if len(base) > 1 else 0, scale, softcap or 0.0, softcap is not None, 4096, num_warps=8,
    )  # fmt: skip
    return logit, logprob, top


def _grid(n_prompts: int, n_copies: int, width: int) -> tuple[Any, ...]:
    return (n_prompts * triton.cdiv(n_copies, _ROWS), triton.cdiv(width, _COLUMNS))
