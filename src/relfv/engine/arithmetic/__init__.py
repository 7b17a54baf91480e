"""The arithmetic in which a model computes. This module is the package's only door: nothing outside imports from behind
it.

An ``Arithmetic`` belongs to one model and does four things for the engines: it runs the model, multiplies copies of
last tokens, attends, and reads out logits. The words of this package:

- exact: float32, whatever dtype the checkpoint is stored in. bf16 has 8 bits of mantissa: there a patched run and its
  own repetition at another batch size differ as much as most heads' effects do.
- fast: the checkpoint's dtype. In both, logits and softmax are float32.
- widen: give a module float32 weights while it runs. Every bf16 number is a float32 number, so nothing is lost.
- copies: (N, C, d), the last token of N prompts, C times each, with another edit in each copy (shared_prefix.py).
- base: copy 0 of a prompt, which is not edited. Difference: another copy minus its base.
- pieces: bf16 numbers that sum to a float32 number. With them ``exact`` multiplies by bf16 weights as they are stored,
  on matrix units for bf16 (products.py). A float32 input is split into pieces, and so are bases and differences.
- kernels: fused Triton kernels (kernels/), in place of elementwise PyTorch and of modules they agree with (fusion.py).
- plain: without pieces and kernels, that is PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from relfv.engine.arithmetic import kernels, late, logits
from relfv.engine.arithmetic.attention import attend_plainly
from relfv.engine.arithmetic.blocks import Stream, with_room
from relfv.engine.arithmetic.first_use import first_use
from relfv.engine.arithmetic.fusion import Fusions, recognise
from relfv.engine.arithmetic.logits import Likeliest
from relfv.engine.arithmetic.padding import leaving_out_padding
from relfv.engine.arithmetic.precision import Mode, Precision, mode_of, whole_widened, widened
from relfv.engine.arithmetic.products import FLOAT32, Differences, Pieces, Whole, takes_pieces
from relfv.engine.arithmetic.replacing import replaced
from relfv.models.architecture import Architecture
from relfv.models.packed import is_readable, unpacked_product

__all__ = [
    "Arithmetic", "Likeliest", "Precision", "first_use", "leaving_out_padding", "replaced", "widened", "with_room",
]  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """How one model computes; plain, unless made by ``with_kernels``."""

    model: Any
    arch: Architecture
    precision: Precision
    linears: tuple[nn.Linear, ...] = ()
    """Linear layers that ``exact`` multiplies in pieces."""
    pieces: Pieces = field(default_factory=Pieces)
    fusions: Fusions | None = None
    """Modules that kernels replace in the model; None if no kernel may run, be it in attention or read-out."""
    over_likeliest: bool = False
    """Whether a CPU reads copies out over the tokens that are likeliest in copy 0, where the vocabulary is large."""

    @classmethod
    def with_kernels(cls, model: Any, arch: Architecture, precision: Precision) -> Arithmetic:
        """The arithmetic of ``model``, which must be on the device where it will run, with all pieces and kernels that
        fit."""
        linears = tuple(module for module in model.modules() if takes_pieces(module, arch.device))
        return cls(model, arch, precision, linears=linears, fusions=recognise(model, arch))

    def plain(self) -> Arithmetic:
        """Copy without pieces and kernels."""
        return replace(self, linears=(), fusions=None)

    def in_float32(self) -> Arithmetic:
        """Copy that runs the same code with float32's rounding and no more, to judge it by: three pieces throughout."""
        return replace(self, precision="exact", pieces=FLOAT32)

    def finer(self) -> Arithmetic:
        """Copy with differences in at least two pieces: for effects that are not small, and to measure rounding."""
        return replace(self, pieces=replace(self.pieces, difference=max(2, self.pieces.difference)))

    def over_likeliest_tokens(self) -> Arithmetic:
        """Copy that reads copies out over copy 0's likeliest tokens, where the vocabulary is most of what a pass costs;
        else this arithmetic. For edits whose effect need not be known to the last digit (logits.py says what is left
        out)."""
        device: Any = self.arch.lm_head.weight.device
        return replace(self, over_likeliest=True) if logits.in_tiles(self.arch.lm_head, device) else self

    @property
    def is_plain(self) -> bool:
        """True if nothing runs in pieces or by kernels."""
        return self.fusions is None and not self._in_pieces

    def facts(self) -> dict[str, str | bool]:
        """Facts for records: ``products``, what linear layers multiply in, and ``kernels``, whether kernels run."""
        in_pieces = "bf16 pieces of float32" if self._in_pieces else "float32"
        products = "the checkpoint's dtype" if self.precision == "fast" else in_pieces
        return {"products": products, "kernels": self.fusions is not None}

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, forward passes of the model compute in this arithmetic, without gradients. Everything below
        happens within it."""
        whole = Whole(self.pieces.whole, self.pieces.depth)
        forwards: list[Any] = [(linear, whole.forward(linear)) for linear in self._in_pieces]
        forwards += [(linear, partial(unpacked_product, linear)) for linear in self._packed]
        fused = self.fusions.installed() if self.fusions else nullcontext()
        with torch.inference_mode(), self._mode.in_force(), fused, replaced([*forwards, *self._fused(whole)]):
            yield

    @contextmanager
    def with_gradients(self) -> Iterator[None]:
        """While open, forward passes compute in float32 by PyTorch alone and can be differentiated. Weights stored in
        bf16 or fp16 are float32 throughout, not block by block: a backward pass reads them again."""
        with torch.inference_mode(False), torch.enable_grad(), whole_widened(self.model, self._mode):
            yield

    @contextmanager
    def multiplying_copies(self, n_copies: int | None = None) -> Iterator[None]:
        """While open, the inputs of linear layers are copies, and are multiplied as base and differences where in
        pieces. At the end of the one pass there will be ``n_copies``: hidden states that leave a block have room for
        them (blocks.py). With None, for passes in step, each pass has its own place."""
        differences = Differences(self.pieces)
        forwards: list[Any] = [(linear, differences.forward(linear)) for linear in self._in_pieces]
        with replaced([*forwards, *self._fused(differences, Stream(n_copies) if n_copies else None)]):
            yield

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_prefix: torch.Tensor,
        v_prefix: torch.Tensor,
        lengths: torch.Tensor | None,
        *,
        key_bias: torch.Tensor | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Attention of each copy to its prompt's prefix and to itself: query (N, heads, C, head_dim), key and value
        (N, kv_heads, C, head_dim), prefixes (N, kv_heads, P, head_dim), lengths (N,) -> (N, C, heads, head_dim).
        By kernels also of whole prompts, each token to those before it: prefixes are key and value, lengths None.

        ``settings`` are scale, window, softcap and sinks, ``key_bias`` is ALiBi, as in ``attend_plainly``.
        """
        tensors = (query, key, value, k_prefix, v_prefix)
        if key_bias is None and self.fusions is not None and kernels.usable(query):
            return kernels.attend(*tensors, lengths, **settings, **late.taken(query, key, value))
        assert lengths is not None
        return attend_plainly(*tensors, lengths, key_bias=None if key_bias is None else key_bias.float(), **settings)

    def likeliest(self, unedited: torch.Tensor, targets: torch.Tensor) -> Likeliest:
        """The tokens over which ``read_out`` reads copies, where ``over_likeliest`` says so, of prompts with these
        final, normed hidden states, ``unedited`` (N, resid_dim). Call inside ``running``."""
        return logits.likeliest_tokens(self.arch, unedited, targets)

    def read_out(
        self, hidden: torch.Tensor, targets: torch.Tensor, likeliest: Likeliest | None = None
    ) -> logits.Scores:
        """Read out copies (N, C, resid_dim), final and normed: -> logit and log-probability of ``targets`` (N,), and
        the most probable token. Each (N, C): float32, float32, int64. Where ``over_likeliest`` says so the tokens are
        the ``likeliest``, by default those of copy 0."""
        if self.over_likeliest and hidden.shape[1] > 1:
            likeliest = likeliest or self.likeliest(hidden[:, 0], targets)
        return logits.score(
            self.arch,
            hidden,
            targets,
            pieces=self.pieces if self.arch.lm_head in self._in_pieces else None,
            may_use_kernels=self.fusions is not None,
            likeliest=likeliest,
        )

    def _fused(self, products: Whole, stream: Stream | None = None) -> list[Any]:
        return self.fusions.forwards(products, self._in_pieces, stream) if self.fusions else []

    @property
    def _in_pieces(self) -> tuple[nn.Linear, ...]:
        return self.linears if self.precision == "exact" else ()

    @cached_property
    def _packed(self) -> tuple[nn.Linear, ...]:
        """Packed layers that do not multiply in pieces."""
        known = {id(linear) for linear in self._in_pieces}
        return tuple(m for m in self.model.modules() if is_readable(m) and id(m) not in known)

    @cached_property
    def _mode(self) -> Mode:
        norms = [norm.module for norm in self.fusions.norms] if self.fusions else []
        float32_as_stored = [*self._in_pieces, *norms]
        return mode_of(self.model, self.arch, self.precision, not_widened=float32_as_stored)
