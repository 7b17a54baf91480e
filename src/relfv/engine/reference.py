"""The reference engine: interventions by hooks on whole forward passes. It is slow, and everything else is compared
with it.

``naive_*`` run one full, unpadded forward pass per intervention, as published code does. ``ReferenceEngine`` does the
same with the interventions of one layer as the rows of one batch; it needs only the model's blocks and output
projections, and runs the families whose attention the shared-prefix engine cannot drive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from relfv.engine.base import Array, Backbone, Together, Vectors, in_parts, of_layer_and_prompts, values_of
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.memory import shrinking
from relfv.engine.readout import joined, read_targets
from relfv.engine.together import Edit, editing_together
from relfv.models.mlps import mlps_of
from relfv.progress import counted
from relfv.types import Effects, HeadId, Prompts, TokenScores

Version = tuple[Mapping[HeadId, torch.Tensor], Mapping[int, torch.Tensor]]
"""Heads' activations that are set, and vectors that are added after layers."""
_Hooked = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor | None]]


def naive_head_patch(
    backbone: Backbone, prompt: Sequence[int], target: int, head: HeadId, activation: torch.Tensor
) -> TokenScores:
    """One forward pass with one head's last-token output set to ``activation`` (head_dim,). Fields are (1,)."""
    return naive_together(backbone, prompt, target, {head: activation}, {})


def naive_injection(
    backbone: Backbone, prompt: Sequence[int], target: int, layer: int, vector: torch.Tensor
) -> TokenScores:
    """One forward pass with ``vector`` (resid_dim,) added to the last token after block ``layer``. Fields are (1,)."""
    return naive_together(backbone, prompt, target, {}, {layer: vector})


def naive_together(
    backbone: Backbone,
    prompt: Sequence[int],
    target: int,
    activations: Mapping[HeadId, torch.Tensor],
    vectors: Mapping[int, torch.Tensor],
    directions: Mapping[int, torch.Tensor] = MappingProxyType({}),
    mlps: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> TokenScores:
    """One forward pass with several heads' last-token outputs set to their ``activations`` (head_dim,), and the output
    of the ``mlps`` of these layers to (resid_dim,); and after the blocks of these layers ``directions`` (resid_dim,),
    of length 1, taken out of the last token, and then ``vectors`` (resid_dim,) added to it. Fields are (1,)."""
    inputs, outputs = _edits_of_row(backbone, 0, activations, vectors, directions, mlps)
    with editing_inputs(inputs), editing_outputs(outputs):
        return _score_rows(backbone, prompt, target, n_rows=1)


def naive_rows(backbone: Backbone, prompt: Sequence[int], target: int, versions: Sequence[Version]) -> TokenScores:
    """``naive_together`` with each version's activations and vectors, as the rows of one batch; row 0 is untouched.
    Fields are (1 + version,)."""
    inputs: list[_Hooked] = []
    outputs: list[_Hooked] = []
    for row, version in enumerate(versions, start=1):
        of_row = _edits_of_row(backbone, row, *version)
        inputs += of_row[0]
        outputs += of_row[1]
    with editing_inputs(inputs), editing_outputs(outputs):
        return _score_rows(backbone, prompt, target, n_rows=1 + len(versions))


def _edits_of_row(
    backbone: Backbone,
    row: int,
    activations: Mapping[HeadId, torch.Tensor],
    vectors: Mapping[int, torch.Tensor],
    directions: Mapping[int, torch.Tensor] = MappingProxyType({}),
    mlps: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> tuple[Sequence[_Hooked], Sequence[_Hooked]]:
    """Edits of one row's last token: at the inputs of modules, and at outputs."""
    arch, dim = backbone.arch, backbone.arch.head_dim

    def editing(edit: Callable[[torch.Tensor, Any], torch.Tensor], by: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def on_row(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            values[row, -1] = edit(values[row, -1], by)
            return values

        return on_row

    def patch(z: torch.Tensor, layer: int) -> torch.Tensor:
        for head, activation in activations.items():
            if head.layer == layer:
                z[head.head * dim : (head.head + 1) * dim] = activation.to(z)
        return z

    def remove(hidden: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        unit = direction.to(hidden)
        return hidden - (hidden * unit).sum() * unit

    inputs = [(arch.out_projs[layer], editing(patch, layer)) for layer in sorted({h.layer for h in activations})]
    outputs = [(arch.blocks[layer], editing(remove, direction)) for layer, direction in directions.items()]
    outputs += [
        (arch.blocks[layer], editing(lambda hidden, v: hidden + v.to(hidden), vector))
        for layer, vector in vectors.items()
    ]
    outputs += [
        (mlps_of(arch)[layer], editing(lambda written, v: v.to(written), value)) for layer, value in mlps.items()
    ]
    return inputs, outputs


def naive_baseline(backbone: Backbone, prompt: Sequence[int], target: int) -> TokenScores:
    """One untouched forward pass. Fields are (1,)."""
    return _score_rows(backbone, prompt, target, n_rows=1)


_VERSIONS_A_PASS = 32
"""Most versions in one pass of ``set_at_tokens``, by default; each takes a whole prompt as its row."""


@dataclass(frozen=True)
class AtTokens:
    """Heads to set, and the slots at whose tokens they are set; a slot is a place that all prompts have."""

    heads: tuple[HeadId, ...]
    slots: tuple[int, ...]


@dataclass
class ReferenceEngine:
    """Engine that runs every intervention of a layer as one row of a batch of whole forward passes; row 0 is left
    alone.

    A pass holds one prompt, whatever ``per_pass`` asks for.
    """

    backbone: Backbone
    name = "reference"

    def sweep_heads(
        self,
        prompts: Prompts,
        replacement: Array | None,
        heads: Sequence[HeadId],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        arch = self.backbone.arch
        values = values_of(replacement, heads, self.backbone.device)
        groups = [list(group) for _, group in groupby(range(len(heads)), key=lambda column: heads[column].layer)]
        # All batches have one shape, so that the baseline of one is the baseline of all.
        n_rows = 1 + max(len(group) for group in groups)

        def patching(group: list[int], prompt: int) -> AbstractContextManager[None]:
            layer, index = heads[group[0]].layer, [heads[column].head for column in group]
            rows = list(range(1, 1 + len(group)))

            def patch(z: torch.Tensor) -> torch.Tensor:
                z = z.clone()
                last = z[:, -1].view(len(z), arch.n_heads, arch.head_dim)
                last[rows, index] = last[0, index] if values is None else values[group].to(z)
                return z

            return editing_inputs([(arch.out_projs[layer], patch)])

        return self._run(prompts, n_rows, [(len(group), partial(patching, group)) for group in groups])

    def inject(
        self,
        prompts: Prompts,
        vectors: Vectors,
        layers: Sequence[int],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        parts = in_parts(vectors, self.backbone.device)
        n_vectors = sum(part.shape[-2] for part in parts)
        lengths = torch.zeros(len(prompts), len(layers), device=self.backbone.device)

        def adding(index: int, layer: int, prompt: int) -> AbstractContextManager[None]:
            added = of_layer_and_prompts(parts, index, slice(prompt, prompt + 1))[0]

            def add(hidden: torch.Tensor) -> torch.Tensor:
                lengths[prompt, index] = hidden[0, -1].float().norm()
                hidden = hidden.clone()
                hidden[1:, -1] += added.to(hidden)
                return hidden

            return editing_outputs([(self.backbone.arch.blocks[layer], add)])

        edits = [(n_vectors, partial(adding, index, layer)) for index, layer in enumerate(layers)]
        return replace(self._run(prompts, 1 + n_vectors, edits), lengths=lengths.cpu())

    def edit_together(self, prompts: Prompts, versions: Sequence[Together], *, per_pass: int | None = None) -> Effects:
        def at_last(edit: Edit) -> Edit:
            def on_rows(values: torch.Tensor) -> torch.Tensor:
                values = values.clone()
                values[:, -1] = edit(values[None, :, -1])[0]
                return values

            return on_rows

        def editing(prompt: int) -> AbstractContextManager[None]:
            return editing_together(self.backbone, versions, slice(prompt, prompt + 1), at_last)

        return self._run(prompts, 1 + len(versions), [(len(versions), editing)])

    def set_at_tokens(
        self,
        prompts: Prompts,
        places: Sequence[Sequence[int]],
        values: torch.Tensor,
        versions: Sequence[AtTokens],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        """Set z of each version's heads, at the tokens of its slots, to ``values`` (slot, layer, head, head_dim), for
        each prompt and version. ``places`` (prompt, slot) holds each slot's token index; ``per_pass`` versions share a
        pass, and are what ``Effects.per_pass`` counts."""
        arch = self.backbone.arch

        def editing(some: Sequence[AtTokens], prompt: int) -> AbstractContextManager[None]:
            def patching(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
                cells = [
                    (row, places[prompt][slot], head.head, slot)
                    for row, version in enumerate(some, start=1)
                    for slot in version.slots
                    for head in version.heads
                    if head.layer == layer
                ]
                rows, tokens, heads, slots = map(list, zip(*cells, strict=True))

                def patch(z: torch.Tensor) -> torch.Tensor:
                    by_head = z.clone().unflatten(-1, (arch.n_heads, arch.head_dim))
                    by_head[rows, tokens, heads] = values[slots, layer, heads].to(z)
                    return by_head.flatten(-2)

                return patch

            layers = sorted({head.layer for version in some for head in version.heads})
            return editing_inputs([(arch.out_projs[layer], patching(layer)) for layer in layers])

        def run(size: int) -> Effects:
            parts = [versions[start : start + size] for start in range(0, len(versions), size)]
            return self._run(prompts, 1 + size, [(len(part), partial(editing, part)) for part in parts])

        effects, size = shrinking(per_pass or min(_VERSIONS_A_PASS, len(versions)), run)
        return replace(effects, per_pass=size)

    def prepare(self, prompts: Prompts) -> None:
        """Do nothing: whole passes share nothing."""

    def over_likeliest_tokens(self) -> ReferenceEngine:
        """Return this engine: whole passes cost more than the vocabulary."""
        return self

    def finer(self) -> ReferenceEngine:
        """Return this engine: whole passes have no differences to round."""
        return self

    def _run(
        self,
        prompts: Prompts,
        n_rows: int,
        edits: list[tuple[int, Callable[[int], AbstractContextManager[None]]]],
    ) -> Effects:
        """Run one batch of ``n_rows`` for each prompt and edit. An edit is a count and a function that, given the index
        of a prompt, opens a context in which rows 1..count are edited."""
        base, edited = [], []
        with self.backbone.running():
            pairs = list(zip(prompts.ids, prompts.targets, strict=True))
            for index, (prompt, target) in counted([*enumerate(pairs)]):
                batches = []
                for _, editing in edits:
                    with editing(index):
                        batches.append(_score_rows(self.backbone, prompt, target, n_rows))
                base.append(batches[0][:1])
                kept = [batch[1 : 1 + count] for batch, (count, _) in zip(batches, edits, strict=True)]
                edited.append(joined(kept)[None])
        return Effects(base=joined(base), edited=joined(edited))


def _score_rows(backbone: Backbone, prompt: Sequence[int], target: int, n_rows: int) -> TokenScores:
    """Scores of ``target`` after ``n_rows`` copies of one unpadded prompt. Fields are (n_rows,)."""
    ids = torch.tensor([list(prompt)] * n_rows, device=backbone.device)
    hidden = backbone.decoder(input_ids=ids, use_cache=False)[0][:, -1]
    return read_targets(backbone, hidden[None], [target])[0]
