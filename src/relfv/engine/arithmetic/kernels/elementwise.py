"""Kernels for what modules do between products: gates, RMS norms, rotary embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from relfv.engine.arithmetic.kernels.formulas import SHAPES, activate


@triton.jit
def _gate_kernel(gate, up, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    value = activate(tl.load(gate + index, mask=mask, other=0.0).to(tl.float32), KIND)
    value *= tl.load(up + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _in_room(n_copies, room):
    """Index of the program's row where each prompt has ``room`` rows, of which its copies are the first."""
    row = tl.program_id(0).to(tl.int64)
    return row // n_copies * room + row % n_copies


@triton.jit(do_not_specialize=SHAPES)
def _add_kernel(x, added, out, n_copies, room, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    value = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(added + row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + _in_room(n_copies, room) * width + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SHAPES)
def _rms_norm_kernel(
    x, added, weight, sums, out, n_copies, room, width, eps,
    OFFSET: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    in_x = _in_room(n_copies, room) * width
    value = tl.load(x + in_x + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + row + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(sums.dtype.element_ty)
        tl.store(sums + row + columns, rounded, mask=mask)
        value = rounded.to(tl.float32)
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


@triton.jit(do_not_specialize=SHAPES)
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


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, computed in float32, in the dtype of ``gate``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gate_kernel[(triton.cdiv(out.numel(), 2048),)](gate, up, out, out.numel(), activation, 2048)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / rms(x) * (weight + offset) over the last axis, computed in float32, in the dtype of ``x``."""
    return _rms_norm(x, None, weight, eps, offset)[1]


def add_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added, rounded to their dtype, and its ``rms_norm``."""
    return _rms_norm(x, added.contiguous(), weight, eps, offset)


def add(x: torch.Tensor, added: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """x + added, (N, C, d), rounded to their dtype; ``into``, where it is written, may have room for more copies."""
    x, added = x.contiguous(), added.contiguous()
    n_prompts, n_copies, width = x.shape
    block = triton.next_power_of_2(width)
    _add_kernel[(n_prompts * n_copies,)](
        x, added, into, n_copies, into.stride(0) // width, width, block, num_warps=_warps(block)
    )
    return into


def _rms_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    in_room = x.dim() == 3 and x.stride()[1:] == (width, 1)
    x = x if in_room else x.contiguous()
    n_copies, room = (x.shape[1], x.stride(0) // width) if in_room else (1, 1)
    out, sums = torch.empty(x.shape, dtype=x.dtype, device=x.device), x
    if added is not None:
        sums = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(x.numel() // width,)](
        x, x if added is None else added, weight, sums, out, n_copies, room, width, eps,
        offset, added is not None, block, num_warps=_warps(block),
    )  # fmt: skip
    return sums, out


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


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
