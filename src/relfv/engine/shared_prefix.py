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

Where weights stream, passes over some prompts each, and the prefill, run in step (in_step.py): the same bits in one
trip of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch

from relfv.engine.arithmetic import Likeliest
from relfv.engine.attention import Prefix, attending_to
from relfv.engine.base import Array, Backbone, Together, TokenIds, Vectors, in_parts, prompt_chunks, slices
from relfv.engine.copies import last_tokens, patching_heads, residual_additions, run_last_tokens, version_edits
from relfv.engine.hooks import turn_of
from relfv.engine.in_step import NotInStep, Waiting
from relfv.engine.memory import shrinking
from relfv.engine.prefix import KeptPrefix, Prefill, bytes_of_token
from relfv.engine.readout import joined, on_the_way, scores_of, sent_back
from relfv.engine.reference import ReferenceEngine
from relfv.errors import RunError
from relfv.models.cards import cards_bytes
from relfv.models.placement import bytes_of_prompt, bytes_waiting, card_bytes
from relfv.progress import counted
from relfv.types import Effects, HeadId, Prompts, TokenScores

_CPU_BUDGET = 2 << 30
"""Bytes for one pass on a device other than CUDA."""
_PASSES_A_CARD = 8
"""Fewest passes for each of several cards, as long as they have ``_ROWS`` copies."""
_PREFIXES = 2 << 30
"""Bytes of keys and values that are kept for several passes."""
_ROWS = 4096
"""Number of copies with which a pass takes longer to compute than to begin."""


@dataclass
class SharedPrefixEngine:
    """Scores every single-token intervention on a prompt in one pass over its last token."""

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
        return self._in_chunks(
            prompts, len(heads), per_pass, lambda _: patching_heads(self.backbone, heads, replacement)
        )

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
            lambda some: residual_additions(self.backbone, layers, parts, some, lengths[some]),
        )
        there = sent_back(lengths)
        return Effects.to_come(effects.per_pass, lambda: replace(effects, lengths=there()[0]))

    def edit_together(self, prompts: Prompts, versions: Sequence[Together], *, per_pass: int | None = None) -> Effects:
        if self.backbone.depends_on_company(prompts.ids):
            return ReferenceEngine(self.backbone).edit_together(prompts, versions)
        return self.finer()._in_chunks(
            prompts, len(versions), per_pass, lambda some: version_edits(self.backbone, versions, some)
        )

    def prepare(self, prompts: Prompts) -> None:
        # Where weights stream, a pass over prefixes goes in step with those over the last tokens, and no earlier.
        if not self.backbone.streaming and not self.backbone.depends_on_company(prompts.ids):
            with suppress(torch.OutOfMemoryError), self.backbone.running():
                self.kept.of(self.backbone, prompts.ids)

    def over_likeliest_tokens(self) -> SharedPrefixEngine:
        backbone = self.backbone.over_likeliest_tokens()
        return self if backbone is self.backbone else SharedPrefixEngine(backbone, self.kept)

    def finer(self) -> SharedPrefixEngine:
        """This engine with differences in more pieces, where products are in pieces; prefixes have no differences, so
        both engines share them."""
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
            together = self._prompts_a_prefix(prompts.ids, n_edits, size)
            if self.backbone.streaming:
                # Passes that wait may take too much memory where one pass after another does not.
                with suppress(NotInStep, torch.OutOfMemoryError):
                    return self._all_in_step(prompts, size, together, n_edits, edit)
                self.kept.forget()
            begun: list[Callable[[], TokenScores]] = []
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
        self, prompts: Prompts, part: slice, together: int, n_edits: int, edits: AbstractContextManager[None]
    ) -> TokenScores:
        """Run the pass over the N prompts in ``part``, whose prefixes are among those that are run ``together``: ->
        fields (N, 1 + n_edits), on the device; column 0 is the baseline."""
        first = part.start // together * together
        others, part = prompts[first : first + together], slice(part.start - first, part.stop - first)
        last = last_tokens(self.backbone, others.ids[part])
        with self.backbone.running():
            prefix = self.kept.of(self.backbone, others.ids)[part]
            likeliest = self.kept.likeliest(self.backbone, others)
            with attending_to(prefix, self.backbone), self.backbone.arithmetic.multiplying_copies(1 + n_edits), edits:
                hidden = run_last_tokens(self.backbone, last, prefix.lengths)
            return self._scores(hidden, others.targets[part], n_edits, likeliest and likeliest[part])

    def _all_in_step(
        self,
        prompts: Prompts,
        size: int,
        together: int,
        n_edits: int,
        edit: Callable[[slice], AbstractContextManager[None]],
    ) -> list[Callable[[], TokenScores]]:
        """Run passes over ``size`` prompts each in step, and with them the passes over prefixes, made for ``together``
        prompts at once. -> the scores of each, on the way."""
        n_layers, most = self.backbone.arch.n_layers, max(size, self._prompts_in_step(n_edits) // size * size)

        def prompts_worth(step: tuple[slice, int]) -> int:
            """Progress: after layer l there are l times as many copies as after the first."""
            group, layer = step
            n, of_all = group.stop - group.start, n_layers * (n_layers + 1)
            return n * (layer + 1) * (layer + 2) // of_all - n * layer * (layer + 1) // of_all

        groups = (slices(prefixes.stop, most, prefixes.start) for prefixes in slices(len(prompts), together))
        steps = [(group, layer) for some in groups for group in some for layer in range(n_layers)]
        begun = []
        for group, some in groupby(counted(steps, prompts_worth), lambda step: step[0]):
            layers, first = (layer for _, layer in some), group.start // together * together
            prefixes, parts = slice(first, first + together), [*slices(group.stop, size, group.start)]
            begun += self._in_step(prompts, prefixes, parts, layers, n_edits, edit)
        return begun

    def _in_step(
        self,
        prompts: Prompts,
        together: slice,
        parts: Sequence[slice],
        layers: Iterable[int],
        n_edits: int,
        edit: Callable[[slice], AbstractContextManager[None]],
    ) -> list[Callable[[], TokenScores]]:
        """Run a pass over each of ``parts``, and if need be one over the prefixes of the prompts ``together`` before
        them, through each of the ``layers`` in turn. -> their scores, on the way."""
        backbone, streaming = self.backbone, self.backbone.streaming
        assert streaming
        ids = prompts.ids[together]
        with ExitStack() as stack:
            stack.enter_context(backbone.running())
            prefixes = self.kept.found(ids) or Prefill(backbone, ids)
            making = prefixes if isinstance(prefixes, Prefill) else None
            passes = [self._waiting(prompts, part, together.start, prefixes) for part in parts]
            for one, part in zip(passes, parts, strict=True):
                with turn_of(one):
                    stack.enter_context(edit(part))
            first = making and Waiting(backbone.arch.blocks, making.decode, making.scope)
            for layer in layers:
                with streaming.staying(layer):
                    if first:
                        first.run(layer)
                    with backbone.arithmetic.multiplying_copies():
                        for one in passes:
                            one.run(layer)
            if making:
                self.kept.keep(ids, making.prefix())
            scores = []
            for part in parts:
                with backbone.arithmetic.multiplying_copies():
                    hidden = passes.pop(0).end()
                scores.append(on_the_way(self._scores(hidden, prompts.targets[part], n_edits)))
                del hidden
        return scores

    def _waiting(self, prompts: Prompts, part: slice, start: int, prefixes: Prefix | Prefill) -> Waiting:
        """The pass over ``part`` of the prompts; ``prefixes`` are those from prompt ``start`` on."""
        backbone, of_these = self.backbone, slice(part.start - start, part.stop - start)
        last, lengths = last_tokens(backbone, prompts.ids[part]), prefixes.lengths[of_these]
        return Waiting(
            backbone.arch.blocks,
            lambda: run_last_tokens(backbone, last, lengths),
            lambda layer: attending_to(prefixes.of_layer(layer)[of_these], backbone),
        )

    def _scores(
        self, hidden: torch.Tensor, targets: Sequence[int], n_edits: int, likeliest: Likeliest | None = None
    ) -> TokenScores:
        """Scores of the copies at the end of a pass."""
        if hidden.shape[1] != 1 + n_edits:
            raise RunError(f"the pass ended with {hidden.shape[1]} copies of the last token, not {1 + n_edits}")
        return scores_of(self.backbone, hidden, targets, likeliest)

    def _passes_at_once(self) -> int:
        """Passes that may be under way when another is waited for."""
        return len(self.backbone.cards.devices) if self.backbone.cards else 0

    def _prompts_that_fit(self, prompts: TokenIds, n_edits: int) -> int:
        """Number of prompts in a pass, from the memory above the weights: as far as possible a function of shapes and
        the device, not of what is free now. Batch shapes change low-order bits, and a resumed run must give the same
        bytes."""
        longest, there = max(len(prompt) for prompt in prompts), self._budget()
        if self.backbone.streaming:
            in_step = min(len(prompts), self._prompts_in_step(n_edits))
            there -= in_step * bytes_waiting(self.backbone.arch, n_edits)
        fitting = max(1, there // bytes_of_prompt(self.backbone.arch, n_edits, longest))
        if self.backbone.cards is None:
            return fitting
        # Enough passes that cards wait a small share of the time while the first one begins and the last one ends.
        of_all = -(-len(prompts) // (_PASSES_A_CARD * len(self.backbone.cards.devices)))
        return min(fitting, max(of_all, -(-_ROWS // (1 + n_edits))))

    def _prompts_a_prefix(self, prompts: TokenIds, n_edits: int, size: int) -> int:
        """Number of prompts, a multiple of ``size``, whose prefixes are run at once: those of all passes, unless they
        have more tokens than a pass has copies, whose memory they take before it, or more to keep than
        ``_PREFIXES``."""
        # Fewer at once would let a second card begin sooner, but later prefixes keep it waiting as long.
        tokens = min(size * (1 + n_edits), _PREFIXES // bytes_of_token(self.backbone))
        return size * max(1, tokens // max(len(prompt) for prompt in prompts) // size)

    def _prompts_in_step(self, n_edits: int) -> int:
        """Number of prompts whose copies can wait for their turn while others run: in half of a pass's memory."""
        return self._budget() // 2 // bytes_waiting(self.backbone.arch, n_edits)

    def _budget(self) -> int:
        """Bytes for one pass; on CUDA, what the card has beside the weights."""
        backbone = self.backbone
        if backbone.cards and backbone.device.type == "cuda":
            there = min(card or 0 for card in cards_bytes(backbone.cards.devices, backbone.arch))
            return max(1 << 30, there - backbone.weights_on_device)
        card = card_bytes(backbone.device, backbone.arch)
        return _CPU_BUDGET if card is None else max(1 << 30, card - backbone.weights_on_device)
