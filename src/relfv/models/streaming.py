"""Weights that stream: more layers than the device holds, each there while it computes.

A streamed block's parameters are, at rest, its true weights: in host memory, page-locked where the device is a GPU, or
in files mapped into memory. Just before the block runs they become a slot's, one of a few buffers on the device that
the weights of the next blocks are copied into meanwhile, on a stream of their own; right after it they are the true
ones again. So whoever reads a weight at any other time reads the true one, and a slot is never seen in passing.

A head sweep computes on each layer's weights for longer than it takes to copy them. Blocks run in one order, again and
again, so the slots are filled in that order, and around the end of a pass with the first blocks of the next one. Where
passes run in step, a block keeps its slot until the last has left it. An order that was not foreseen costs time and
nothing else.

All of it runs on any device, on a CPU by plain copies, with the same bits as if the weights were there for good.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from relfv.errors import RunError
from relfv.models.architecture import Architecture
from relfv.models.placement import SLOTS, Placement, streamable
from relfv.models.shared import shared_layers

_ALIGNMENT = 256
"""Alignment of tensors in a buffer, in bytes: that of PyTorch's own on a GPU is 512, and products ask for 16."""
_STAGES = 2
"""Host buffers on the way from files to the device."""


@contextmanager
def brought(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, those of ``module``'s weights that are elsewhere are on ``device``: for calling a part of a streamed
    block outside the block's turn."""
    away = [(p, p.data) for p in module.parameters() if p.device != device]
    for parameter, at_rest in away:
        parameter.data = at_rest.to(device)
    try:
        yield
    finally:
        for parameter, at_rest in away:
            parameter.data = at_rest


def stream(model: nn.Module, arch: Architecture, placement: Placement, device: torch.device) -> Streaming:
    """Take ``model``, loaded on the CPU, to where ``placement`` says; its streamed blocks then run as if on ``device``.

    Block by block, so that neither the device nor host memory ever holds more than it will in the end.
    """
    own = streamable(model, arch)
    streamed = sorted((*placement.host, *placement.disk))
    apart = {id(p) for layer in streamed for p in own[layer].values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in apart:
            tensor.data = tensor.data.to(device)
    shared = shared_layers([_layout([*block.values()])[1] for block in own])
    blocks = []
    for layer in streamed:
        blocks.append(block := _Block.of([*own[layer].values()]))
        if layer in placement.host:
            block.keep(shared and partial(shared, layer), device)
    return Streaming([arch.blocks[layer] for layer in streamed], blocks, placement, device)


def _layout(parameters: Sequence[nn.Parameter]) -> tuple[list[int], int]:
    """Offset of each parameter in a buffer, and the buffer's size, in bytes."""
    *offsets, n_bytes = accumulate((-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters), initial=0)
    return offsets, n_bytes


@dataclass
class _Block:
    """The parameters of one block, and where its true weights are."""

    parameters: Sequence[nn.Parameter]
    at_rest: Sequence[torch.Tensor]
    """The true weights, as ``parameters`` have them while the block does not run."""
    offsets: Sequence[int]
    """Offset of each parameter in a buffer, in bytes."""
    strides: Sequence[tuple[int, ...]]
    """Strides of each parameter in a buffer, as a copy on the device would have them: products may depend on them in
    their last bits."""
    n_bytes: int
    buffer: torch.Tensor | None = None
    """All true weights in one piece of host memory; None where they are in files."""

    @staticmethod
    def of(parameters: Sequence[nn.Parameter]) -> _Block:
        """Make a block whose weights are left where they are."""
        strides = [torch.empty_like(p, device="meta").stride() for p in parameters]
        offsets, n_bytes = _layout(parameters)
        return _Block(parameters, [p.data for p in parameters], offsets, strides, n_bytes)

    def keep(
        self, shared: Callable[[Callable[[torch.Tensor], None]], torch.Tensor] | None, device: torch.device
    ) -> None:
        """Copy the weights into host memory, which then holds the only copy: of this process, or of all that share."""
        if shared:
            self.buffer = shared(self.fill)
        else:
            self.buffer = host_buffer(self.n_bytes, device)
            self.fill(self.buffer)
        self.at_rest = self.within(self.buffer)
        self.become(self.at_rest)
        page_lock(self.buffer, device)

    def fill(self, buffer: torch.Tensor) -> None:
        """Copy the true weights into ``buffer``."""
        for there, tensor in zip(self.within(buffer), self.at_rest, strict=True):
            there.copy_(tensor)

    def within(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Tensors like the weights, in the bytes of ``buffer``."""
        found = []
        for tensor, offset, strides in zip(self.at_rest, self.offsets, self.strides, strict=True):
            part = buffer[offset : offset + tensor.nbytes].view(tensor.dtype)
            found.append(part.as_strided(tensor.shape, strides))
        return found

    def become(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the parameters these weights."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor


@dataclass
class _Buffer:
    """Memory that one block's weights after another's pass through."""

    memory: torch.Tensor
    block: int | None = None
    """Index of the block whose weights are in it."""
    filled: Any = None
    """CUDA event: the block's weights are in it."""
    read: Any = None
    """CUDA event: nobody needs these weights any more."""


class Streaming:
    """The streamed blocks of one model, in the order in which they run."""

    def __init__(
        self, modules: Sequence[nn.Module], blocks: Sequence[_Block], placement: Placement, device: torch.device
    ) -> None:
        self.placement = placement
        self._blocks = blocks
        size = max(block.n_bytes for block in blocks)
        n_slots = min(SLOTS, len(blocks))
        self.slots = [_Buffer(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(n_slots)]
        n_stages = _STAGES if any(block.buffer is None for block in blocks) else 0
        self._stages = [_Buffer(host_buffer(size, device).zero_()) for _ in range(n_stages)]
        for stage in self._stages:
            page_lock(stage.memory, device)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._staying: int | None = None
        for index, module in enumerate(modules):
            # The first hooks of each block, so that all others, such as widening, find the slot's weights.
            module.register_forward_pre_hook(lambda *_, index=index: self._turn(self._enter, index))
            module.register_forward_hook(lambda *_, index=index: self._turn(self._leave, index), always_call=True)
        if self._copying:  # before the memory is given back, which is after this object
            locked = [block.buffer for block in blocks if block.buffer is not None] + [s.memory for s in self._stages]
            addresses = {buffer.data_ptr() for buffer in locked}
            weakref.finalize(self, _unlock, addresses, self._copying).atexit = False
        self.bytes_streamed = 0
        """Bytes streamed in all, since the model was opened."""

    @property
    def slot_bytes(self) -> int:
        """Memory that the slots take on the device."""
        return sum(slot.memory.nbytes for slot in self.slots)

    @contextmanager
    def staying(self, layer: int) -> Iterator[None]:
        """While open, this layer's weights stay in their slot, if they stream: its block may run several times."""
        streamed = sorted((*self.placement.host, *self.placement.disk))
        if layer not in streamed:
            yield
            return
        index = streamed.index(layer)
        try:
            self._enter(index)
            self._staying = index
            yield
        finally:
            self._staying = None
            self._leave(index)

    def _turn(self, enter_or_leave: Callable[[int], None], index: int) -> None:
        if index != self._staying:
            enter_or_leave(index)

    def _enter(self, index: int) -> None:
        n = len(self._blocks)
        # Fetch this block, which in the usual order is long since there, and those that run next.
        for wanted in range(index, index + len(self.slots)):
            self._fetch(wanted % n, needed=[i % n for i in range(index, index + len(self.slots))])
        slot = self._slot_of(index)
        assert slot
        if self._copying:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        self._blocks[index].become(self._blocks[index].within(slot.memory))

    def _leave(self, index: int) -> None:
        self._blocks[index].become(self._blocks[index].at_rest)
        slot = self._slot_of(index)
        if self._copying and slot:
            slot.read = torch.cuda.current_stream(self._device).record_event()

    def _slot_of(self, index: int) -> _Buffer | None:
        return next((slot for slot in self.slots if slot.block == index), None)

    def _fetch(self, index: int, needed: Sequence[int]) -> None:
        """Begin to copy a block's weights into a slot that holds none of ``needed``, unless they are in one."""
        if self._slot_of(index):
            return
        slot = next(slot for slot in self.slots if slot.block not in needed)
        block = self._blocks[index]
        stage = self._staged(block) if block.buffer is None else None
        source: Any = stage.memory if stage else block.buffer
        slot.block = None  # it holds neither block whole, should this be interrupted
        self._copy(slot, source[: block.n_bytes], stage)
        slot.block = index
        self.bytes_streamed += block.n_bytes

    def _copy(self, slot: _Buffer, source: torch.Tensor, stage: _Buffer | None) -> None:
        into = slot.memory[: len(source)]
        if self._copying is None:
            into.copy_(source)
            return
        # Wait for what used this memory before, the block that was in the slot or PyTorch's allocator's last user.
        self._copying.wait_event(slot.read or torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._copying):
            into.copy_(source, non_blocking=True)
        slot.filled = self._copying.record_event()
        if stage:
            stage.read = slot.filled

    def _staged(self, block: _Block) -> _Buffer:
        """A block's weights from its files, in a host buffer that copies to the device do not wait for."""
        stage = self._stages[0]
        self._stages = [*self._stages[1:], stage]
        if stage.read:
            stage.read.synchronize()
        block.fill(stage.memory)
        return stage


def host_buffer(n_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 (n_bytes,) in host memory; where ``device`` is a GPU, in large pages, which are quicker to lock."""
    if device.type != "cuda":
        return torch.empty(n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def page_lock(buffer: torch.Tensor, device: torch.device) -> None:
    """Lock a buffer that has been written to, if ``device`` is a GPU: it copies from locked memory ten times faster,
    and while it computes. PyTorch's own locked memory comes in powers of two, up to twice what is needed.

    Raises RunError if the system does not let it be locked.
    """
    if device.type != "cuda":
        return
    cuda: Any = torch.cuda.cudart()
    if (result := cuda.cudaHostRegister(buffer.data_ptr(), len(buffer), 0)) != cuda.cudaError.success:
        raise RunError(
            f"{len(buffer) / 1e9:.1f} GB of host memory cannot be page-locked for the GPU (CUDA error {int(result)}); "
            "free host memory, or use --offload disk"
        )


def _unlock(addresses: Iterable[int], copying: torch.cuda.Stream) -> None:
    copying.synchronize()  # slots for a pass that will not come are still being filled
    cuda: Any = torch.cuda.cudart()
    for address in addresses:
        cuda.cudaHostUnregister(address)
