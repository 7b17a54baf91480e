"""Products of float32 inputs with bf16 weights in pieces, on matrix units that multiply bf16.

The weight is a bf16 number as it is stored; only the float32 input x does not fit the unit. It is the sum of three
pieces (8 bits of mantissa each), and to 2**-17 the sum of two:

    W x = W x_1 + W x_2 + ...                                                        (whole)

with all pieces as rows of one product that accumulates in float32. Two pieces cost what one TF32 product costs (half
the rate, twice the pieces) and are 64 times closer to float32; nothing has to be widened in memory.

On copies one can do better. Every copy of a prompt's last token is the base (copy 0) plus what one edit has changed,
and what is measured is that change. So

    W x_c = W x_0 + W (x_c - x_0)                                                    (differences)

with W x_0 from three pieces, that is in float32, and the difference in one. Its rounding, 2**-9, is relative to the
effect of the edit and not to the activation, so small effects come out better than in TF32 at bf16's full rate, and
an edit that changes nothing has a difference of exactly 0. It holds for any x_0, so where a model calls a linear layer
on something other than copies, the result is merely rounded more; the self-check measures how much.

Everything between the products is computed on float32 activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from relfv.engine.arithmetic import kernels
from relfv.models.packed import is_readable, weight_dtype, weight_of


@dataclass(frozen=True)
class Pieces:
    """How many bf16 numbers a float32 number is split into."""

    whole: int = 2
    """Inputs that are not copies: prefill and ordinary forward passes."""
    base: int = 3
    difference: int = 1
    depth: int | None = None
    """Inputs that one product sums over, where that is not all of them: sums of such products are float32's."""


FLOAT32 = Pieces(whole=3, base=3, difference=3, depth=512)
"""Enough everywhere to be float32 in everything but name. A matrix unit cuts each of its additions short, so its error
grows with their number: on an H100 2e-6 of a product of 2,048 inputs and 1.6e-5 of 28,672, where float32's is 3e-7 and
8e-7. It is alike for all copies of a token; but 80 random layers, 8,192 wide, made 5e-3 nats of it, and 1e-4 so."""


def takes_pieces(module: nn.Module, device: torch.device) -> TypeGuard[nn.Linear]:
    """True for a linear layer that can multiply in pieces on ``device``, and whose ``forward`` is nobody else's."""
    return takes_bf16(module, device) and "forward" not in vars(module)


def takes_bf16(module: nn.Module, device: torch.device) -> TypeGuard[nn.Linear]:
    """True for an ``nn.Linear`` with weights that are bf16, or packed and read in bf16, that runs on a ``device`` where
    bf16 products can come out in float32."""
    if not (type(module) is nn.Linear or is_readable(module)) or not hasattr(torch.ops.aten.mm, "dtype"):  # PyTorch 2.8
        return False
    return weight_dtype(module) == torch.bfloat16 and device.type == "cuda"


@contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any] | None]], name: str = "forward") -> Iterator[None]:
    """While open, each module's ``forward``, or the attribute ``name``, is the given function; hooks on the module stay
    in force."""
    # Not by setattr, where every module first looks through its parameters: this is done twice for every pass.
    before = [(vars(module), vars(module).get(name)) for module, _ in forwards]
    try:
        for module, forward in forwards:
            vars(module)[name] = forward
        yield
    finally:
        for attributes, forward in before:
            if forward is None:
                del attributes[name]
            else:
                attributes[name] = forward


class Whole:
    """Linear layers on float32 inputs (..., in), each split into ``pieces``."""

    def __init__(self, pieces: int, depth: int | None = None) -> None:
        self._pieces, self._depth = pieces, depth
        self._remembered = _Remembering()

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return split(x.reshape(-1, x.shape[-1]), self._pieces)

    def forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """The replacement of ``linear.forward``."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            parts = product(self._remembered(self._split, x), weight_of(linear), self._depth).chunk(self._pieces)
            out = functools.reduce(torch.Tensor.add_, parts)
            return (out if linear.bias is None else out.add_(linear.bias)).view(*x.shape[:-1], -1)

        return forward


class Differences:
    """Linear layers on copies (N, C, in), as bases and differences."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._whole = Whole(pieces.whole, pieces.depth)
        self._remembered = _Remembering()

    def forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """The replacement of ``linear.forward``: (N, C, in) -> (N, C, out)."""
        whole = self._whole.forward(linear)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dim() != 3:  # not laid out as copies: tokens on their way to experts, say
                return whole(x)
            rows = self._product(self._remembered(self.split, x), weight_of(linear))
            return self.join(rows, linear.bias, *x.shape[:2])

        return forward

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (N, C, d) -> bf16 rows: pieces of the differences (N * C each), then of the bases (N each)."""
        if kernels.usable(x):
            return kernels.split_differences(x, self._pieces.difference, self._pieces.base)
        base = x[:, 0]
        return torch.cat(
            [split((x - base[:, None]).flatten(0, 1), self._pieces.difference), split(base, self._pieces.base)]
        )

    def join(self, rows: torch.Tensor, bias: torch.Tensor | None, n_prompts: int, n_copies: int) -> torch.Tensor:
        """Rows of products, float32 -> (N, C, out): base + difference + bias. ``rows`` may be written over."""
        if kernels.usable(rows):
            return kernels.join_differences(rows, bias, n_prompts, n_copies, self._pieces.difference, self._pieces.base)
        n_differences = self._pieces.difference * n_prompts * n_copies
        base = rows[n_differences:].view(self._pieces.base, n_prompts, 1, -1).sum(0)
        difference = rows[:n_differences].view(self._pieces.difference, n_prompts, n_copies, -1).sum(0)
        return difference + (base if bias is None else base + bias)

    def base(self, rows: torch.Tensor, linear: nn.Linear, n_prompts: int) -> torch.Tensor:
        """From rows of pieces the outputs of the bases alone: (N, out)."""
        pieces = rows[len(rows) - self._pieces.base * n_prompts :]
        out = self._product(pieces, weight_of(linear)).view(self._pieces.base, n_prompts, -1).sum(0)
        return out if linear.bias is None else out + linear.bias

    def products(
        self, rows: torch.Tensor, linear: nn.Linear, n_rows: int, parts: Sequence[slice]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """From rows of pieces the outputs of the differences alone, for some of the ``n_rows`` copies at a time:
        (start, (R, out))."""
        weight = weight_of(linear)
        for part in parts:
            starts = [i * n_rows + part.start for i in range(self._pieces.difference)]
            length = part.stop - part.start
            yield (
                part.start,
                functools.reduce(
                    torch.Tensor.add_, (self._product(rows[start : start + length], weight) for start in starts)
                ),
            )

    def gated(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: str, x: torch.Tensor) -> torch.Tensor:
        """down(act(gate(x)) * up(x)) on copies (N, C, in) by kernels, which never write the joined gate and up."""
        n_prompts, n_copies = x.shape[:2]
        self._remembered.forget()
        rows = self.split(x)
        gate_rows, up_rows = self._product(rows, weight_of(gate)), self._product(rows, weight_of(up))
        rows = kernels.gate_differences(
            gate_rows, up_rows, gate.bias, up.bias, activation, n_prompts, n_copies,
            self._pieces.difference, self._pieces.base,
        )  # fmt: skip
        del gate_rows, up_rows
        return self.join(self._product(rows, weight_of(down)), down.bias, n_prompts, n_copies)

    def _product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(rows, weight, self._pieces.depth)


class _Remembering:
    """A function of one tensor that remembers its last result: query, key and value projections get the very same
    tensor, and so do gate and up."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        # The function is not kept: a method of the owner would be a cycle, and its tensors would outlive the pass.
        if self._last is None or self._last[0] is not x:
            self._last = None  # before the next result is made, not after
            self._last = (x, function(x))
        return self._last[1]

    def forget(self) -> None:
        """Release the last input and its result."""
        self._last = None


def split(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """float32 (R, d) -> bf16 (pieces * R, d), rows of pieces that sum to x, most significant first."""
    if kernels.usable(x):
        return kernels.split(x, pieces)
    parts = []
    for _ in range(pieces):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.cat(parts)


def product(rows: torch.Tensor, weight: torch.Tensor, depth: int | None = None) -> torch.Tensor:
    """bf16 (R, in) and (out, in) -> float32 (R, out), accumulated in float32, over ``depth`` inputs at a time."""
    if depth and depth < rows.shape[1]:
        parts = zip(rows.split(depth, 1), weight.split(depth, 1), strict=True)
        return functools.reduce(torch.Tensor.add_, (product(*part) for part in parts))
    if rows.is_cuda:
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    return rows.float() @ weight.float().t()
