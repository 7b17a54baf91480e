"""Several edits of the last token in one pass, as hooks: what both engines make of ``Together``.

Versions of the last token stand side by side, (prompt, 1 + version, width), the first of them unedited: as copies in
the shared-prefix engine, as rows of a batch in the reference engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from relfv.engine.base import Backbone, Together, sent
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.models.mlps import mlps_of

Edit = Callable[[torch.Tensor], torch.Tensor]
"""(prompt, 1 + version, width) -> the same, the first of each prompt unchanged."""


@contextmanager
def editing_together(
    backbone: Backbone, versions: Sequence[Together], prompts: slice, where: Callable[[Edit], Edit] = lambda edit: edit
) -> Iterator[None]:
    """While open, each version's edits are made in passes over these ``prompts``; ``where`` finds the versions in what
    the engine's modules get."""
    arch = backbone.arch
    inputs, outputs = [], []
    for layer in range(arch.n_layers):
        if edit := _setting(backbone, versions, layer, prompts):
            inputs.append((arch.out_projs[layer], where(edit)))
        if edit := _setting_mlp(backbone, versions, layer, prompts):
            outputs.append((mlps_of(arch)[layer], where(edit)))
        for kind in (_removing, _adding):  # hooks of one block run in this order
            if edit := kind(backbone, versions, layer, prompts):
                outputs.append((arch.blocks[layer], where(edit)))
    with editing_inputs(inputs), editing_outputs(outputs):
        yield


def first_edited(versions: Sequence[Together]) -> int:
    """The first layer in which one of them is edited; 0 if none is."""
    edits = [e for v in versions for e in (v.chosen, v.added, v.removed, None if v.mlps is None else ~v.mlps.isnan())]
    of_layers = [edit.flatten(2).any(-1).any(0).tolist() for edit in edits if edit is not None]
    return next((layer for layer, are_edited in enumerate(zip(*of_layers, strict=True)) if any(are_edited)), 0)


def _setting(backbone: Backbone, versions: Sequence[Together], layer: int, prompts: slice) -> Edit | None:
    """z of the chosen heads := their values, at the input of the layer's output projection."""
    n_heads, head_dim = backbone.arch.n_heads, backbone.arch.head_dim
    chosen = _of_layer([v.chosen for v in versions], layer, prompts, torch.zeros(n_heads, dtype=torch.bool))
    if not chosen.any():
        return None
    # Many versions may set different heads to the same values: large ones, for all layers, so they are held once.
    place, distinct = backbone.device_of(layer), {id(v.values): v.values for v in versions}
    which = sent([[*distinct].index(id(v.values)) for v in versions], place)
    values = _of_layer([*distinct.values()], layer, prompts, torch.zeros(n_heads, head_dim))
    chosen, values = sent(chosen[..., None], place), sent(values, place)

    def edit(z: torch.Tensor) -> torch.Tensor:
        by_head = z.unflatten(-1, (n_heads, head_dim))
        edited = torch.where(chosen, values.to(z.dtype)[:, which], by_head[:, 1:])
        return torch.cat([by_head[:, :1], edited], dim=1).flatten(2)

    return edit


def _setting_mlp(backbone: Backbone, versions: Sequence[Together], layer: int, prompts: slice) -> Edit | None:
    """The output of the layer's MLP := the version's."""
    if all(v.mlps is None for v in versions):
        return None
    alone = torch.full((backbone.arch.resid_dim,), torch.nan)
    values = _of_layer([v.mlps for v in versions], layer, prompts, alone)
    if values.isnan().all():
        return None
    values = sent(values, backbone.device_of(layer))
    is_set = ~values.isnan()

    def edit(written: torch.Tensor) -> torch.Tensor:
        return torch.cat([written[:, :1], torch.where(is_set, values.to(written.dtype), written[:, 1:])], dim=1)

    return edit


def _removing(backbone: Backbone, versions: Sequence[Together], layer: int, prompts: slice) -> Edit | None:
    """The version's direction, taken out of the hidden state after the block."""
    if all(v.removed is None for v in versions):
        return None
    removed = _of_layer([v.removed for v in versions], layer, prompts, torch.zeros(backbone.arch.resid_dim))
    if not removed.any():
        return None
    removed = sent(removed, backbone.device_of(layer))

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        # Products and sums of float32, not a matrix product: on a GPU that would be TF32.
        along = (hidden[:, 1:].float() * removed).sum(-1, keepdim=True)
        return torch.cat([hidden[:, :1], hidden[:, 1:] - (along * removed).to(hidden.dtype)], dim=1)

    return edit


def _adding(backbone: Backbone, versions: Sequence[Together], layer: int, prompts: slice) -> Edit | None:
    """Hidden state after the block += the version's vector."""
    given = {copy: v.added for copy, v in enumerate(versions, start=1) if v.added is not None}
    if not given:
        return None
    # Only versions with a vector: laid out for all versions, vectors are most of what goes to a GPU.
    added = _of_layer([*given.values()], layer, prompts, torch.zeros(backbone.arch.resid_dim))
    if not added.any():
        return None
    place = backbone.device_of(layer)
    added, copies = sent(added, place), sent([*given], place)

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.index_add(1, copies, added.to(hidden.dtype).expand(len(hidden), -1, -1))

    return edit


def _of_layer(tensors: Sequence[torch.Tensor | None], layer: int, prompts: slice, absent: torch.Tensor) -> torch.Tensor:
    """(prompt or 1, version, ...); ``absent`` stands for versions without."""
    rows = [absent[None] if t is None else t[prompts if len(t) > 1 else slice(None), layer] for t in tensors]
    n = max(map(len, rows))
    return torch.stack([row.expand(n, *row.shape[1:]) for row in rows], dim=1)
