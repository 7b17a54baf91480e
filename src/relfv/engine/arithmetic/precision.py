"""In which arithmetic a model runs.

``exact`` computes in float32 whatever the checkpoint is stored in. bf16 has 8 bits of mantissa: there a patched run
and its own repetition at another batch size differ as much as most heads' effects do. A bf16 or fp16 checkpoint stays
in its own dtype in memory. On CUDA the products of linear layers with bf16 weights are put together from bf16 pieces
(products.py). Everything else is widened block by block while it runs, which loses nothing, since every bf16 number is
a float32 number; on CUDA those products use TF32 (10 bits of mantissa, float32 accumulation).

``fast`` computes in the checkpoint's dtype. In both, logits and softmax are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from relfv.models.architecture import Architecture

Precision = Literal["exact", "fast"]


_SMALL = 20_000_000
"""Parameters below which a CPU computes on one thread: threads that wait for each other cost a small model more than
they save (ten times more on a busy machine), and one thread sums in the same order on every machine."""


@dataclass(frozen=True)
class Arithmetic:
    """How one model computes; worked out once, entered for every pass."""

    widened: tuple[tuple[nn.Module, tuple[torch.Tensor, ...]], ...]
    """Modules that get float32 weights while they run, and those of their tensors that are stored below."""
    matmul: Literal["high", "highest"]
    """float32 products on CUDA: TF32 or not."""
    one_thread: bool

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While open, the model computes so."""
        before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        torch.set_float32_matmul_precision(self.matmul)
        if self.one_thread:
            torch.set_num_threads(1)
        try:
            with ExitStack() as stack:
                for unit, low in self.widened:
                    stack.enter_context(_widened(unit, low))
                yield
        finally:
            torch.set_float32_matmul_precision(before)
            torch.set_num_threads(threads)


def arithmetic(
    model: nn.Module,
    arch: Architecture,
    precision: Precision,
    *,
    tf32: bool = True,
    as_they_are: Iterable[nn.Module] = (),
) -> Arithmetic:
    """How ``model`` computes as ``precision`` says.

    ``tf32=False`` asks for strict float32; ``as_they_are`` are modules that take float32 inputs to the weights they have.
    """
    done = {id(module) for module in as_they_are}
    units = _units(model, arch) if precision == "exact" else [arch.lm_head]
    low = [(unit, tuple(tensor for tensor in _tensors(unit, done) if _is_low(tensor))) for unit in units]
    # With no weight matrix left, float32 products are left to attention alone, where strict ones cost next to nothing.
    matrices = [tensor for block in arch.blocks for tensor in _tensors(block, done) if tensor.dim() > 1]
    return Arithmetic(
        widened=tuple((unit, tensors) for unit, tensors in low if tensors),
        matmul="high" if tf32 and matrices else "highest",
        one_thread=sum(p.numel() for p in model.parameters()) < _SMALL,
    )


def _units(model: nn.Module, arch: Architecture) -> list[nn.Module]:
    """What is widened as a whole while it runs: each block, and each module outside the blocks with own weights."""
    units: list[nn.Module] = list(arch.blocks)
    inside = {id(module) for block in arch.blocks for module in block.modules()}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if id(module) not in inside and any(_is_low(tensor) for tensor in own):
            units.append(module)
    return units


def widened_if_low(unit: nn.Module) -> AbstractContextManager[None]:
    """While open, ``unit`` computes in float32 if it is stored below."""
    low = tuple(tensor for tensor in _tensors(unit, set()) if _is_low(tensor))
    return _widened(unit, low) if low else nullcontext()


def _is_low(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _tensors(unit: nn.Module, done: Set[int]) -> list[torch.Tensor]:
    """Parameters and buffers of the unit's modules that are not ``done``, each once."""
    modules = [module for module in unit.modules() if id(module) not in done]
    own = [tensor for m in modules for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return list({id(tensor): tensor for tensor in own}.values())


@contextmanager
def _widened(unit: nn.Module, low: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give ``unit`` float32 weights just before each of its forward calls, and its own back right after."""
    if type(unit) is nn.Embedding:
        # A plain look-up is the same number in any dtype: widen the rows, not the table.
        handles = [unit.register_forward_hook(lambda _, __, rows: rows.float())]
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    else:
        kept = []
        widen, narrow = _swappers(low, kept)
        handles = [
            unit.register_forward_pre_hook(widen, prepend=True),
            unit.register_forward_hook(narrow, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _restore(kept)


def _swappers(
    low: Sequence[torch.Tensor], kept: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Callable[..., None], Callable[..., None]]:
    def widen(*_: Any) -> None:
        for tensor in low:
            kept.append((tensor, tensor.data))
            tensor.data = tensor.data.float()

    def narrow(*_: Any) -> None:
        _restore(kept)

    return widen, narrow


def _restore(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    while kept:
        tensor, stored = kept.pop()
        tensor.data = stored
