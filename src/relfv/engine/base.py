"""What every engine offers, and the plain forward passes they share.

A ``Backbone`` is a model with the knowledge of where its parts are and in which arithmetic it runs. Prompts are lists
of token ids, never padded by the caller; batches are padded on the right, so that real tokens keep positions 0..n-1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from relfv.engine.arithmetic.fusion import Fusions, recognise
from relfv.engine.arithmetic.precision import Arithmetic, Precision, arithmetic
from relfv.engine.arithmetic.products import CAREFUL, Differences, Pieces, Whole, replaced, splittable
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.models.architecture import Architecture
from relfv.types import Effects, HeadId, Prompts

TokenIds = Sequence[Sequence[int]]
Vectors = torch.Tensor | Sequence[torch.Tensor]
"""What ``Engine.inject`` adds: (n_vectors, resid_dim), or parts whose vectors follow one another, each (layer or 1, prompt
or 1, n_vectors, resid_dim), as layers or prompts have their own or share theirs."""


@dataclass(frozen=True)
class Backbone:
    """A causal language model, ready to run."""

    model: Any
    """The transformers model, e.g. LlamaForCausalLM, in eval mode, on ``device``."""
    arch: Architecture
    device: torch.device
    precision: Precision
    tf32: bool = True
    """Whether float32 products may run as TF32 on CUDA."""
    split: tuple[nn.Linear, ...] = ()
    """Linear layers whose float32 products are put together from bf16 pieces (products.py)."""
    pieces: Pieces = field(default_factory=Pieces)
    fusions: Fusions | None = None
    """Fused kernels in place of elementwise PyTorch; None for plain PyTorch everywhere."""

    @classmethod
    def fastest(cls, model: Any, arch: Architecture, device: torch.device, precision: Precision) -> Backbone:
        """With every speed-up that this model, device and precision allow."""
        split = tuple(splittable(model)) if precision == "exact" else ()
        return cls(model, arch, device, precision, split=split, fusions=recognise(model, arch))

    def careful(self) -> Backbone:
        """The same kernels, rounded as little as float32: whether they are right shows here, at any size of effect."""
        split = tuple(splittable(self.model))
        return replace(self, precision="exact", tf32=False, split=split, pieces=CAREFUL)

    def plain(self) -> Backbone:
        """The same arithmetic in plain PyTorch."""
        return replace(self, split=(), fusions=None)

    def strict(self) -> Backbone:
        """Plain PyTorch in plain float32: what everything else is compared with."""
        return replace(self.plain(), precision="exact", tf32=False)

    def products(self) -> dict[str, str | bool]:
        """For the record: what its linear layers multiply in, and whether fused kernels run."""
        tf32 = self._arithmetic.matmul == "high" and self.device.type == "cuda"
        if self.precision == "fast":
            kind = "the checkpoint's dtype"
        elif self.split:
            kind = "bf16 pieces of float32" + (" in some layers, tf32 in the others" if tf32 else "")
        else:
            kind = "tf32" if tf32 else "float32"
        return {"products": kind, "kernels": self.fusions is not None}

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which every forward pass happens: no gradients, and the arithmetic of ``precision``."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._arithmetic.in_force())
            whole = Whole(self.pieces.whole)
            stack.enter_context(replaced([(linear, whole.forward(linear)) for linear in self.split]))
            if self.fusions:
                stack.enter_context(self.fusions.installed())
            yield

    @cached_property
    def _arithmetic(self) -> Arithmetic:
        norms = [norm.module for norm in self.fusions.norms] if self.fusions else []
        return arithmetic(self.model, self.arch, self.precision, tf32=self.tf32, as_they_are=[*self.split, *norms])

    @contextmanager
    def multiplying_differences(self) -> Iterator[None]:
        """Within ``running``: inputs of split layers are copies (N, C, in) that share a base, copy 0."""
        differences = Differences(self.pieces)
        forwards = [(linear, differences.forward(linear)) for linear in self.split]
        whole = {id(linear) for linear in self.split}
        for mlp in self.fusions.mlps if self.fusions else ():
            if all(id(part) in whole for part in mlp.linears):
                forwards.append((mlp.module, mlp.difference_forward(differences)))
        with replaced(forwards):
            yield

    @property
    def decoder(self) -> nn.Module:
        """The model without its vocabulary projection; its first output is the final, normed hidden state."""
        return self.arch.decoder

    def depends_on_company(self, prompts: TokenIds) -> bool:
        """True if what a prompt gives depends on the others in its batch, and on being run in one go: see
        ``Architecture.steady_up_to``."""
        limit = self.arch.steady_up_to
        return limit is not None and max(len(prompt) for prompt in prompts) > limit

    def passes(self, prompts: TokenIds, size: int) -> Iterator[slice]:
        """``prompt_chunks`` of at most ``size``, one by one where prompts must not share a batch."""
        return prompt_chunks(len(prompts), 1 if self.depends_on_company(prompts) else size)

    def takes_position_ids(self) -> bool:
        """False for families that number positions themselves (Falcon with ALiBi, Bloom)."""
        return "position_ids" in inspect.signature(self.decoder.forward).parameters

    def intermediate_size(self) -> int:
        """Width of the MLP, for memory estimates alone."""
        return self.arch.intermediate_size


class Engine(Protocol):
    """Two interventions at the last token, each compared with the same pass without it."""

    name: str
    backbone: Backbone

    def sweep_heads(
        self,
        prompts: Prompts,
        replacement: torch.Tensor | None,
        heads: Sequence[HeadId],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        """For each prompt and head: z[layer, head] := replacement[layer, head], one head at a time.

        ``replacement`` is (layer, head, head_dim), or (len(heads), head_dim), a value for each of ``heads``; these are
        sorted, may then name a head several times, and are the second axis of the result. None replaces each head by
        its own value in the unpatched copy: a patch that changes nothing, whose effect is whatever the arithmetic makes
        up (stages/noise_floor.py).

        ``per_pass`` prompts share a forward pass; None leaves the number to the engine. An engine that finds no room
        for so many goes on with fewer; ``Effects.per_pass`` says how many it was.
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
        """For each prompt, layer and vector: hidden state after the block += vector.

        ``layers`` ascend; the second axis of the result runs over layers, then vectors: column i * n_vectors + v.
        ``per_pass`` as in ``sweep_heads``.
        """
        ...

    def finer(self) -> Engine:
        """The same engine with less rounding, where its arithmetic has a choice: what its rounding is measured with."""
        ...


def values_of(replacement: torch.Tensor | None, heads: Sequence[HeadId], device: torch.device) -> torch.Tensor | None:
    """A value for each of ``heads``, (len(heads), head_dim), on ``device``."""
    if replacement is not None and replacement.dim() == 3:
        replacement = replacement[[head.layer for head in heads], [head.head for head in heads]]
    return None if replacement is None else replacement.to(device)


def in_parts(vectors: Vectors, device: torch.device) -> list[torch.Tensor]:
    """``vectors`` as parts, on ``device``."""
    parts = [vectors[None, None]] if isinstance(vectors, torch.Tensor) else vectors
    return [part.to(device) for part in parts]


def of_layer_and_prompts(parts: Sequence[torch.Tensor], layer: int, prompts: slice) -> torch.Tensor:
    """What is added at the ``layer``-th of the layers: (prompt or 1, n_vectors, resid_dim)."""
    of_layer = [part[layer if len(part) > 1 else 0] for part in parts]
    own = [part[prompts] if len(part) > 1 else part for part in of_layer]
    n_prompts = max(len(part) for part in own)
    return torch.cat([part.expand(n_prompts, -1, -1) for part in own], dim=1)


def pad_right(prompts: TokenIds, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> input_ids (N, P), attention_mask (N, P), lengths (N,). The padding id is never attended to."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device)[None] < lengths[:, None]).long()
    return ids, mask, lengths


def last_hidden(backbone: Backbone, prompts: TokenIds) -> torch.Tensor:
    """Final normed hidden state at each prompt's last token: (N, resid_dim)."""
    ids, mask, lengths = pad_right(prompts, backbone.device)
    hidden = backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1]


def capture_heads(backbone: Backbone, prompts: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
    """z of every head at the last token, and the final hidden state there.

    -> float32 (N, layer, head, head_dim) on the CPU, and (N, resid_dim) on the device. Call inside ``running``.
    """
    arch = backbone.arch
    rows = torch.arange(len(prompts), device=backbone.device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=backbone.device)
    captured: dict[int, torch.Tensor] = {}

    def reader(layer: int):  # type: ignore[no-untyped-def]
        def read(z: torch.Tensor) -> None:
            captured[layer] = z[rows, last].float()

        return read

    with editing_inputs([(projection, reader(layer)) for layer, projection in enumerate(arch.out_projs)]):
        hidden = last_hidden(backbone, prompts)
    z = torch.stack([captured[layer] for layer in range(arch.n_layers)], dim=1).cpu()
    return z.view(len(prompts), arch.n_layers, arch.n_heads, arch.head_dim), hidden


@contextmanager
def reading_blocks(backbone: Backbone, prompts: TokenIds) -> Iterator[dict[int, torch.Tensor]]:
    """While open, forward passes over ``prompts`` note the hidden state after each block at the last token: layer ->
    float32 (N, resid_dim), on the device."""
    rows = torch.arange(len(prompts), device=backbone.device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=backbone.device)
    seen: dict[int, torch.Tensor] = {}

    def reader(layer: int):  # type: ignore[no-untyped-def]
        def read(hidden: torch.Tensor) -> None:
            seen[layer] = hidden[rows, last].float()

        return read

    with editing_outputs([(block, reader(layer)) for layer, block in enumerate(backbone.arch.blocks)]):
        yield seen


def prompt_chunks(n_prompts: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` prompts, in order."""
    for start in range(0, n_prompts, size):
        yield slice(start, min(start + size, n_prompts))
