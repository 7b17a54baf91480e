"""What passes over the last tokens of prompts have in common, made once and kept: keys and values of all other
tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from relfv.engine.arithmetic import Likeliest
from relfv.engine.attention import Prefix, attending_to, attending_within, attends_by_kernel
from relfv.engine.base import Backbone, TokenIds, sent
from relfv.engine.copies import last_tokens, run_last_tokens
from relfv.engine.hooks import editing_inputs
from relfv.engine.passes import pad_right, padding_of
from relfv.errors import RunError
from relfv.models.architecture import text_config
from relfv.types import Prompts

_FEW = 4
"""Number of prompts up to which a prefix takes little memory beside that of all trials."""


def bytes_of_token(backbone: Backbone) -> int:
    """Most bytes that keys and values of one token take in all layers."""
    arch = backbone.arch
    kv_heads = getattr(text_config(backbone.model.config), "num_key_value_heads", None) or arch.n_heads
    return 2 * 4 * arch.n_layers * kv_heads * arch.head_dim


@dataclass
class _Kept:
    prompts: tuple[tuple[int, ...], ...]
    prefix: Prefix
    likeliest: dict[tuple[int, ...], Likeliest] = field(default_factory=dict)
    """By the prompts' targets: the tokens over which their copies are read out in brief."""


class KeptPrefix:
    """Keeps the prefix of the last pass, since a q_id's stages run the same prompts several times. The prefix of a few
    prompts, such as the noise floor's between two passes over all trials, is kept beside it."""

    def __init__(self) -> None:
        self._last: dict[bool, _Kept] = {}
        """Prompts and their prefix, by whether they are at most ``_FEW`` prompts."""

    def of(self, backbone: Backbone, prompts: TokenIds) -> Prefix:
        """The prefix of ``prompts``, kept or made, with the same bits either way. Call inside ``running``."""
        found = self.found(prompts)
        if found is None:
            self.keep(prompts, found := Prefill(backbone, prompts).run())
        return found

    def found(self, prompts: TokenIds) -> Prefix | None:
        """The prefix of ``prompts`` if it is kept; if not, the one in its place is released, before there are two."""
        wanted, few = tuple(map(tuple, prompts)), len(prompts) <= _FEW
        if few in self._last and self._last[few].prompts != wanted:
            del self._last[few]
        return self._last[few].prefix if few in self._last else None

    def keep(self, prompts: TokenIds, prefix: Prefix) -> None:
        """Keep ``prefix`` for later passes over ``prompts``."""
        self._last[len(prompts) <= _FEW] = _Kept(tuple(map(tuple, prompts)), prefix)

    def likeliest(self, backbone: Backbone, prompts: Prompts) -> Likeliest | None:
        """The tokens over which copies of ``prompts``, whose prefix is kept, are read out, if not over all. They come
        from a pass without edits: the same for every pass over these prompts, and made once. Call inside
        ``running``."""
        if not backbone.arithmetic.over_likeliest:
            return None
        kept, targets = self._last[len(prompts) <= _FEW], tuple(prompts.targets)
        if targets not in kept.likeliest:
            last, lengths = last_tokens(backbone, prompts.ids), kept.prefix.lengths
            with attending_to(kept.prefix, backbone), backbone.arithmetic.multiplying_copies(1):
                unedited = run_last_tokens(backbone, last, lengths)[:, 0]
            kept.likeliest[targets] = backbone.arithmetic.likeliest(unedited, sent(targets, unedited.device))
        return kept.likeliest[targets]

    def forget(self) -> None:
        """Release the kept prefixes."""
        self._last.clear()


class Prefill:
    """The pass over all but the last token of each prompt, and the keys and values that it keeps.

    Raises RunError for a prompt of fewer than two tokens, which has no prefix, and for a hybrid model.
    """

    def __init__(self, backbone: Backbone, prompts: TokenIds) -> None:
        if min(len(prompt) for prompt in prompts) < 2:
            raise RunError("a prompt has a single token; the shared-prefix engine needs at least two")
        if len(backbone.arch.out_projs) < backbone.arch.n_layers:
            raise RunError("some layers have no attention, and what they keep of earlier tokens is not keys and values")
        self._backbone = backbone
        self._ids, self._mask, self.lengths = pad_right([prompt[:-1] for prompt in prompts], backbone.device)
        self._n_tokens = [len(prompt) - 1 for prompt in prompts]
        # Each tensor is sent to a device once: it may wait there behind weights that stream.
        self._without_padding = padding_of(self._ids, self._n_tokens)
        self._lengths_on: dict[torch.device, torch.Tensor] = {}
        # A DynamicCache made from a config lets sliding-window layers drop keys; this one keeps all of them, and the
        # window is applied in the attention of the last token.
        self._cache = DynamicCache()
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Keys and values by layer that attention's kernel was given, where it runs; they need not be laid out anew in
        a cache."""

    def run(self) -> Prefix:
        """Run the pass, and of its last block no more than gives keys and values."""
        last = self._backbone.arch.out_projs[self._backbone.arch.n_layers - 1]
        with suppress(_Enough), editing_inputs([(last, _stop)]), self.scope(0):
            self.decode()
        return self.prefix()

    @contextmanager
    def scope(self, _: int) -> Iterator[None]:
        """Context in which the block of any layer runs."""
        with self._without_padding(), attending_within(self._backbone, self._given):
            yield

    def decode(self) -> None:
        """Call the decoder, once."""
        by_kernel = attends_by_kernel(self._backbone)
        cache = {"use_cache": False} if by_kernel else {"past_key_values": self._cache, "use_cache": True}
        self._backbone.decoder(input_ids=self._ids, attention_mask=self._mask, **cache)

    def prefix(self) -> Prefix:
        """The prefix in all layers, which must have run."""
        return self._of(range(self._backbone.arch.n_layers))

    def of_layer(self, layer: int) -> Prefix:
        """The prefix in one layer, which must have run, for its block alone."""
        return self._of([layer])

    def _of(self, layers: Iterable[int]) -> Prefix:
        found = {layer: self._given.get(layer) or _cached(self._cache, layer) for layer in layers}
        keys, values = ({layer: pair[i] for layer, pair in found.items()} for i in (0, 1))
        for place in {of_layer.device for of_layer in keys.values()} - {*self._lengths_on}:
            self._lengths_on[place] = sent(self._n_tokens, place)
        return Prefix(keys, values, self.lengths, self._lengths_on)


class _Enough(Exception):
    """Ends a prefill in its last block, of which only keys and values are asked for."""


def _stop(_: torch.Tensor) -> None:
    raise _Enough


def _cached(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]
