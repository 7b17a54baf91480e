"""Keys and values of all tokens but the last, run once and kept for the passes over the last one."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache

from relfv.engine.attention import Prefix
from relfv.engine.base import Backbone, TokenIds, sent
from relfv.engine.hooks import editing_inputs
from relfv.engine.passes import leaving_padding_out, pad_right
from relfv.errors import RunError

_FEW = 4
"""Prompts whose prefix takes little memory beside that of all trials."""


class KeptPrefix:
    """The prefix of the last pass: a q_id's stages run the same prompts several times. That of a few prompts, such as
    the noise floor's between two passes over all trials, is kept beside it."""

    def __init__(self) -> None:
        self._last: dict[bool, tuple[tuple[tuple[int, ...], ...], Prefix]] = {}
        """By whether it is of a few."""

    def of(self, backbone: Backbone, prompts: TokenIds) -> Prefix:
        """The prefix of ``prompts``, kept or made, with the same bits either way. Call inside ``running``."""
        wanted, few = tuple(map(tuple, prompts)), len(prompts) <= _FEW
        if few not in self._last or self._last[few][0] != wanted:
            self._last.pop(few, None)  # before there are two
            self._last[few] = wanted, prefill(backbone, prompts)
        return self._last[few][1]

    def forget(self) -> None:
        """Release its memory."""
        self._last.clear()


def prefill(backbone: Backbone, prompts: TokenIds) -> Prefix:
    """Run all but the last token of each prompt and keep their keys and values.

    Raises RunError for a prompt of fewer than two tokens, which has no prefix, and for a hybrid model.
    """
    if min(len(prompt) for prompt in prompts) < 2:
        raise RunError("a prompt has a single token; the shared-prefix engine needs at least two")
    if len(backbone.arch.out_projs) < backbone.arch.n_layers:
        raise RunError("some layers have no attention, and what they keep of earlier tokens is not keys and values")
    ids, mask, lengths = pad_right([prompt[:-1] for prompt in prompts], backbone.device)
    # A DynamicCache made from a config lets sliding-window layers drop keys; this one keeps all of them, and the
    # window is applied in the attention of the last token.
    cache = DynamicCache()
    n_tokens = [len(prompt) - 1 for prompt in prompts]
    last = backbone.arch.out_projs[backbone.arch.n_layers - 1]
    with suppress(_Enough), editing_inputs([(last, _stop)]), leaving_padding_out(ids, n_tokens):
        backbone.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    keys, values = zip(*(_cached(cache, layer) for layer in range(backbone.arch.n_layers)), strict=True)
    places = {of_layer.device for of_layer in keys}
    return Prefix(keys, values, lengths, {place: sent(n_tokens, place) for place in places})


class _Enough(Exception):
    """Of the last block its keys and values are all that is asked for."""


def _stop(_: torch.Tensor) -> None:
    raise _Enough


def _cached(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]
