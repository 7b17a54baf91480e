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
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from relfv.engine.arithmetic import kernels, late
from relfv.engine.arithmetic.matmul import product
from relfv.engine.arithmetic.padding import places_in
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
"""Pieces that make products float32 in everything but name. A matrix unit cuts each of its additions short, so its
error grows with their number: on an H100 2e-6 of a product of 2,048 inputs and 1.6e-5 of 28,672, where float32's is
3e-7 and 8e-7. It is alike for all copies of a token; but 80 random layers, 8,192 wide, made 5e-3 nats of it, and 1e-4
so."""


def takes_pieces(module: nn.Module, device: torch.device) -> TypeGuard[nn.Linear]:
    """True for a linear layer that can multiply in pieces on ``device``, and whose ``forward`` is nobody else's."""
    return takes_bf16(module, device) and "forward" not in vars(module)


def takes_bf16(module: nn.Module, device: torch.device) -> TypeGuard[nn.Linear]:
    """True for an ``nn.Linear`` with weights that are bf16, or packed and read in bf16, that runs on a ``device`` where
    bf16 products can come out in float32."""
    if not (type(module) is nn.Linear or is_readable(module)) or not hasattr(torch.ops.aten.mm, "dtype"):  # PyTorch 2.8
        return False
    return weight_dtype(module) == torch.bfloat16 and device.type == "cuda"


class Whole:
    """Linear layers on float32 inputs (..., in), each split into ``pieces``.

    Rows of pieces are in the order of kernels/pieces.py: here those of the inputs alone, as copies of one prompt
    without a base.
    """

    of_copies = False

    def __init__(self, pieces: int, depth: int | None = None) -> None:
        self._difference, self._base, self._depth = pieces, 0, depth
        self._remembered = _Remembering()
        self._apart: tuple[nn.Linear, torch.Tensor | None] | None = None

    def forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """The replacement of ``linear.forward``."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = self._product(self._remembered(self.split, x), weight_of(linear))
            if self._apart is not None and self._apart[0] is linear:
                self._apart = linear, rows
                return rows
            return self._joined(rows, linear, x.shape)

        return forward

    def _joined(self, rows: torch.Tensor, linear: nn.Linear, shape: torch.Size) -> torch.Tensor:
        return self.join(rows, linear.bias, shape)

    def _laid(self, shape: torch.Size) -> tuple[int, int]:
        """Prompts and copies of inputs of this shape."""
        return 1, shape[:-1].numel()

    def _places(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """Which rows of inputs of this shape, on the device of ``x``, are multiplied, if not all."""
        return places_in(shape, x.device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (..., in) -> bf16 rows of pieces."""
        places = self._places(x, x.shape)
        x = x.reshape(*self._laid(x.shape), x.shape[-1])
        if kernels.usable(x):
            return kernels.split_differences(x, self._difference, self._base, places)
        if not self._base:
            return split(x[0] if places is None else x[0, places], self._difference)
        base = x[:, 0]
        return torch.cat([split((x - base[:, None]).flatten(0, 1), self._difference), split(base, self._base)])

    def join(
        self,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        shape: torch.Size,
        onto: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of products of inputs of this shape, (..., in), float32 -> (..., out): their sums, base + difference +
        bias, and by kernels alone ``onto``, if it is given, added to them, and the result in ``into``. ``rows`` may be
        written over."""
        (n_prompts, n_copies), places = self._laid(shape), self._places(rows, shape)
        pieces = self._difference, self._base
        if places is not None:
            into, n_copies = rows.new_zeros(1, n_copies, rows.shape[1]), len(places)
        if kernels.usable(rows):
            out = kernels.join_differences(rows, bias, n_prompts, n_copies, *pieces, onto, into, places)
        else:
            n_differences = self._difference * n_prompts * n_copies
            out = rows[:n_differences].view(self._difference, n_prompts, n_copies, -1).sum(0)
            bases = rows[n_differences:][: self._base * n_prompts]
            shared = bases.view(self._base, n_prompts, 1, -1).sum(0) if self._base else 0
            out = out + (shared if bias is None else shared + bias)
            out = out if places is None or into is None else into.index_copy_(1, places, out)
        return out.view(*shape[:-1], -1)

    def gated(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: str, x: torch.Tensor) -> torch.Tensor:
        """down(act(gate(x)) * up(x)) by kernels, which never write the joined gate and up."""
        self._remembered.forget()
        return self.join(self._gated(gate, up, down, activation, self.split(x), x.shape), down.bias, x.shape)

    def _gated(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: str, rows: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """Rows of products of a gated MLP, from rows of pieces."""
        gate_rows, up_rows = self._product(rows, weight_of(gate)), self._product(rows, weight_of(up))
        places = self._places(rows, shape)
        laid = self._laid(shape) if places is None else (1, len(places))
        rows = kernels.gate_differences(
            gate_rows, up_rows, gate.bias, up.bias, activation, *laid, self._difference, self._base
        )
        del gate_rows, up_rows
        return self._product(rows, weight_of(down))

    def pre_norm(
        self,
        x: torch.Tensor,
        attend: Callable[[torch.Tensor], torch.Tensor],
        out_proj: nn.Linear,
        norms: Sequence[tuple[torch.Tensor, float, float]],
        mlp: tuple[nn.Linear, nn.Linear, nn.Linear, str],
        into: torch.Tensor | None,
    ) -> torch.Tensor:
        """A whole pre-norm block by kernels: y + mlp(norm(y)), where y = x + attend(norm(x)). ``norms`` are weight, eps
        and offset of both; ``attend`` must read its argument by linear layers in pieces alone, and end in ``out_proj``.
        The result is written to ``into``, if it is given, which may be where ``x`` is.

        Sums, norms and their pieces are one trip through memory. That the first norm's output is never written, and
        that of ``out_proj`` not joined, is known to those linear layers alone.
        """
        laid = x.reshape(*self._laid(x.shape), x.shape[-1])
        pieces, places = (self._difference, self._base), self._places(x, x.shape)
        self._remembered.instead(x, kernels.norm_differences(laid, *norms[0], *pieces, places=places)[1])
        self._apart = out_proj, None
        try:
            attend(x)
            added = self._apart[1]
        finally:
            self._apart = None
            self._remembered.forget()
        assert added is not None  # as was seen when the block was recognised
        laid, rows = kernels.norm_differences(laid, *norms[1], *pieces, added=added, bias=out_proj.bias, places=places)
        gate, up, down, activation = mlp
        return self.join(self._gated(gate, up, down, activation, rows, x.shape), down.bias, x.shape, laid, into)

    def _product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(rows, weight, self._depth)


class Differences(Whole):
    """Linear layers on copies (N, C, in), as bases and differences."""

    of_copies = True

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces.difference, pieces.depth)
        self._base = pieces.base
        self._whole = Whole(pieces.whole, pieces.depth)

    def forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """The replacement of ``linear.forward``: (N, C, in) -> (N, C, out)."""
        copies, whole = super().forward(linear), self._whole.forward(linear)
        # ``whole`` is for inputs that are not laid out as copies, such as tokens on their way to experts.
        return lambda x: copies(x) if x.dim() == 3 else whole(x)

    def _joined(self, rows: torch.Tensor, linear: nn.Linear, shape: torch.Size) -> torch.Tensor:
        if self._difference > 1 or not late.waits_for(linear):
            return super()._joined(rows, linear, shape)
        differences, pieces = rows[: shape[:-1].numel()], rows[shape[:-1].numel() :]
        base = kernels.join_differences(pieces, linear.bias, 1, shape[0], self._base, 0)
        return late.apart(differences.view(*shape[:-1], -1), base[0])

    def _laid(self, shape: torch.Size) -> tuple[int, int]:
        return shape[0], shape[1]

    def _places(self, x: torch.Tensor, shape: torch.Size) -> None:
        """All copies are multiplied."""

    def base(self, rows: torch.Tensor, linear: nn.Linear, n_rows: int, n_prompts: int) -> torch.Tensor:
        """Outputs of the bases alone, (N, out), from rows of pieces of ``n_rows`` copies."""
        pieces = rows[self._difference * n_rows :][: self._base * n_prompts]
        out = self._product(pieces, weight_of(linear)).view(self._base, n_prompts, -1).sum(0)
        return out if linear.bias is None else out + linear.bias

    def products(
        self, rows: torch.Tensor, linear: nn.Linear, n_rows: int, parts: Sequence[slice]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Outputs of the differences alone, from rows of pieces, for some of the ``n_rows`` copies at a time: (start,
        (R, out))."""
        weight = weight_of(linear)
        for part in parts:
            starts = [i * n_rows + part.start for i in range(self._difference)]
            length = part.stop - part.start
            yield (
                part.start,
                functools.reduce(
                    torch.Tensor.add_, (self._product(rows[start : start + length], weight) for start in starts)
                ),
            )


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

    def instead(self, x: torch.Tensor, result: torch.Tensor) -> None:
        """Give ``result`` for ``x`` from now on."""
        self._last = (x, result)

    def forget(self) -> None:
        """Release the last input and its result."""
        self._last = None


def split(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """float32 (R, d) -> bf16 (pieces * R, d), rows of pieces that sum to x, most significant first."""
    if kernels.usable(x):
        return kernels.split_differences(x[None], pieces, 0)
    parts = []
    for _ in range(pieces):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.cat(parts)
