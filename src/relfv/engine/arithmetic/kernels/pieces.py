"""Cutting float32 numbers into bf16 pieces, and joining and gating products of pieces (see products.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from relfv.engine.arithmetic.kernels.formulas import SHAPES, activate

_ROWS = 16
_COLUMNS = 256


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


@triton.jit(do_not_specialize=SHAPES)
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


@triton.jit(do_not_specialize=SHAPES)
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


@triton.jit(do_not_specialize=SHAPES)
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
    base = activate(gate_0, KIND) * up_0
    gate_c = gate_0 + _sum_pieces(gate, rows, n_rows, columns, width, mask, DIFFERENCE)
    up_c = up_0 + _sum_pieces(up, rows, n_rows, columns, width, mask, DIFFERENCE)
    value = activate(gate_c, KIND) * up_c - base
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


def _grid(n_prompts: int, n_copies: int, width: int) -> tuple[Any, ...]:
    return (n_prompts * triton.cdiv(n_copies, _ROWS), triton.cdiv(width, _COLUMNS))
