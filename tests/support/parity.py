"""How far each engine is from the obvious way on each model of the zoo, computed once for all tests that ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from relfv.engine.base import Backbone, Engine, TokenIds
from relfv.engine.passes import capture_heads
from relfv.engine.readout import joined
from relfv.engine.reference import ReferenceEngine, naive_baseline, naive_head_patch, naive_injection
from relfv.engine.selfcheck import SelfCheck, choose_engine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.types import Effects, HeadId, Prompts, TokenScores
from zoo import ZOO, backbone_of

ENGINES: dict[str, type[SharedPrefixEngine] | type[ReferenceEngine]] = {
    "shared_prefix": SharedPrefixEngine,
    "reference": ReferenceEngine,
}


ROUNDING = 64
"""How many epsilons of the largest logit an engine may be off. A pass through a tiny model is some twenty sums of up to
a hundred terms; each moves by an epsilon or so if it is added in another order, and the model passes that on. The most
seen in the zoo, with kernels from SSE to AVX-512, was 15. A wrong mask, position or copy changes scores by 1e-3 and
more, which is above 64 epsilons of any logit here."""


def rounding(scale: float, n: float = ROUNDING, dtype: torch.dtype = torch.float32) -> float:
    """What arithmetic in ``dtype`` may make of numbers as large as ``scale``: ``n`` of its epsilons.

    Processors sum in different orders, and so do the rows of one batch on some of them: only two equal calls on one
    machine can be asked for the same bits.
    """
    return n * torch.finfo(dtype).eps * scale


def largest(*tensors: torch.Tensor) -> float:
    """The largest absolute value in them; NaN counts as infinite."""
    return max(float(t.abs().nan_to_num(nan=torch.inf).max()) for t in tensors)


def size(*scores: TokenScores) -> float:
    """Their largest logit or log-probability: what rounding is relative to."""
    return largest(*(values for s in scores for values in (s.logit, s.logprob)))


def size_in(path: Path) -> float:
    """The same of a trial_metrics.jsonl or eval_trials.jsonl."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return max(abs(value) for row in rows for key, value in row.items() if key.startswith(("logit_", "logprob_")))


def assert_close(found: torch.Tensor, true: torch.Tensor, scale: float | None = None, **how: Any) -> None:
    """The same but for ``rounding`` of numbers as large as ``scale``, by default the largest of ``true``."""
    limit = rounding(largest(true) if scale is None else scale, **how)
    assert largest(found - true) <= limit < torch.inf


def assert_same_scores(found: TokenScores, true: TokenScores, **how: Any) -> None:
    """The same but for ``rounding``, in shapes that broadcast."""
    assert_close(found.logit, true.logit, size(true), **how)
    assert_close(found.logprob, true.logprob, size(true), **how)


@dataclass(frozen=True)
class Truth:
    """One model, interventions on it, and what they do, by one hooked, unpadded, whole forward pass for each, made when
    first asked for."""

    backbone: Backbone
    prompts: list[list[int]]
    targets: list[int]
    """The most likely token after each prompt: its probability has room to fall."""
    values: torch.Tensor
    """(layer, head, head_dim)"""
    vectors: torch.Tensor
    """(2, resid_dim)"""

    @cached_property
    def sweep(self) -> Effects:
        """Of ``values``, a head at a time."""
        return naive_sweep(self.backbone, self.prompts, self.targets, self.values)

    @cached_property
    def injection(self) -> Effects:
        """Of ``vectors``, after a block at a time."""
        return naive_injections(self.backbone, self.prompts, self.targets, self.vectors)


@dataclass(frozen=True)
class Gaps:
    """Largest differences between an engine and the truth, beside the largest true effects."""

    delta_p: float
    delta_logprob: float
    true_delta_p: float
    true_delta_logprob: float
    same_top: float
    """Share of interventions after which both see the same most likely token."""
    size: float
    """The largest true logit or log-probability."""

    @property
    def limit(self) -> float:
        """What rounding may make of them."""
        return rounding(self.size)


def prompts_of_different_length() -> tuple[list[list[int]], list[int]]:
    """Three prompts and some targets."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 290, (length,), generator=generator).tolist() for length in (23, 9, 17)]
    return prompts, [5, 17, 123]


def all_heads(backbone: Backbone) -> list[HeadId]:
    """Every head, in order."""
    return [HeadId(layer, head) for layer in range(backbone.arch.n_layers) for head in range(backbone.arch.n_heads)]


def replacements(backbone: Backbone, prompts: TokenIds) -> torch.Tensor:
    """What the heads do on other prompts, enlarged."""
    with backbone.plain().in_float32().running():
        return 3.0 * capture_heads(backbone, prompts)[0].flip(0).mean(0)


def naive_base(backbone: Backbone, prompts: TokenIds, targets: Sequence[int]) -> TokenScores:
    """Fields (N,)."""
    backbone = backbone.plain().in_float32()
    with backbone.running():
        return joined([naive_baseline(backbone, p, t) for p, t in zip(prompts, targets, strict=True)])


def naive_sweep(backbone: Backbone, prompts: TokenIds, targets: Sequence[int], values: torch.Tensor) -> Effects:
    """All heads, one forward pass each."""
    heads, backbone = all_heads(backbone), backbone.plain().in_float32()
    with backbone.running():
        rows = [
            joined([naive_head_patch(backbone, p, t, h, values[h.layer, h.head]) for h in heads])[None]
            for p, t in zip(prompts, targets, strict=True)
        ]
    return Effects(naive_base(backbone, prompts, targets), joined(rows))


def naive_injections(backbone: Backbone, prompts: TokenIds, targets: Sequence[int], vectors: torch.Tensor) -> Effects:
    """All layers, one forward pass for each vector."""
    layers, backbone = range(backbone.arch.n_layers), backbone.plain().in_float32()
    with backbone.running():
        rows = [
            joined([naive_injection(backbone, p, t, layer, v) for layer in layers for v in vectors])[None]
            for p, t in zip(prompts, targets, strict=True)
        ]
    return Effects(naive_base(backbone, prompts, targets), joined(rows))


@cache
def truth(name: str) -> Truth:
    """Of the zoo's model ``name``."""
    backbone = backbone_of(ZOO[name].build)
    prompts, targets = prompts_of_different_length()
    targets = naive_base(backbone, prompts, targets).top_id.tolist()
    values = replacements(backbone, prompts)
    vectors = 2.0 * torch.randn(2, backbone.arch.resid_dim, generator=torch.Generator().manual_seed(2))
    return Truth(backbone, prompts, targets, values, vectors)


@cache
def chosen_engine(name: str) -> tuple[Engine, SelfCheck]:
    """What opening the zoo's model ``name`` would choose."""
    return choose_engine(truth(name).backbone, truth(name).prompts)


@cache
def sweep_gaps(name: str, engine: str) -> Gaps:
    """Of every head of the zoo's model ``name``."""
    t = truth(name)
    return gaps(_engine(t, engine).sweep_heads(Prompts(t.prompts, t.targets), t.values, all_heads(t.backbone)), t.sweep)


@cache
def injection_gaps(name: str, engine: str) -> Gaps:
    """Of two vectors after every block."""
    t = truth(name)
    layers = range(t.backbone.arch.n_layers)
    return gaps(_engine(t, engine).inject(Prompts(t.prompts, t.targets), t.vectors, layers), t.injection)


def _engine(t: Truth, engine: str) -> Engine:
    return ENGINES[engine](t.backbone)


def gaps(found: Effects, true: Effects) -> Gaps:
    """Compare effects; NaN compares as infinite."""

    def effects(of: Effects) -> tuple[torch.Tensor, torch.Tensor]:
        return of.edited.p - of.base.p[:, None], of.edited.logprob - of.base.logprob[:, None]

    (p, logprob), (true_p, true_logprob) = effects(found), effects(true)
    return Gaps(
        delta_p=largest(p - true_p),
        delta_logprob=largest(logprob - true_logprob),
        true_delta_p=largest(true_p),
        true_delta_logprob=largest(true_logprob),
        same_top=float((found.edited.top_id == true.edited.top_id).float().mean()),
        size=size(true.base, true.edited),
    )


def assert_same(found: Gaps) -> None:
    """Rounding alone between the two, and effects that could have been missed."""
    assert found.limit < 1e-3  # far below the effects
    assert found.delta_p <= found.limit
    assert found.delta_logprob <= found.limit
    assert found.true_delta_p > 0.01
    assert found.true_delta_logprob > 0.2
    assert found.same_top > 0.99
