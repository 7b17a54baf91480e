"""The patches and injections that a self-check makes, and what they do by hooks on whole forward passes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from relfv.engine.base import Backbone, Engine, Together, TokenIds
from relfv.engine.fitness import Alone, is_packed
from relfv.engine.readout import joined
from relfv.engine.reference import Version, naive_rows, naive_together
from relfv.errors import RunError
from relfv.models.architecture import Architecture
from relfv.types import Effects, HeadId, Prompts

MIN_EFFECT = 0.1
"""Interventions are enlarged until one of them moves a log-probability by at least this much."""

N_HEADS = 6


@dataclass(frozen=True)
class Interventions:
    """Patches and injections, and what they do by hooks on whole forward passes, in plain float32."""

    prompts: Prompts
    z: torch.Tensor
    """float32 (prompt, layer, head, head_dim): the heads' outputs at the last token."""
    heads: list[HeadId]
    replacement: torch.Tensor
    """(layer, head, head_dim)"""
    layers: list[int]
    vector: torch.Tensor
    """(1, resid_dim)"""
    truth: Effects
    """Columns: the patches of ``heads``, then the injections after ``layers``, then all of them at once."""
    in_rows: bool
    """Whether ``truth`` comes from one pass for each prompt, with one intervention in each row and the first row left
    alone; else each intervention has a pass of its own, as in published code, which takes many times as long. Rows are
    independent in all but few models; in those, rows agree with no engine, and passes of their own decide."""

    @property
    def max_effect(self) -> float:
        """Largest effect on a log-probability."""
        return float((self.truth.edited.logprob - self.truth.base.logprob[:, None]).abs().max())

    def one_by_one(self, float32: Backbone) -> Interventions:
        """The same interventions, with ``truth`` measured in one pass for each intervention."""
        truth = _naive(float32, self.prompts, self.replacement, self.heads, self.vector[0], self.layers, in_rows=False)
        return replace(self, truth=truth, in_rows=False)

    def error_of(self, engine: Engine) -> float:
        """Largest difference between what ``engine`` measures and the truth, as in ``SelfCheck.max_error``."""
        swept = engine.sweep_heads(self.prompts, self.replacement, self.heads)
        injected = engine.inject(self.prompts, self.vector, self.layers)
        added = torch.zeros(1, len(self.replacement), self.vector.shape[1])
        added[:, self.layers] = self.vector.to(added)
        together = engine.edit_together(
            self.prompts, [replace(Together.setting([self.heads], self.replacement[None]), added=added)]
        )
        n, m = len(self.heads), len(self.heads) + len(self.layers)
        return max(
            _difference(swept, self.truth, slice(0, n)),
            _difference(injected, self.truth, slice(n, m)),
            _difference(together, self.truth, slice(m, None)),
        )


def interventions(float32: Backbone, ids: TokenIds, alone: Sequence[Alone]) -> Interventions:
    """Make the self-check's interventions: each sampled head is set to its mean over the prompts, enlarged until there
    are effects that a wrong engine would miss.

    Raises RunError if the model's logits are not finite.
    """
    z, hidden = torch.stack([of.z for of in alone]), torch.cat([of.final for of in alone])
    with float32.running():
        targets = float32.arch.final_logits(float32.arch.lm_head(hidden.float())).argmax(-1).tolist()
    prompts, in_rows = Prompts(ids, targets), not is_packed(float32)
    heads, n_layers = sampled_heads(float32.arch), float32.arch.n_layers
    layers = sorted({0, n_layers // 2, n_layers - 1})
    for scale in (4.0, 32.0, 256.0):
        replacement = scale * z.mean(0)
        vector = torch.stack([_direction(float32, replacement)])
        truth = _naive(float32, prompts, replacement, heads, vector[0], layers, in_rows=in_rows)
        trial = Interventions(prompts, z, heads, replacement, layers, vector, truth, in_rows)
        if trial.max_effect >= MIN_EFFECT:
            break
    if not torch.isfinite(trial.truth.base.logprob).all():
        raise RunError(
            f"{type(float32.model).__name__} gives NaN or infinite logits on a plain prompt, also in float32; expected "
            "finite numbers, so its weights are damaged: fetch or copy the model again"
        )
    return trial


def sampled_heads(arch: Architecture) -> list[HeadId]:
    """Heads over all layers with attention, the first and last among them."""
    with_heads, rng = [*arch.out_projs], random.Random(0)
    chosen = {with_heads[round(i * (len(with_heads) - 1) / (N_HEADS - 1))] for i in range(N_HEADS)}
    return [HeadId(layer, rng.randrange(arch.n_heads)) for layer in sorted(chosen)]


def _direction(backbone: Backbone, activations: torch.Tensor) -> torch.Tensor:
    """A residual-stream vector of a usual size: what the heads of the middle layer with attention would write."""
    with_heads = [*backbone.arch.out_projs]
    layer = with_heads[len(with_heads) // 2]
    return backbone.arch.project_heads(layer, range(backbone.arch.n_heads), activations[layer]).float().cpu()


def _naive(
    backbone: Backbone,
    prompts: Prompts,
    replacement: torch.Tensor,
    heads: list[HeadId],
    vector: torch.Tensor,
    layers: list[int],
    *,
    in_rows: bool,
) -> Effects:
    """Measure ``Interventions.truth``."""
    activations, vectors = {head: replacement[head.layer, head.head] for head in heads}, dict.fromkeys(layers, vector)
    versions: list[Version] = [({head: z}, {}) for head, z in activations.items()]
    versions += [({}, {layer: vector}) for layer in layers]
    versions.append((activations, vectors))
    rows = []
    with backbone.running():
        for prompt, target in zip(prompts.ids, prompts.targets, strict=True):
            if in_rows:
                rows.append(naive_rows(backbone, prompt, target, versions)[None])
            else:
                each = [naive_together(backbone, prompt, target, *version) for version in [({}, {}), *versions]]
                rows.append(joined(each)[None])
    scores = joined(rows)
    return Effects(base=scores[:, 0], edited=scores[:, 1:])


def _difference(measured: Effects, truth: Effects, columns: slice) -> float:
    """Largest |difference| in log-probability, as a share of the effect where that is above one nat; NaN counts as
    infinite."""
    true = truth.edited[:, columns].logprob
    effects = (true - truth.base.logprob[:, None]).abs()
    base = (measured.base.logprob - truth.base.logprob).abs()
    edited = (measured.edited.logprob - true).abs() / effects.clamp_min(1.0)
    return float(torch.cat([base, edited.flatten()]).nan_to_num(nan=torch.inf).max())
