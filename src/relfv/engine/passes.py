"""Ordinary forward passes over whole prompts, and what is read from them at the last token.

Batches are padded on the right, so that real tokens keep positions 0..n-1. Call inside ``Backbone.running``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionMaskInterface

from relfv.engine.arithmetic import leaving_out_padding
from relfv.engine.base import Backbone, TokenIds, sent
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.models.mlps import mlps_of


def pad_right(prompts: TokenIds, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad prompts on the right: -> input_ids (N, P), attention_mask (N, P), lengths (N,). The padding id is never
    attended to."""
    lengths = [len(prompt) for prompt in prompts]
    ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = _real(lengths, ids.shape[1]).astype(np.int64)
    return sent(ids, device), sent(mask, device), sent(lengths, device)


def _real(lengths: Sequence[int], width: int) -> npt.NDArray[np.bool_]:
    """(N, width): which tokens of a batch are no padding."""
    return np.arange(width) < np.array(lengths)[:, None]


def padding_of(ids: torch.Tensor, lengths: Sequence[int]) -> Callable[[], AbstractContextManager[None]]:
    """A function that opens a context: while it is open, products of passes over ``ids`` (N, P) need not be made for
    what is beyond each row's length, and the device is not asked whether there is such padding."""
    n, width = ids.shape
    places = sent(_real(lengths, width).ravel().nonzero()[0], ids.device)

    @contextmanager
    def known() -> Iterator[None]:
        with leaving_out_padding((n, width), places), masks_without_waiting(is_padded=min(lengths) < width):
            yield

    return known


_is_padded: ContextVar[bool | None] = ContextVar("_is_padded", default=None)
"""Whether passes of this thread are over batches with padding; None where that is not known."""
_mask_of_sdpa = AttentionMaskInterface()["sdpa"]


def _mask_without_waiting(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **given: Any
) -> torch.Tensor | None:
    is_padded = _is_padded.get()
    if is_padded is not None:
        attention_mask = attention_mask if is_padded else None
        allow_is_causal_skip = allow_is_causal_skip and not is_padded
    return _mask_of_sdpa(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **given)


AttentionMaskInterface.register("sdpa", _mask_without_waiting)


@contextmanager
def masks_without_waiting(*, is_padded: bool) -> Iterator[None]:
    """While open, passes of this thread are over batches with padding, or without. Where attention is SDPA transformers
    looks into the mask for that, and so waits for all that is queued on the device."""
    token = _is_padded.set(is_padded)
    try:
        yield
    finally:
        _is_padded.reset(token)


def last_hidden(backbone: Backbone, prompts: TokenIds) -> torch.Tensor:
    """Final normed hidden state at each prompt's last token: (N, resid_dim)."""
    ids, mask, lengths = pad_right(prompts, backbone.device)
    with padding_of(ids, [len(prompt) for prompt in prompts])():
        hidden = backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return hidden[torch.arange(len(prompts), device=hidden.device), (lengths - 1).to(hidden.device)]


def capture_heads(backbone: Backbone, prompts: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
    """z of every head at the last token, as in ``reading_heads``, and the final hidden state there, (N, resid_dim) on
    the device."""
    with reading_heads(backbone, prompts) as heads:
        hidden = last_hidden(backbone, prompts)
    return heads(), hidden


@contextmanager
def reading_heads(backbone: Backbone, prompts: TokenIds) -> Iterator[Callable[[], torch.Tensor]]:
    """While open, a forward pass over ``prompts`` records z of every head at the last token; yields a function that
    gives it: float32 (N, layer, head, head_dim) on the CPU, zero in layers without attention."""
    arch = backbone.arch
    seen, reader = _recorder(backbone, prompts)

    def heads() -> torch.Tensor:
        z = torch.zeros(len(prompts), arch.n_layers, arch.n_heads * arch.head_dim, device=backbone.device)
        for layer, of_layer in seen.items():
            z[:, layer] = of_layer
        return z.cpu().unflatten(-1, (arch.n_heads, arch.head_dim))

    with editing_inputs([(projection, reader(layer)) for layer, projection in arch.out_projs.items()]):
        yield heads


@contextmanager
def reading_blocks(backbone: Backbone, prompts: TokenIds) -> Iterator[dict[int, torch.Tensor]]:
    """While open, forward passes over ``prompts`` record the hidden state after each block at the last token: layer ->
    float32 (N, resid_dim), on the device."""
    seen, reader = _recorder(backbone, prompts)
    with editing_outputs([(block, reader(layer)) for layer, block in enumerate(backbone.arch.blocks)]):
        yield seen


def capture_mlps(backbone: Backbone, prompts: TokenIds) -> dict[int, torch.Tensor]:
    """Layer -> float32 (N, resid_dim): the output of its MLP at the last token, on the CPU."""
    seen, reader = _recorder(backbone, prompts)
    with editing_outputs([(mlp, reader(layer)) for layer, mlp in mlps_of(backbone.arch).items()]):
        last_hidden(backbone, prompts)
    return {layer: written.cpu() for layer, written in seen.items()}


def capture_at_tokens(backbone: Backbone, prompts: TokenIds, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """z of every head at some ``places`` (N, slot) of each prompt: float32 (N, slot, layer, head, head_dim) on the CPU,
    zero in layers without attention."""
    arch = backbone.arch
    rows, at = torch.arange(len(prompts))[:, None], torch.tensor(places)
    z = torch.zeros(*at.shape, arch.n_layers, arch.n_heads * arch.head_dim)

    def reader(layer: int) -> Callable[[torch.Tensor], None]:
        def read(values: torch.Tensor) -> None:
            z[:, :, layer] = values[rows.to(values.device), at.to(values.device)].float().cpu()

        return read

    with editing_inputs([(projection, reader(layer)) for layer, projection in arch.out_projs.items()]):
        last_hidden(backbone, prompts)
    return z.unflatten(-1, (arch.n_heads, arch.head_dim))


def last_tokens(backbone: Backbone, prompts: TokenIds) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from (N, P, width) to float32 (N, width) at each prompt's last token."""
    rows = torch.arange(len(prompts), device=backbone.device)
    last = sent([len(prompt) - 1 for prompt in prompts], backbone.device)
    return lambda values: values[rows.to(values.device), last.to(values.device)].float()


def _recorder(
    backbone: Backbone, prompts: TokenIds
) -> tuple[dict[int, torch.Tensor], Callable[[int], Callable[[torch.Tensor], None]]]:
    """A dict, layer -> float32 (N, width) at each prompt's last token, and the hook that fills it, by layer."""
    at_last = last_tokens(backbone, prompts)
    seen: dict[int, torch.Tensor] = {}

    def reader(layer: int) -> Callable[[torch.Tensor], None]:
        def read(values: torch.Tensor) -> None:
            seen[layer] = at_last(values).to(backbone.device)

        return read

    return seen, reader
