"""Placement of each block's weights: on the card, in host memory, or in the files they came in.

``plan`` decides from sizes alone, before anything is loaded, so that ``--dry_run`` says the same. Everything outside
the blocks (embeddings, vocabulary projection, final norm) is always on the card. How the others get there in time:
streaming.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relfv.errors import InputError
from relfv.models.architecture import Architecture, resolve, text_config
from relfv.models.formats import format_of, unpacks
from relfv.models.memory import available_bytes, bytes_of_card, processes_a_card
from relfv.models.size import stored_names

log = logging.getLogger(__name__)

SLOTS = 3
"""Blocks on the card at a time among those that stream: one computes, the others' weights are on their way."""

N_TRIALS = 25
"""Number of trials of a q_id by default."""
PROMPTS_A_PASS = 4
"""Prompts in a pass that room is kept for where blocks stream: a pass over more is hardly quicker, since all share one
trip of the weights, and stages that compute little are as quick as there are layers that do not stream."""
_TOKENS = 128
"""Tokens of a prompt, for estimates."""
_SHARE = 0.9
"""Share of a card's memory, and of what is free on the host, that may be used."""
_SLACK = 4 << 30
"""Bytes for what a card holds beside weights and a pass: read-out, kept prefixes, what PyTorch keeps for itself."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights as they are loaded."""

    blocks: tuple[int, ...]
    """Bytes of each block."""
    rest: int
    made: tuple[int, ...]
    """Bytes of each block, counted in ``blocks``, that no file holds in this form: converted in dtype, or joined from
    several tensors while they are loaded. They take host memory wherever they are meant to be."""


@dataclass(frozen=True)
class Placement:
    """The layers whose weights are kept in each place, ascending, and how much memory that takes, in bytes."""

    resident: tuple[int, ...]
    """Layers on the card."""
    host: tuple[int, ...]
    """Layers in host memory; they stream."""
    disk: tuple[int, ...]
    """Layers in files that are mapped into memory; they stream by way of a small buffer."""
    card_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def streams(self) -> bool:
        """Whether any layer is not on the card."""
        return bool(self.host or self.disk)

    def __str__(self) -> str:
        """The placement in words: what is where, and the memory for it."""
        n_layers = len(self.resident) + len(self.host) + len(self.disk)
        if not self.streams:
            return f"all {n_layers} layers on the device, {_gb(self.card_bytes)}"
        parts = [
            f"{len(self.resident)} of {n_layers} layers on the device ({_gb(self.card_bytes)} with the slots)",
            *([f"{len(self.host)} stream from host memory ({_gb(self.host_bytes)})"] if self.host else []),
            *([f"{len(self.disk)} stream from their files ({_gb(self.disk_bytes)})"] if self.disk else []),
        ]
        return ", ".join(parts)


def foreseen(
    name: str, spec: str, folder: Path, kind: Any, config: Any, *, offload: str, device: torch.device, dtype: Any,
    quant: str, trust_remote_code: bool,
) -> Placement | None:  # fmt: skip
    """Placement of the weights of the model in ``folder``, of the class ``kind``, once it is opened on ``device`` in
    ``dtype`` (None: as stored); None where nothing streams or can stream.

    Raises InputError for weights that do not fit, and for packed ones that are to stream.
    """
    if not _may_stream(name, config, offload=offload, device=device, quant=quant):
        return None
    found = measured(name, spec, folder, kind, config, dtype=dtype, trust_remote_code=trust_remote_code)
    if found is None and offload == "auto":
        return None
    if found is None:
        raise InputError(f"--offload {offload}: of {name!r} only its weights tell their size; use --offload none")
    arch, sizes, one_prompt = found
    # Each process makes for itself the weights that are converted or joined while they are loaded.
    host = available_bytes(to_share=not any(sizes.made))
    waiting = bytes_waiting(arch, arch.n_heads * len(arch.out_projs))
    return plan(name, offload, sizes, card=card_bytes(device, arch), one_prompt=one_prompt, waiting=waiting, host=host)


def measured(
    name: str, spec: str, folder: Path | None, kind: Any, config: Any, *, dtype: Any, trust_remote_code: bool
) -> tuple[Architecture, Sizes, int] | None:
    """Parts of a model that is not loaded, its weights' sizes, and the bytes of a pass over one prompt; None where only
    its weights can tell. Otherwise as ``foreseen``."""
    said = (getattr(part, "dtype", None) for part in (config, text_config(config)))
    stored = next((dtype for dtype in said if isinstance(dtype, torch.dtype)), None)
    model = sketch(kind, config, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    if dtype or stored:
        model.to(dtype or stored)
    arch = resolve(model, spec)
    names = stored_names(folder) if folder else None
    converted = bool(format_of(config) or (dtype and stored and dtype != stored))
    sizes = sizes_of(model, arch, names, converted=converted)
    return arch, sizes, bytes_of_prompt(arch, arch.n_heads * len(arch.out_projs))


def _may_stream(name: str, config: Any, *, offload: str, device: torch.device, quant: str) -> bool:
    if offload == "none":
        return False
    packed = quant != "none" or (format_of(config) is not None and not unpacks(config))
    if offload == "auto":
        return device.type == "cuda" and not packed
    if packed:
        raise InputError(
            f"--offload {offload}: the weights of {name!r} are packed in few bits, and packed weights do not stream; "
            "use --offload none, or a model with weights of 16 or 32 bits"
        )
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--offload {offload}: weights do not stream to {device}; use --offload none")
    return True


def sketch(kind: Any, config: Any, *, trust_remote_code: bool) -> Any:
    """A model of the class ``kind`` without numbers, in a moment, whatever its size; None where the config alone cannot
    say."""
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as problem:  # not every family can be built from a config alone
        log.debug("no sketch of a model: %s", problem)
        return None


def sizes_of(model: nn.Module, arch: Architecture, stored: Collection[str] | None, *, converted: bool) -> Sizes:
    """Sizes of the weights of ``model``, which may be without numbers (on the meta device).

    ``stored`` are the names of its tensors in files, None if not known; ``converted`` says that files hold them in
    another dtype.
    """
    own = streamable(model, arch)
    sizes = [sum(p.nbytes for p in block.values()) for block in own]
    total = sum(p.nbytes for p in model.parameters())
    ends = {_in_layer(name) for name in stored or ()}
    made = [
        sum(p.nbytes for name, p in block.items() if converted or (ends and f"{layer}.{name}" not in ends))
        for layer, block in enumerate(own)
    ]
    return Sizes(tuple(sizes), total - sum(sizes), tuple(made))


def streamable(model: nn.Module, arch: Architecture) -> list[dict[str, nn.Parameter]]:
    """Parameters of each block that are its own, by their names in it: one that another block or the rest of the model
    uses, too, stays on the card."""
    of_blocks = [dict(block.named_parameters()) for block in arch.blocks]
    users: dict[int, int] = {}
    for block in of_blocks:
        for parameter in block.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    inside = {id(module) for block in arch.blocks for module in block.modules()}
    outside = (module for module in model.modules() if id(module) not in inside)
    shared = {id(p) for module in outside for p in module.parameters(recurse=False)}
    return [{name: p for name, p in block.items() if users[id(p)] == 1 and id(p) not in shared} for block in of_blocks]


def plan(
    name: str, offload: str, sizes: Sizes, *, card: int | None, one_prompt: int, waiting: int, host: int | None,
    prompts: int = PROMPTS_A_PASS,
) -> Placement:  # fmt: skip
    """Decide where the blocks of the model ``name`` go.

    ``card`` bytes are there for weights and passes: one prompt takes ``one_prompt`` of them in its pass and ``waiting``
    between blocks; and ``host`` bytes are free; None: no limit. ``offload`` is ``auto``: on the card if all fits, else
    as many of the first layers (they compute least in a sweep) as leave room for passes over ``prompts`` while all of a
    q_id wait, then host memory, then files; ``none``, ``cpu`` or ``disk``: all there. Raises InputError if not all fit.
    """
    layers, total = range(len(sizes.blocks)), sum(sizes.blocks)
    everything = Placement(tuple(layers), (), (), sizes.rest + total, 0, 0)
    # A pass over a few prompts needs little of the slack, and a card that is just large enough is quicker than a bus.
    fits = card is None or everything.card_bytes + one_prompt <= card + _SLACK // 2
    if offload == "none" or (offload == "auto" and fits):
        return everything
    if offload == "auto" and (n := processes_a_card()) > 1:
        raise InputError(
            f"--model {name!r}: {n} processes on a card have {_gb(max(card or 0, 0))} each, too little for weights, "
            f"{_gb(everything.card_bytes)}, and a pass, {_gb(one_prompt)}; use fewer (--per_card), or --quant 4bit"
        )
    slots = min(SLOTS, len(sizes.blocks)) * max(sizes.blocks)
    n_resident = 0
    if offload == "auto" and card is not None:
        n_resident = _n_resident(name, sizes, slots, card, one_prompt, prompts * one_prompt + N_TRIALS * waiting)
    streamed = layers[n_resident:]
    usable = None if host is None else int(_SHARE * host)
    in_host = _in_host(name, offload, sizes, streamed, usable)
    on_disk = [layer for layer in streamed if layer not in in_host]
    return Placement(
        tuple(layers[:n_resident]),
        tuple(in_host),
        tuple(on_disk),
        card_bytes=sizes.rest + slots + sum(sizes.blocks[:n_resident]),
        host_bytes=sum(sizes.blocks[layer] for layer in in_host) + sum(sizes.made[layer] for layer in on_disk),
        disk_bytes=sum(sizes.blocks[layer] - sizes.made[layer] for layer in on_disk),
    )


def _n_resident(name: str, sizes: Sizes, slots: int, card: int, one_prompt: int, passes: int) -> int:
    """Number of first layers that stay on the card: ``passes`` get the room they want, but no more than half of what is
    left, and at least for one prompt."""
    left = card - sizes.rest - slots
    if left < one_prompt:
        raise InputError(
            f"--model {name!r}: of its weights what does not stream takes {_gb(sizes.rest)}, {SLOTS} blocks that do "
            f"{_gb(slots)} and a pass over one prompt {_gb(one_prompt)}, and the card has {_gb(max(card, 0))} for "
            "them; use --precision fast, --quant 4bit or a larger card"
        )
    left -= max(one_prompt, min(passes, left // 2))
    n = 0
    while n < len(sizes.blocks) and sizes.blocks[n] <= left:
        left -= sizes.blocks[n]
        n += 1
    return n


def _in_host(name: str, offload: str, sizes: Sizes, streamed: Sequence[int], usable: int | None) -> list[int]:
    """The layers of ``streamed`` that host memory holds: as many as there is room for, the first ones."""
    made = sum(sizes.made[layer] for layer in streamed)
    needed = sum(sizes.blocks[layer] for layer in streamed) if offload == "cpu" else made
    if usable is not None and needed > usable:
        why = "" if offload == "cpu" else ", since its files hold them in another form than they are computed with"
        remedy = "--offload disk" if offload == "cpu" and made <= usable else "--dtype auto"
        raise InputError(
            f"--model {name!r}: the weights that stream take {_gb(needed)} of host memory{why}, and {_gb(usable)} are "
            f"there for them; use {remedy}, or a machine with more memory"
        )
    if offload == "disk":
        return []
    left, found = None if usable is None else usable - made, []
    for layer in streamed:
        more = sizes.blocks[layer] - sizes.made[layer]
        if left is not None:
            if more > left:
                break
            left -= more
        found.append(layer)
    return found


def card_bytes(device: torch.device, arch: Architecture) -> int | None:
    """Bytes that this process has of a CUDA device for weights and passes, beside one widened unit and some slack; None
    for other devices."""
    if device.type != "cuda":
        return None
    return int(_SHARE * bytes_of_card(device)) - 4 * arch.largest_unit - _SLACK


def bytes_of_prompt(arch: Architecture, n_edits: int, length: int = _TOKENS) -> int:
    """Bytes of a pass over the last token of one prompt of ``length`` tokens, with a copy for each edit."""
    rows = 1 + n_edits
    per_row = 3 * arch.intermediate_size + 6 * arch.resid_dim + 3 * arch.n_heads * arch.head_dim
    return 4 * (rows * per_row + 3 * rows * arch.n_heads * length)


def bytes_waiting(arch: Architecture, n_edits: int) -> int:
    """Bytes of the copies of one prompt between two blocks."""
    return 4 * (1 + n_edits) * arch.resid_dim


def _in_layer(name: str) -> str:
    """A tensor's name from the number of its layer on."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[first:])


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
