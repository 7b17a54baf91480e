"""One model over several cards: consecutive blocks on each, in the order in which they run.

Embeddings and whatever else comes before the blocks are on the first card, final norm and vocabulary projection on the
last, unless they share weights with the embeddings. Each of these modules takes its inputs to its own card first, so
hidden states move once a boundary; masks and rotary angles, which every block is given anew, move once a card and pass.
Nobody wraps a module's ``forward``, so kernels take their places as on one card, and the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from relfv.errors import InputError
from relfv.models.architecture import Architecture
from relfv.models.memory import bytes_of_card
from relfv.models.placement import Sizes, measured

_ROOM = 0.95
"""Share of a card's memory that may be used."""


@dataclass(frozen=True)
class Cards:
    """Placement of the blocks of one model on several cards."""

    devices: tuple[torch.device, ...]
    """The cards, in the order in which a pass comes to them."""
    of_layer: tuple[torch.device, ...]
    """Device of each block."""

    def __str__(self) -> str:
        """The placement in words."""
        return ", ".join(f"{self.of_layer.count(device)} layers on {device}" for device in self.devices)


def spread(model: Any, arch: Architecture, counts: Sequence[int], devices: Sequence[torch.device]) -> Cards:
    """Take ``model`` to the ``devices``, ``counts`` blocks to each; it then runs as if on one."""
    of_layer = tuple(device for device, count in zip(devices, counts, strict=True) for _ in range(count))
    placed = {**dict(zip(arch.blocks, of_layer, strict=True)), **_at_the_end(model, arch, devices)}
    apart = {id(tensor) for module in placed for tensor in (*module.parameters(), *module.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in apart:
            tensor.data = tensor.data.to(devices[0])
    for module, device in placed.items():
        module.to(device)
    inside = {module for block in arch.blocks for module in block.modules()}
    others = {m: next(m.parameters(recurse=False), None) for m in model.modules() if m not in inside}
    placed |= {module: parameter.device for module, parameter in others.items() if parameter is not None}
    copying = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
    cards = {device: _Card(device, copying) for device in devices}
    begin = {arch.blocks[sum(counts[:i])] for i, count in enumerate(counts) if count}
    for module, device in placed.items():
        module.register_forward_pre_hook(cards[device].hook(begins=module in begin), with_kwargs=True)
    return Cards(tuple(devices), of_layer)


def _at_the_end(model: Any, arch: Architecture, devices: Sequence[torch.device]) -> dict[nn.Module, torch.device]:
    """Devices of the vocabulary projection and the final norm, which a pass comes to after the last block: the last
    card, or where the projection's weights are the embeddings', the first."""
    embedded = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    tied = any(id(parameter) in embedded for parameter in arch.lm_head.parameters())
    norms = [
        module
        for name, module in arch.decoder.named_children()
        if "embed" not in name and (own := [*module.parameters()]) and all(one.dim() == 1 for one in own)
    ]
    return dict.fromkeys([*norms, arch.lm_head], devices[0 if tied else -1])


@dataclass
class _Card:
    """Brings the inputs of modules to one card."""

    device: torch.device
    copying: dict[torch.device, torch.cuda.Stream]
    """Each card's stream for copies: copies wait for each other at both ends, and a card that computes must wait for
    none."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Inputs of this pass that all blocks are given, by the id of the tensor elsewhere, which is kept so that no other
    gets its id."""

    def hook(self, *, begins: bool) -> Callable[..., Any]:
        """A forward pre-hook that brings a module's inputs here; with ``begins``, the one of the card's first block."""

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # kernels start on the current one
            if begins:
                self.moved.clear()
            # The hidden states are another tensor in each block: kept, they would outlive their turn.
            given = {k: self._here(v, keep=k != "hidden_states") for k, v in kwargs.items()}
            return tuple(self._here(value, keep=i > 0) for i, value in enumerate(args)), given

        return take

    def _here(self, value: Any, *, keep: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._here(one, keep=keep) for one in value)
        # What is on the CPU is there for a reason, and blocks leave it there on one card, too.
        if not isinstance(value, torch.Tensor) or value.device in (self.device, torch.device("cpu")):
            return value
        if not keep:
            return self._copied(value)
        if id(value) not in self.moved:
            self.moved[id(value)] = value, self._copied(value)
        return self.moved[id(value)][1]

    def _copied(self, there: torch.Tensor) -> torch.Tensor:
        """Copy ``there`` to this card once it is computed, and while both cards go on with other work."""
        start, end = self.copying[there.device], self.copying[self.device]
        start.wait_stream(torch.cuda.current_stream(there.device))
        with torch.cuda.stream(start), torch.cuda.stream(end):
            here = there.to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(end)
        there.record_stream(start)
        here.record_stream(now)
        return here


def counts_foreseen(
    name: str, spec: str, kind: Any, config: Any, devices: Sequence[torch.device], *, offload: str, dtype: Any,
    quant: str, trust_remote_code: bool,
) -> list[int]:  # fmt: skip
    """How many blocks of the model of the class ``kind`` go to each of the ``devices``.

    Raises InputError for weights that do not fit, are packed, or are to stream.
    """
    if offload in ("cpu", "disk"):
        raise InputError(f"--offload {offload}: weights stream to one card, not to several; use one of the two")
    if quant != "none" or getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--model {name!r}: weights packed in few bits are not spread over cards; use one card")
    found = measured(name, spec, None, kind, config, dtype=dtype, trust_remote_code=trust_remote_code)
    if found is None:
        raise InputError(f"--model {name!r}: only its weights tell their size, so they are not spread; use one card")
    arch, sizes, one_prompt = found
    return shares_of_cards(name, sizes, cards_bytes(devices, arch), one_prompt, vocabulary_in_blocks(arch))


def vocabulary_in_blocks(arch: Architecture) -> float:
    """Work of the vocabulary projection on a token, as a multiple of a block's."""
    head, block = (sum(p.numel() for p in part.parameters()) for part in (arch.lm_head, arch.blocks[-1]))
    return head / block


def shares_of_cards(
    name: str, sizes: Sizes, card_bytes: Sequence[int | None], one_prompt: int, at_the_end: float
) -> list[int]:
    """How many consecutive blocks go to each card, so that the one with the most work in a head sweep has as little as
    memory allows. After layer l there are l times as many copies as after the first, so late blocks are most of it.

    ``card_bytes`` are for weights and a pass over one prompt, which takes ``one_prompt``; None: no limit.
    ``at_the_end`` is the vocabulary's work in blocks. Raises InputError if the model does not fit.
    """
    n = len(sizes.blocks)
    rest = [sizes.rest / 2 * (i == 0) + sizes.rest / 2 * (i == len(card_bytes) - 1) for i in range(len(card_bytes))]
    room = [
        math.inf if card is None else card - one_prompt - other for card, other in zip(card_bytes, rest, strict=True)
    ]
    low, high = 0.0, n * n + n * at_the_end
    best = _filled(sizes, room, high, at_the_end)
    if best is None:
        total, there = sizes.rest + sum(sizes.blocks), sum(card or 0 for card in card_bytes)
        raise InputError(
            f"--model {name!r}: its weights take {total / 1e9:.1f} GB, and the cards together have "
            f"{there / 1e9:.1f} GB for them and {one_prompt / 1e9:.1f} GB each for a pass over one prompt; use more "
            "cards, or one card, through which weights stream (--offload auto)"
        )
    for _ in range(60):
        most = (low + high) / 2
        found = _filled(sizes, room, most, at_the_end)
        low, high, best = (low, most, found) if found else (most, high, best)
    return best


def _filled(sizes: Sizes, room: Sequence[float], most: float, at_the_end: float) -> list[int] | None:
    """Number of blocks on each card where each is as full as its room, and ``most`` work, allow; None if some blocks
    are left over."""
    n, layer, counts = len(sizes.blocks), 0, []
    for card, left in enumerate(room):
        work = n * at_the_end if card == len(room) - 1 else 0.0
        start = layer
        while layer < n and sizes.blocks[layer] <= left and work + layer + 1 <= most:
            left, work, layer = left - sizes.blocks[layer], work + layer + 1, layer + 1
        if left < 0 or work > most:
            return None
        counts.append(layer - start)
    return counts if layer == n else None


def cards_bytes(devices: Sequence[torch.device], arch: Architecture) -> list[int | None]:
    """Bytes that this process has of each device for weights and a pass, beside one widened unit and what PyTorch keeps
    for itself; None for a device that is no GPU."""
    return [
        int(_ROOM * bytes_of_card(device)) - 4 * arch.largest_unit - (2 << 30) if device.type == "cuda" else None
        for device in devices
    ]
