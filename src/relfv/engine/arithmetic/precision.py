"""What ``exact`` and ``fast`` change in the model and in PyTorch while a pass runs.

In ``exact`` a bf16 or fp16 checkpoint keeps its dtype in memory. What does not multiply in pieces (products.py) is
widened block by block while it runs, and multiplied in float32 proper: with TF32, whose 10 bits of mantissa are fp16's,
probabilities of a float32 checkpoint were off by 2e-4. In ``fast`` the vocabulary projection alone is widened, and
float32 products may be TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from relfv.models.architecture import Architecture

Precision = Literal["exact", "fast"]

_SMALL = 20_000_000
"""Parameters below which a CPU computes on one thread: threads that wait for each other cost a small model more than
they save (ten times more on a busy machine), and one thread sums in the same order on every machine."""


@dataclass(frozen=True)
class Mode:
    """The settings for one model: worked out once, put in force for every pass."""

    widened: tuple[tuple[nn.Module, tuple[torch.Tensor, ...]], ...]
    """Modules that are widened, and those of their tensors that are stored in bf16 or fp16."""
    matmul: Literal["high", "highest"]
    """float32 products on CUDA: TF32 or not."""
    one_thread: bool

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While open, modules are widened and PyTorch is set as the fields say; afterwards all is as before."""
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


def mode_of(
    model: nn.Module,
    arch: Architecture,
    precision: Precision,
    *,
    not_widened: Iterable[nn.Module] = (),
) -> Mode:
    """The settings with which ``model`` computes in ``precision``.

    ``not_widened`` are modules whose replacements compute in float32 with weights as they are stored.
    """
    done = {id(module) for module in not_widened}
    units = _units(model, arch) if precision == "exact" else [arch.lm_head]
    low = [(unit, tuple(tensor for tensor in _tensors(unit, done) if _is_low(tensor))) for unit in units]
    return Mode(
        widened=tuple((unit, tensors) for unit, tensors in low if tensors),
        matmul="highest" if precision == "exact" else "high",
        one_thread=sum(p.numel() for p in model.parameters()) < _SMALL,
    )


def _units(model: nn.Module, arch: Architecture) -> list[nn.Module]:
    """Modules that are widened as a whole: each block, and each module outside the blocks that holds bf16 or fp16
    tensors."""
    units: list[nn.Module] = list(arch.blocks)
    inside = {id(module) for block in arch.blocks for module in block.modules()}
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if id(module) not in inside and any(_is_low(tensor) for tensor in tensors):
            units.append(module)
    return units


@contextmanager
def whole_widened(model: nn.Module, mode: Mode) -> Iterator[None]:
    """While open, all of ``model`` is float32, and the rest is as in the exact form of ``mode``."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with replace(mode, widened=(), matmul="highest").in_force():
        try:
            _swappers([tensor for tensor in _tensors(model, set()) if _is_low(tensor)], kept)[0]()
            yield
        finally:
            _restore(kept)


def widened(unit: nn.Module) -> AbstractContextManager[None]:
    """While open, ``unit`` is widened if it is stored in bf16 or fp16."""
    low = tuple(tensor for tensor in _tensors(unit, set()) if _is_low(tensor))
    return _widened(unit, low) if low else nullcontext()


def _is_low(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _tensors(unit: nn.Module, done: Set[int]) -> list[torch.Tensor]:
    """Parameters and buffers of the unit's modules that are not ``done``, each once."""
    modules = [module for module in unit.modules() if id(module) not in done]
    tensors = [tensor for m in modules for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return list({id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def _widened(unit: nn.Module, low: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give ``unit`` float32 weights just before each of its forward calls, and the stored ones back right after."""
    if type(unit) is nn.Embedding:
        # What is looked up is the same number in any dtype: widen the rows, not the table.
        handles = [unit.register_forward_hook(lambda _, __, rows: rows.float())]
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    else:
        kept = []
        widen, narrow = _swappers(low, kept)
        # These run inside the hooks that a streamed block has from its opening: its weights come first and go last.
        handles = [
            unit.register_forward_pre_hook(widen),
            unit.register_forward_hook(narrow, always_call=True, prepend=True),
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
