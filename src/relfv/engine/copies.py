"""The pass over the last token, and how its copies begin and are edited there, as hooks: what the shared-prefix engine
makes of each call.

Copies are (N, C, width): of the last token of N prompts, copy 0 of each as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any

import torch

from relfv.engine.arithmetic import with_room
from relfv.engine.base import Array, Backbone, Together, TokenIds, of_layer_and_prompts, sent, values_of
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.together import editing_together, first_edited
from relfv.types import HeadId


def last_tokens(backbone: Backbone, prompts: TokenIds) -> torch.Tensor:
    """Ids of the prompts' last tokens, (N, 1)."""
    return sent([[prompt[-1]] for prompt in prompts], backbone.device)


def run_last_tokens(backbone: Backbone, last: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run the pass over the last token, ids (N, 1), and its copies: -> (N, 1 + copies, resid_dim), final and normed."""
    given = {"position_ids": positions[:, None]} if backbone.takes_position_ids() else {}
    if given:  # without a mask transformers looks for packed sequences in positions, and waits for the device
        given["attention_mask"] = torch.ones_like(last)
    hidden = backbone.decoder(input_ids=last, use_cache=False, **given)[0]
    # GPT-2's family folds the grown token axis into the batch at its end; prompt-major order is kept.
    return hidden.reshape(len(last), -1, hidden.shape[-1])


@contextmanager
def patching_heads(backbone: Backbone, heads: Sequence[HeadId], replacement: Array | None) -> Iterator[None]:
    """While open, patch one head in each copy: before block l, add one copy of the unpatched token for each of
    ``heads`` in layer l; then overwrite its slice by its value in ``replacement``, or by the same head's slice of copy
    0 if there is none."""
    arch, values = backbone.arch, values_of(replacement, heads, backbone.device)
    numbers = sent([head.head for head in heads], backbone.device)

    def grower(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: grown(hidden, hidden[:, :1], count)

    def patcher(layer: int, part: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        place = backbone.device_of(layer)
        index = numbers[part].to(place)
        given = None if values is None else values[part].to(place)

        def patch(z: torch.Tensor) -> torch.Tensor:
            n, copies, _ = z.shape
            z = z.contiguous()  # edited in place: attention's output is read by this projection alone
            by_head = z.view(n, copies, arch.n_heads, arch.head_dim)
            new = torch.arange(copies - len(index), copies, device=z.device)
            by_head[:, new, index] = by_head[:, 0, index] if given is None else given.to(z.dtype)
            return z

        return patch

    edits: list[tuple[Any, Callable[[torch.Tensor], torch.Tensor | None]]] = []
    start = 0
    for layer, group in groupby(heads, key=lambda head: head.layer):
        count = len([*group])
        part = slice(start, start := start + count)
        edits.append((arch.blocks[layer], grower(count)))
        edits.append((arch.out_projs[layer], patcher(layer, part)))
    with editing_inputs(edits):
        yield


def residual_additions(
    backbone: Backbone, layers: Sequence[int], parts: Sequence[torch.Tensor], prompts: slice, lengths: torch.Tensor
) -> AbstractContextManager[None]:
    """While open, add after block l one copy of the untouched token + vector for each vector of that layer and these
    prompts. ``lengths`` (prompt, layer) receives the length of the untouched token's hidden state."""

    def adder(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        vectors = of_layer_and_prompts(parts, i, prompts).to(backbone.device_of(layers[i]))

        def add(hidden: torch.Tensor) -> torch.Tensor:
            lengths[:, i] = hidden[:, 0].float().norm(dim=-1)
            return grown(hidden, hidden[:, :1] + vectors.to(hidden.dtype), vectors.shape[1])

        return add

    return editing_outputs([(backbone.arch.blocks[layer], adder(i)) for i, layer in enumerate(layers)])


@contextmanager
def version_edits(backbone: Backbone, versions: Sequence[Together], prompts: slice) -> Iterator[None]:
    """While open, add a copy of the token for each version before the first block that one is edited in; from there on
    each is edited in all layers."""

    def grow(hidden: torch.Tensor) -> torch.Tensor:
        return grown(hidden, hidden[:, :1], len(versions))

    first = backbone.arch.blocks[first_edited(versions)]
    with editing_inputs([(first, grow)]), editing_together(backbone, versions, prompts):
        yield


def grown(hidden: torch.Tensor, more: torch.Tensor, count: int) -> torch.Tensor:
    """Append copies: (N, C, d) -> (N, C + count, d), ``more`` (N, 1 or count, d) at the end. Where there is room for
    them, nothing moves. Two assignments: ``torch.cat`` of an expanded tensor runs at a third of the memory's speed."""
    n, copies, width = hidden.shape
    out = with_room(hidden, count)
    if out is None:
        out = hidden.new_empty(n, copies + count, width)
        out[:, :copies] = hidden
    out[:, copies:] = more
    return out
