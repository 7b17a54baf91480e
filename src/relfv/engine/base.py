"""The engines' common interface, and the ``Backbone`` that they run on.

A ``Backbone`` is a model with the knowledge of where its parts are and in which arithmetic it computes. Prompts are
lists of token ids, never padded by the caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from relfv.engine.arithmetic import Arithmetic
from relfv.models.architecture import Architecture, text_config
from relfv.models.cards import Cards
from relfv.models.streaming import Streaming
from relfv.progress import at_layer, counted
from relfv.types import Effects, HeadId, Prompts

TokenIds = Sequence[Sequence[int]]
Array = torch.Tensor | np.ndarray
Vectors = Array | Sequence[Array]
"""Vectors for ``Engine.inject``: (n_vectors, resid_dim), or parts whose vectors follow one another, each (layer or 1,
prompt or 1, n_vectors, resid_dim); an axis of 1 is shared by all layers or prompts."""


@dataclass(frozen=True)
class Backbone:
    """A causal language model, ready to run."""

    model: Any
    """The transformers model, e.g. LlamaForCausalLM, in eval mode, on ``device``."""
    arch: Architecture
    device: torch.device
    arithmetic: Arithmetic
    streaming: Streaming | None = None
    """The blocks that stream, if any do."""
    cards: Cards | None = None
    """Placement of the blocks on several cards, of which ``device`` is then the first; None on one device."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which every forward pass happens: no gradients, and ``arithmetic``."""
        # Kernels start on the current device, whichever their tensors are on.
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current, self.arithmetic.running(), self._told_by_layer():
            yield

    @property
    def devices(self) -> Sequence[torch.device]:
        """All devices that the model computes on."""
        return self.cards.devices if self.cards else [self.device]

    @contextmanager
    def _told_by_layer(self) -> Iterator[None]:
        """While open, passes tell progress which layer they are in, on a CPU, where one may take minutes."""
        blocks = self.arch.blocks if self.device.type == "cpu" else ()
        handles = [
            block.register_forward_pre_hook(lambda *_, layer=layer: at_layer(f"layer {layer} of {len(blocks)}"))
            for layer, block in enumerate(blocks, start=1)
        ]
        try:
            yield
        finally:
            at_layer("")
            for handle in handles:
                handle.remove()

    def device_of(self, layer: int) -> torch.device:
        """Device on which the block ``layer`` computes."""
        return self.cards.of_layer[layer] if self.cards else self.device

    def plain(self) -> Backbone:
        """Copy of this backbone that computes by PyTorch alone: no pieces, no kernels."""
        return replace(self, arithmetic=self.arithmetic.plain())

    def in_float32(self) -> Backbone:
        """Copy of this backbone with float32's rounding and no more. Everything else is compared with
        ``plain().in_float32()``."""
        return replace(self, arithmetic=self.arithmetic.in_float32())

    def finer(self) -> Backbone:
        """Copy of this backbone with differences in more pieces, where there are pieces."""
        return replace(self, arithmetic=self.arithmetic.finer())

    def over_likeliest_tokens(self) -> Backbone:
        """Copy of this backbone that reads copies out over fewer tokens, where that saves much; else this backbone."""
        arithmetic = self.arithmetic.over_likeliest_tokens()
        return self if arithmetic is self.arithmetic else replace(self, arithmetic=arithmetic)

    @cached_property
    def configs(self) -> list[Any]:
        """The config objects that attention modules and mask builders read; a module may hold a copy."""
        held = [module.config for module in self.model.modules() if hasattr(module, "config")]
        return [*{id(config): config for config in [text_config(self.model.config), *held]}.values()]

    @property
    def decoder(self) -> nn.Module:
        """The model without its vocabulary projection; its first output is the final, normed hidden state."""
        return self.arch.decoder

    def depends_on_company(self, prompts: TokenIds) -> bool:
        """True if a prompt's results depend on the others in its batch, and on running prefix and last token in one
        pass: see ``Architecture.steady_up_to``."""
        limit = self.arch.steady_up_to
        return limit is not None and max(len(prompt) for prompt in prompts) > limit

    def passes(self, prompts: TokenIds, size: int) -> Iterator[slice]:
        """Slices of at most ``size`` prompts, as ``prompt_chunks``; one by one where prompts must not share a batch."""
        return prompt_chunks(len(prompts), 1 if self.depends_on_company(prompts) else size)

    def takes_position_ids(self) -> bool:
        """False for families that number positions themselves (Falcon with ALiBi, Bloom)."""
        return "position_ids" in inspect.signature(self.decoder.forward).parameters

    @cached_property
    def weights_on_device(self) -> int:
        """Bytes that weights take on the device, slots of streamed blocks included; with several devices, on the
        fullest."""
        there: dict[torch.device, int] = {}
        for parameter in self.model.parameters():
            there[parameter.device] = there.get(parameter.device, 0) + parameter.nbytes
        most = max(there.get(device, 0) for device in self.devices)
        return most + (self.streaming.slot_bytes if self.streaming else 0)


@dataclass(frozen=True)
class Together:
    """Edits of the last token that are all made in one pass. In every tensor, a first axis of 1 is shared by all
    prompts. After a block, a direction is taken out before a vector is added."""

    chosen: torch.Tensor | None = None
    """bool (prompt or 1, layer, head): the heads whose z is set."""
    values: torch.Tensor | None = None
    """(prompt or 1, layer, head, head_dim): values that z is set to; those of heads that are not chosen are not
    read."""
    added: torch.Tensor | None = None
    """(prompt or 1, layer, resid_dim): vectors added to the hidden state after each block."""
    removed: torch.Tensor | None = None
    """(prompt or 1, layer, resid_dim): directions d, of length 1, or of length 0 where nothing is taken out: after the
    block the hidden state h becomes h - (h . d) d."""

    mlps: torch.Tensor | None = None
    """(prompt or 1, layer, resid_dim): values that the output of each layer's MLP is set to; NaN where it is left
    alone."""

    @staticmethod
    def setting(sets: Sequence[Sequence[HeadId]], values: torch.Tensor) -> Together:
        """Edits that set z of each set's heads to ``values``: one set and its values for each prompt, or one for
        all."""
        chosen = torch.zeros(len(sets), *values.shape[1:3], dtype=torch.bool)
        for row, heads in enumerate(sets):
            chosen[row, [head.layer for head in heads], [head.head for head in heads]] = True
        return Together(chosen, values)


class Engine(Protocol):
    """Interventions at the last token, each compared with the same pass without it."""

    name: str
    backbone: Backbone

    def sweep_heads(
        self,
        prompts: Prompts,
        replacement: Array | None,
        heads: Sequence[HeadId],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        """Set z[layer, head] := replacement[layer, head], one head at a time, for each prompt and head.

        ``replacement`` is (layer, head, head_dim), or (len(heads), head_dim), a value for each of ``heads``; these are
        sorted, may then name a head several times, and are the second axis of the result. None replaces each head by
        its value in the unpatched copy: a patch that changes nothing, whose effect is rounding alone
        (stages/noise_floor.py).

        ``per_pass`` prompts share a forward pass; None leaves the number to the engine. An engine that runs out of
        memory goes on with fewer; ``Effects.per_pass`` says how many it was.
        """
        ...

    def inject(
        self,
        prompts: Prompts,
        vectors: Vectors,
        layers: Sequence[int],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        """Add a vector to the hidden state after a block, for each prompt, layer and vector.

        ``layers`` ascend; the second axis of the result runs over layers, then vectors: column i * n_vectors + v.
        ``per_pass`` as in ``sweep_heads``.
        """
        ...

    def edit_together(
        self,
        prompts: Prompts,
        versions: Sequence[Together],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        """Make all of a version's edits in one pass, for each prompt and version; the second axis of the result runs
        over ``versions``. ``per_pass`` as in ``sweep_heads``.
        """
        ...

    def prepare(self, prompts: Prompts) -> None:
        """Begin what later passes over ``prompts`` have in common, if there is something."""
        ...

    def over_likeliest_tokens(self) -> Engine:
        """This engine, or one that reads edited passes out over fewer tokens, faster where a CPU has a large
        vocabulary: for many edits that each matter little."""
        ...

    def finer(self) -> Engine:
        """An engine like this one with less rounding, where its arithmetic has a choice, so that rounding can be
        measured."""
        ...


def sent(values: Sequence[Any] | Array, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``, without waiting for what is queued there."""
    tensor = torch.as_tensor(values)
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def values_of(replacement: Array | None, heads: Sequence[HeadId], device: torch.device) -> torch.Tensor | None:
    """A value for each of ``heads``, (len(heads), head_dim), on ``device``."""
    if replacement is None:
        return None
    values = torch.as_tensor(replacement)
    if values.dim() == 3:
        values = values[[head.layer for head in heads], [head.head for head in heads]]
    return sent(values, device)


def in_parts(vectors: Vectors, device: torch.device) -> list[torch.Tensor]:
    """``vectors`` as parts, on ``device``."""
    parts = [vectors[None, None]] if isinstance(vectors, torch.Tensor | np.ndarray) else vectors
    return [sent(part, device) for part in parts]


def of_layer_and_prompts(parts: Sequence[torch.Tensor], layer: int, prompts: slice) -> torch.Tensor:
    """Vectors added at the ``layer``-th of the layers: (prompt or 1, n_vectors, resid_dim)."""
    of_layer = [part[layer if len(part) > 1 else 0] for part in parts]
    of_prompts = [part[prompts] if len(part) > 1 else part for part in of_layer]
    n_prompts = max(len(part) for part in of_prompts)
    return torch.cat([part.expand(n_prompts, -1, -1) for part in of_prompts], dim=1)


def prompt_chunks(n_prompts: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` prompts, in order; progress counts them."""
    return counted([*slices(n_prompts, size)], lambda part: part.stop - part.start)


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of at most ``size`` each, in order, from ``start`` to ``stop``."""
    return (slice(begin, min(begin + size, stop)) for begin in range(start, stop, size))
