"""The shared-prefix engine: every single-head patch of a prompt in one pass over its last token.

The published way runs one full forward per (trial, layer, head): 25 x 32 x 32 = 25,600 of them for an 8B model (Todd
et al. 2024, section 2.3). But an intervention at the last token changes no key or value of an earlier token, in any
layer. So the earlier tokens are run once, their keys and values kept, and the last token alone goes through the
layers with all its patched versions beside it as extra tokens *of the same position*:

1. prefill: keys and values of tokens 0..n-2 of each prompt, by the model's own attention;
2. before block l the token axis grows by one copy of the unpatched token for each head of layer l; at the input of
   the output projection copy h gets head h's slice overwritten. Each copy attends to its prompt's prefix and to
   itself, never to another copy (attention.py), so it sees exactly what it would in a separate forward pass;
3. all copies go through the final norm and the vocabulary.

Copy 0 is the unpatched baseline, computed by the same kernels in the same batch, so that a patch which changes
nothing measures as rounding alone. Injection is the same pass with another edit: after block l the axis grows by
copy 0 + vector. The model's own modules do all the work, driven by hooks; what makes this exact is causality alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from relfv.engine.attention import Prefix, attending_to
from relfv.engine.base import (
    Array,
    Backbone,
    Together,
    TokenIds,
    Vectors,
    in_parts,
    of_layer_and_prompts,
    prompt_chunks,
    sent,
    values_of,
)
from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.engine.memory import shrinking
from relfv.engine.prefix import KeptPrefix
from relfv.engine.readout import joined, on_the_way, scores_of, sent_back
from relfv.engine.reference import ReferenceEngine
from relfv.engine.together import editing_together
from relfv.errors import RunError
from relfv.models.cards import cards_bytes
from relfv.models.placement import bytes_of_prompt, bytes_of_token, card_bytes
from relfv.types import Effects, HeadId, Prompts, TokenScores

_CPU_BUDGET = 2 << 30
"""Bytes for one pass."""
_PASSES_A_CARD = 8
"""Where a model is on several cards, at least as many as make passes of ``_ROWS``."""
_PREFIXES = 2 << 30
"""Bytes of keys and values that are kept for several passes."""
_ROWS = 4096
"""Copies in a pass that take longer to compute than to begin."""


@dataclass
class SharedPrefixEngine:
    """See the module's text."""

    backbone: Backbone
    kept: KeptPrefix = field(default_factory=KeptPrefix, repr=False)
    name = "shared_prefix"

    def sweep_heads(
        self,
        prompts: Prompts,
        replacement: Array | None,
        heads: Sequence[HeadId],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        if self.backbone.depends_on_company(prompts.ids):
            return ReferenceEngine(self.backbone).sweep_heads(prompts, replacement, heads)
        values = values_of(replacement, heads, self.backbone.device)
        patches = _head_patches(self.backbone, heads, values)
        return self._in_chunks(prompts, len(heads), per_pass, lambda _: editing_inputs(patches))

    def inject(
        self,
        prompts: Prompts,
        vectors: Vectors,
        layers: Sequence[int],
        *,
        per_pass: int | None = None,
    ) -> Effects:
        if self.backbone.depends_on_company(prompts.ids):
            return ReferenceEngine(self.backbone).inject(prompts, vectors, layers)
        parts = in_parts(vectors, self.backbone.device)
        lengths = torch.zeros(len(prompts), len(layers), device=self.backbone.device)
        # A function vector is not a small difference, and in a pass this short more pieces cost next to nothing.
        effects = self.finer()._in_chunks(
            prompts,
            len(layers) * sum(part.shape[-2] for part in parts),
            per_pass,
            lambda some: _residual_additions(self.backbone, layers, parts, some, lengths[some]),
        )
        there = sent_back(lengths)
        return Effects.to_come(effects.per_pass, lambda: replace(effects, lengths=there()[0]))

    def edit_together(self, prompts: Prompts, versions: Sequence[Together], *, per_pass: int | None = None) -> Effects:
        if self.backbone.depends_on_company(prompts.ids):
            return ReferenceEngine(self.backbone).edit_together(prompts, versions)
        return self.finer()._in_chunks(
            prompts, len(versions), per_pass, lambda some: _versions(self.backbone, versions, some)
        )

    def prepare(self, prompts: Prompts) -> None:
        if not self.backbone.depends_on_company(prompts.ids):
            with self.backbone.running():
                self.kept.of(self.backbone, prompts.ids)

    def over_likeliest_tokens(self) -> SharedPrefixEngine:
        backbone = self.backbone.over_likeliest_tokens()
        return self if backbone is self.backbone else SharedPrefixEngine(backbone, self.kept)

    def finer(self) -> SharedPrefixEngine:
        """The same with more pieces of differences, where products are in pieces; prefixes have no differences, so both
        engines share them."""
        return self._finer

    @cached_property
    def _finer(self) -> SharedPrefixEngine:
        return SharedPrefixEngine(self.backbone.finer(), self.kept)

    def _in_chunks(
        self,
        prompts: Prompts,
        n_edits: int,
        per_pass: int | None,
        edit: Callable[[slice], AbstractContextManager[None]],
    ) -> Effects:
        """Run ``per_pass`` prompts at a time, or as many as fit. The last passes are not waited for."""

        def attempt(size: int) -> list[Callable[[], TokenScores]]:
            begun: list[Callable[[], TokenScores]] = []
            together = self._prompts_a_prefix(prompts.ids, n_edits, size)
            for part in prompt_chunks(len(prompts), size):
                # While one card computes on the end of a pass, the one before it begins the next.
                if len(begun) > self._passes_at_once():
                    begun[-1 - self._passes_at_once()]()
                begun.append(on_the_way(self._pass(prompts, part, together, n_edits, edit(part))))
            return begun

        def arrived() -> Effects:
            together = joined([scores() for scores in begun])
            return Effects(base=together[:, 0], edited=together[:, 1:], per_pass=size)

        size = min(len(prompts), per_pass or self._prompts_that_fit(prompts.ids, n_edits))
        begun, size = shrinking(size, attempt, release=self.kept.forget)
        return Effects.to_come(size, arrived)

    def _pass(
        self,
        prompts: Prompts,
        part: slice,
        together: int,
        n_edits: int,
        edits: AbstractContextManager[None],
    ) -> TokenScores:
        """Of the N prompts in ``part``, whose prefixes are of those that are run ``together``: fields (N, 1 + n_edits),
        on the device; column 0 is the baseline."""
        first = part.start // together * together
        prompts, others = prompts[part], prompts.ids[first : first + together]
        last = sent([[prompt[-1]] for prompt in prompts.ids], self.backbone.device)
        with self.backbone.running():
            prefix = self.kept.of(self.backbone, others)[part.start - first : part.stop - first]
            with attending_to(prefix, self.backbone), self.backbone.arithmetic.multiplying_copies(1 + n_edits), edits:
                hidden = _run_last_tokens(self.backbone, last, prefix)
            if hidden.shape[1] != 1 + n_edits:
                raise RunError(f"the pass ended with {hidden.shape[1]} copies of the last token, not {1 + n_edits}")
            return scores_of(self.backbone, hidden, prompts.targets)

    def _passes_at_once(self) -> int:
        """Passes that may be under way when another is waited for."""
        return len(self.backbone.cards.devices) if self.backbone.cards else 0

    def _prompts_that_fit(self, prompts: TokenIds, n_edits: int) -> int:
        """Prompts a pass, from the memory above the weights: as far as possible a function of shapes and the device,
        not of what is free now. Batch shapes change low-order bits, and a resumed run must give the same bytes."""
        longest = max(len(prompt) for prompt in prompts)
        fitting = max(1, self._budget() // bytes_of_prompt(self.backbone.arch, n_edits, longest))
        if self.backbone.cards is None:
            return fitting
        # Enough passes that the cards' waiting at the first one's beginning and the last one's end is little of all.
        of_all = -(-len(prompts) // (_PASSES_A_CARD * len(self.backbone.cards.devices)))
        return min(fitting, max(of_all, -(-_ROWS // (1 + n_edits))))

    def _prompts_a_prefix(self, prompts: TokenIds, n_edits: int, size: int) -> int:
        """Prompts, as whole passes of ``size``, whose prefixes are run at once: of all passes, unless they have more
        tokens than a pass has copies, whose memory they take before it, or more to keep than ``_PREFIXES``."""
        tokens = min(size * (1 + n_edits), _PREFIXES // bytes_of_token(self.backbone.model.config, self.backbone.arch))
        return size * max(1, tokens // max(len(prompt) for prompt in prompts) // size)

    def _budget(self) -> int:
        """Bytes for one pass. On CUDA what the card has beside the weights."""
        backbone = self.backbone
        if backbone.cards and backbone.device.type == "cuda":
            there = min(card or 0 for card in cards_bytes(backbone.cards.devices, backbone.arch))
            return max(1 << 30, there - backbone.weights_on_device)
        card = card_bytes(backbone.device, backbone.arch)
        return _CPU_BUDGET if card is None else max(1 << 30, card - backbone.weights_on_device)


def _run_last_tokens(backbone: Backbone, last: torch.Tensor, prefix: Prefix) -> torch.Tensor:
    """The pass over the last token, ids (N, 1), and its copies: -> (N, 1 + copies, resid_dim), final and normed."""
    given = {"position_ids": prefix.lengths[:, None]} if backbone.takes_position_ids() else {}
    if given:  # without a mask transformers looks for packed sequences in positions, and waits for the device
        given["attention_mask"] = torch.ones_like(last)
    hidden = backbone.decoder(input_ids=last, use_cache=False, **given)[0]
    # GPT-2's family folds the grown token axis into the batch at its end; prompt-major order is kept.
    return hidden.reshape(len(last), -1, hidden.shape[-1])


def _head_patches(
    backbone: Backbone, heads: Sequence[HeadId], values: torch.Tensor | None
) -> list[tuple[Any, Callable[[torch.Tensor], torch.Tensor | None]]]:
    """Before block l: one copy of the unpatched token for each of ``heads`` in layer l; then overwrite its slice by
    that head's row of ``values``, or by the same head's slice of copy 0 if there are none."""
    arch = backbone.arch

    def grower(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: _grown(hidden, hidden[:, :1], count)

    def patcher(layer: int, numbers: list[int], part: slice) -> Callable[[torch.Tensor], torch.Tensor]:
        place = backbone.device_of(layer)
        index = sent(numbers, place)
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
        numbers = [head.head for head in group]
        part = slice(start, start := start + len(numbers))
        edits.append((arch.blocks[layer], grower(len(numbers))))
        edits.append((arch.out_projs[layer], patcher(layer, numbers, part)))
    return edits


def _residual_additions(
    backbone: Backbone, layers: Sequence[int], parts: Sequence[torch.Tensor], prompts: slice, lengths: torch.Tensor
) -> AbstractContextManager[None]:
    """After block l: one copy of the untouched token + vector for each vector of that layer and these prompts.
    ``lengths`` (prompt, layer) receives that token's own."""

    def adder(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        vectors = of_layer_and_prompts(parts, i, prompts).to(backbone.device_of(layers[i]))

        def add(hidden: torch.Tensor) -> torch.Tensor:
            lengths[:, i] = hidden[:, 0].float().norm(dim=-1)
            return _grown(hidden, hidden[:, :1] + vectors.to(hidden.dtype), vectors.shape[1])

        return add

    return editing_outputs([(backbone.arch.blocks[layer], adder(i)) for i, layer in enumerate(layers)])


@contextmanager
def _versions(backbone: Backbone, versions: Sequence[Together], prompts: slice) -> Iterator[None]:
    """Before the first block: a copy of the token for each version; from there on each is edited in all layers."""

    def grow(hidden: torch.Tensor) -> torch.Tensor:
        return _grown(hidden, hidden[:, :1], len(versions))

    with editing_inputs([(backbone.arch.blocks[0], grow)]), editing_together(backbone, versions, prompts):
        yield


def _grown(hidden: torch.Tensor, more: torch.Tensor, count: int) -> torch.Tensor:
    """(N, C, d) -> (N, C + count, d), ``more`` (N, 1 or count, d) at the end. Where it lies in a ``Stream``, which has
    room between prompts, nothing moves. Two assignments: ``torch.cat`` of an expanded tensor runs at a third of the
    memory's speed."""
    n, copies, width = hidden.shape
    if hidden.stride(0) >= (copies + count) * width and hidden.stride()[1:] == (width, 1):
        out = hidden.as_strided((n, copies + count, width), hidden.stride())
    else:
        out = hidden.new_empty(n, copies + count, width)
        out[:, :copies] = hidden
    out[:, copies:] = more
    return out
