"""Keys and values of all tokens but the last, run once and kept for the passes over the last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from transformers import DynamicCache

from relfv.engine.attention import Prefix, joined
from relfv.engine.base import Backbone, TokenIds, sent
from relfv.engine.hooks import editing_inputs
from relfv.engine.passes import pad_right, padding_of
from relfv.errors import RunError

_FEW = 4
"""Prompts whose prefix takes little memory beside that of all trials."""
_ENOUGH = 6 << 20
"""Tokens x width of the residual stream of a pass whose products are no slower than a larger one's."""


class KeptPrefix:
    """The prefixes of the last pass: a q_id's stages run the same prompts several times. Those of a few prompts, such
    as the noise floor's between two passes over all trials, are kept beside them."""

    def __init__(self) -> None:
        self._last: dict[bool, tuple[tuple[tuple[int, ...], ...], Prefixes]] = {}
        """By whether they are of a few."""

    def of(self, backbone: Backbone, prompts: TokenIds) -> Prefixes:
        """Those of ``prompts``, kept or to be made, with the same bits either way. Call inside ``running``."""
        wanted, few = tuple(map(tuple, prompts)), len(prompts) <= _FEW
        if few not in self._last or self._last[few][0] != wanted:
            self._last.pop(few, None)  # released before there are two
            self._last[few] = wanted, Prefixes(backbone, prompts)
        return self._last[few][1]

    def forget(self) -> None:
        """Release their memory."""
        self._last.clear()


def prompts_a_batch(prefixes: TokenIds, resid_dim: int) -> int:
    """As few as a pass needs to be as fast as one over all of them. From prompts and model alone, never from where it
    is: low-order bits depend on what is in a batch."""
    n_batches = max(1, sum(map(len, prefixes)) * resid_dim // _ENOUGH)
    return -(-len(prefixes) // n_batches)


class Prefixes:
    """Of some prompts: batches, each run when its prompts are first asked for. Where a model is on several cards, the
    second need not wait until the first has run them all.

    Raises RunError for a prompt of fewer than two tokens, which has no prefix, and for a hybrid model.
    """

    def __init__(self, backbone: Backbone, prompts: TokenIds) -> None:
        if min(len(prompt) for prompt in prompts) < 2:
            raise RunError("a prompt has a single token; the shared-prefix engine needs at least two")
        if len(backbone.arch.out_projs) < backbone.arch.n_layers:
            raise RunError("some layers have no attention, and what they keep of earlier tokens is not keys and values")
        prefixes = [prompt[:-1] for prompt in prompts]
        self._size, width = prompts_a_batch(prefixes, backbone.arch.resid_dim), max(map(len, prefixes))
        starts = range(0, len(prompts), self._size)
        self.batches = [Prefill(backbone, prefixes[start : start + self._size], width) for start in starts]

    def run(self, part: slice) -> Prefix:
        """Of these prompts, in all layers; batches of theirs that have not run do."""
        for _, batch in self._inside(part):
            batch.run()
        return self.of(part)

    def of(self, part: slice, layer: int | None = None) -> Prefix:
        """Of these prompts, whose batches have run; in this layer alone, which has run, or in all."""
        return joined([batch.prefix(layer)[inside] for inside, batch in self._inside(part)])

    def _inside(self, part: slice) -> Iterator[tuple[slice, Prefill]]:
        """The batches of these prompts, and which of each."""
        for i in range(part.start // self._size, -(-part.stop // self._size)):
            start = i * self._size
            yield slice(max(0, part.start - start), part.stop - start), self.batches[i]


class Prefill:
    """The pass over the prefixes of a batch, padded to ``width``, and the keys and values that it keeps."""

    def __init__(self, backbone: Backbone, prefixes: TokenIds, width: int) -> None:
        self._backbone = backbone
        self._ids, self._mask, lengths = pad_right(prefixes, backbone.device, width)
        self._n_tokens = [len(prefix) for prefix in prefixes]
        # What is sent to a device is sent once: it may wait there behind weights that stream.
        self._without_padding = padding_of(self._ids, self._n_tokens)
        self._lengths_on = {lengths.device: lengths}
        self.made = False
        """Whether it has run through all layers."""

    def run(self) -> None:
        """Run it, if it has not, of the last block no more than gives keys and values."""
        if self.made:
            return
        last = self._backbone.arch.out_projs[self._backbone.arch.n_layers - 1]
        with suppress(_Enough), editing_inputs([(last, _stop)]), self.scope(0):
            self.decode()
        self.made = True

    def scope(self, _: int) -> AbstractContextManager[None]:
        """Open around the block of any layer."""
        return self._without_padding()

    def decode(self) -> None:
        """Call the decoder."""
        # A DynamicCache made from a config lets sliding-window layers drop keys; this one keeps all of them, and the
        # window is applied in the attention of the last token.
        self._cache = DynamicCache()
        self._backbone.decoder(
            input_ids=self._ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True
        )

    def prefix(self, layer: int | None = None) -> Prefix:
        """Of a layer that has run, or of all."""
        layers: Iterable[int] = range(self._backbone.arch.n_layers) if layer is None else [layer]
        found = {layer: _cached(self._cache, layer) for layer in layers}
        keys, values = ({layer: pair[i] for layer, pair in found.items()} for i in (0, 1))
        for place in {of_layer.device for of_layer in keys.values()} - {*self._lengths_on}:
            self._lengths_on[place] = sent(self._n_tokens, place)
        return Prefix(keys, values, self._lengths_on)


class _Enough(Exception):
    """Of the last block its keys and values are all that is asked for."""


def _stop(_: torch.Tensor) -> None:
    raise _Enough


def _cached(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]
