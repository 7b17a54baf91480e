"""Cutting float32 numbers into bf16 pieces, and joining, gating and norming products of pieces (see products.py).

Rows of pieces come in one order everywhere: the first pieces of all copies, prompt by prompt, their second pieces and
so on, ``difference`` in all, then as many groups of bases as ``base`` says. With ``base`` 0 there are no differences:
the rows are pieces of the numbers themselves. Those may be some of many: ``places`` (R,) then says where each row is
among the tokens, and nothing is computed of the others.

Behind them are spare rows up to a whole number of tiles, which nobody writes or reads. The library that multiplies
looks for its way anew for each number of rows, which takes the host longer than a short product takes a GPU; and every
q_id has numbers of its own, of tokens and of prompts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from relfv.engine.arithmetic.kernels.formulas import SHAPES, activate

_ROWS = 16
_COLUMNS = 256
_TILE = 128
"""Rows that matrix units multiply at once, however few there are."""


@triton.jit
def _tile(n_copies, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of copies of one prompt: prompt, copies (ROWS, 1), columns (1, COLUMNS), mask."""
    blocks = tl.cdiv(n_copies, ROWS)
    prompt = tl.program_id(0) // blocks
    copies = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return prompt.to(tl.int64), copies, columns, (copies < n_copies) & (columns < width)


@triton.jit
def _places(places, prompt, copies, room, n_copies, PLACED: tl.constexpr):
    """Rows of copies among the rows of hidden states, ``room`` of them to a prompt."""
    if PLACED:
        return tl.load(places + copies, mask=copies < n_copies, other=0)
    return prompt * room + copies


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
def _shared(raw, bias, row, n_prompts, columns, width, BASE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Part that all copies of a prompt have in common: the product of its base, which begins at ``row``, and the
    bias."""
    total = tl.zeros(columns.shape, tl.float32)
    if BASE:
        total += _sum_pieces(raw, row, n_prompts, columns, width, columns < width, BASE)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=SHAPES)
def _split_differences_kernel(
    x, places, out, n_prompts, n_copies, n_rows, width, DIFFERENCE: tl.constexpr, BASE: tl.constexpr,
    PLACED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
    rows = prompt * n_copies + copies
    place = _places(places, prompt, copies, n_copies, n_copies, PLACED)
    value = tl.load(x + place * width + columns, mask=mask, other=0.0)
    if BASE:
        base = tl.load(x + prompt * n_copies * width + columns, mask=columns < width, other=0.0)
        value -= base
        first = (copies == 0) & (columns < width)
        base_rows = DIFFERENCE * n_rows + prompt + copies
        _store_pieces(out, base_rows, n_prompts, columns, width, tl.broadcast_to(base, [ROWS, COLUMNS]), first, BASE)
    _store_pieces(out, rows, n_rows, columns, width, value, mask, DIFFERENCE)


@triton.jit(do_not_specialize=SHAPES)
def _join_differences_kernel(
    raw, bias, onto, places, out, n_prompts, n_copies, n_rows, room, width, DIFFERENCE: tl.constexpr,
    BASE: tl.constexpr, HAS_BIAS: tl.constexpr, ONTO: tl.constexpr, PLACED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
    rows = prompt * n_copies + copies
    value = _sum_pieces(raw, rows, n_rows, columns, width, mask, DIFFERENCE)
    value += _shared(raw, bias, DIFFERENCE * n_rows + prompt, n_prompts, columns, width, BASE, HAS_BIAS)
    if ONTO:
        value += tl.load(onto + rows * width + columns, mask=mask, other=0.0)
    place = _places(places, prompt, copies, room, n_copies, PLACED)
    tl.store(out + place * width + columns, value, mask=mask)


@triton.jit(do_not_specialize=SHAPES)
def _gate_differences_kernel(
    gate, up, gate_bias, up_bias, out, n_prompts, n_copies, n_rows, width,
    KIND: tl.constexpr, DIFFERENCE: tl.constexpr, BASE: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    prompt, copies, columns, mask = _tile(n_copies, width, ROWS, COLUMNS)
    rows = prompt * n_copies + copies
    base_rows = DIFFERENCE * n_rows + prompt
    gate_0 = _shared(gate, gate_bias, base_rows, n_prompts, columns, width, BASE, GATE_BIAS)
    up_0 = _shared(up, up_bias, base_rows, n_prompts, columns, width, BASE, UP_BIAS)
    gate_c = gate_0 + _sum_pieces(gate, rows, n_rows, columns, width, mask, DIFFERENCE)
    up_c = up_0 + _sum_pieces(up, rows, n_rows, columns, width, mask, DIFFERENCE)
    value = activate(gate_c, KIND) * up_c
    if BASE:
        base = activate(gate_0, KIND) * up_0
        value -= base
        first = (copies == 0) & (columns < width)
        _store_pieces(
            out, base_rows + copies, n_prompts, columns, width, tl.broadcast_to(base, [ROWS, COLUMNS]), first, BASE
        )
    _store_pieces(out, rows, n_rows, columns, width, value, mask, DIFFERENCE)


@triton.jit
def _normed(value, factor, width, eps):
    return value * tl.rsqrt(tl.sum(value * value) / width + eps) * factor


@triton.jit(do_not_specialize=SHAPES)
def _norm_differences_kernel(
    x, raw, bias, weight, places, sums, out, n_prompts, n_copies, n_rows, room, width, eps,
    OFFSET: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, DIFFERENCE: tl.constexpr, BASE: tl.constexpr,
    PLACED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_copies, ROWS)
    prompt = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    base_rows = DIFFERENCE * n_rows + prompt
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if ADD:
        added = _shared(raw, bias, base_rows, n_prompts, columns, width, BASE, HAS_BIAS)
    if BASE:
        base = tl.load(x + prompt * room * width + columns, mask=inside, other=0.0)
        if ADD:
            base += added
        base = _normed(base, factor, width, eps)
        if first == 0:
            _store_pieces(out, base_rows, n_prompts, columns, width, base, inside, BASE)
    for copy in range(first, tl.minimum(first + ROWS, n_copies)):
        row = prompt * n_copies + copy
        place = _places(places, prompt, copy, room, n_copies, PLACED)
        value = tl.load(x + place * width + columns, mask=inside, other=0.0)
        if ADD:
            value += _sum_pieces(raw, row, n_rows, columns, width, inside, DIFFERENCE) + added
            tl.store(sums + row * width + columns, value, mask=inside)
        value = _normed(value, factor, width, eps)
        if BASE:
            value -= base
        _store_pieces(out, row, n_rows, columns, width, value, inside, DIFFERENCE)


def split_differences(x: torch.Tensor, difference: int, base: int, places: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (N, C, d) -> bf16 rows, difference * N * C + base * N and spare ones: pieces of x - x[:, :1], then of
    x[:, 0]; without ``base`` pieces of x, of (1, C, d) those at ``places`` alone."""
    n_prompts, n_copies, width = _sizes(x, places)
    x = x.contiguous()
    rows = difference * n_prompts * n_copies + base * n_prompts
    out = _in_tiles(rows, x)
    _split_differences_kernel[_grid(n_prompts, n_copies, width)](
        x, x if places is None else places, out, n_prompts, n_copies, n_prompts * n_copies, width,
        difference, base, places is not None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return out


def join_differences(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    n_prompts: int,
    n_copies: int,
    difference: int,
    base: int,
    onto: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 rows of products -> (N, C, d), added to ``onto`` if it is given; written to ``into``, whose rows of one
    prompt lie together (with ``places`` to those alone), or over ``raw``."""
    width = raw.shape[1]
    out = raw[: n_prompts * n_copies].view(n_prompts, n_copies, width) if into is None else into
    _join_differences_kernel[_grid(n_prompts, n_copies, width)](
        raw, raw if bias is None else bias, raw if onto is None else onto.contiguous(),
        raw if places is None else places, out,
        n_prompts, n_copies, n_prompts * n_copies, out.stride(0) // width, width,
        difference, base, bias is not None, onto is not None, places is not None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return out


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
    """act(gate) * up, from rows of products to rows of pieces."""
    width = gate.shape[1]
    out = torch.empty(gate.shape, dtype=torch.bfloat16, device=gate.device)
    _gate_differences_kernel[_grid(n_prompts, n_copies, width)](
        gate, up, gate if gate_bias is None else gate_bias, up if up_bias is None else up_bias, out,
        n_prompts, n_copies, n_prompts * n_copies, width, activation, difference, base,
        gate_bias is not None, up_bias is not None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return out


def norm_differences(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    difference: int,
    base: int,
    *,
    added: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of x (N, C, d), float32, of what ``added`` has in rows of products, and of ``bias``; and rows of pieces of
    its RMS norm, at ``places`` alone. Writes over ``added``."""
    n_prompts, n_copies, width = _sizes(x, places)
    x = x if x.stride()[1:] == (width, 1) else x.contiguous()
    n_rows = n_prompts * n_copies
    out = _in_tiles(difference * n_rows + base * n_prompts, x)
    sums = x if added is None else added
    # A few copies to a program, or it would read the base as often as copies.
    rows, block = 8 if base else 1, triton.next_power_of_2(width)
    _norm_differences_kernel[(n_prompts * triton.cdiv(n_copies, rows),)](
        x, sums, x if bias is None else bias, weight, x if places is None else places, sums, out,
        n_prompts, n_copies, n_rows, x.stride(0) // width, width, eps,
        offset, added is not None, bias is not None, difference, base, places is not None, rows, block,
        num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip
    return x if added is None else sums[:n_rows].view(n_prompts, n_copies, width), out


def _in_tiles(n_rows: int, x: torch.Tensor) -> torch.Tensor:
    """Room for rows as wide as ``x``, and spare ones."""
    return torch.empty(n_rows + -n_rows % _TILE, x.shape[-1], dtype=torch.bfloat16, device=x.device)


def _sizes(x: torch.Tensor, places: torch.Tensor | None) -> tuple[int, int, int]:
    n_prompts, n_copies, width = x.shape
    return n_prompts, n_copies if places is None else len(places), width


def _grid(n_prompts: int, n_copies: int, width: int) -> tuple[Any, ...]:
    return (n_prompts * triton.cdiv(n_copies, _ROWS), triton.cdiv(width, _COLUMNS))
