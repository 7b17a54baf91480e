"""Which engine a model gets: the shared-prefix one if it agrees with hooks on this very model, else the reference.

A fast wrong answer is the worst outcome there is, and no list of families can promise that the next one fits. So a
newly opened model first does a handful of patches and injections twice, in float32, on two prompts of different length.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace

import torch

from relfv.engine.base import Backbone, Engine, Together, TokenIds
from relfv.engine.fitness import (
    RELATIVE_TOLERANCE,
    TOLERANCE,
    check_blocks,
    check_capture,
    check_projection,
    check_readout,
    is_packed,
)
from relfv.engine.passes import capture_heads
from relfv.engine.readout import joined
from relfv.engine.reference import (
    ReferenceEngine,
    naive_baseline,
    naive_head_patch,
    naive_injection,
    naive_together,
)
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.engine.writing_check import writing_error
from relfv.errors import RunError
from relfv.types import Effects, HeadId, Prompts

log = logging.getLogger(__name__)

ROUNDING = {"exact": 0.2, "fast": 1.0}
"""As ``TOLERANCE``, for the arithmetic in use: too wide to measure its rounding, and narrow enough to show a broken
kernel."""

WRONG = 0.05
"""The same difference for the reference engine, above which a model is refused. Between experts that are nearly tied a
router's choice is rounding, which moves scores by less."""

MIN_EFFECT = 0.1
"""Interventions are enlarged until one of them moves a log-probability by at least this much."""

N_HEADS = 6


@dataclass(frozen=True)
class SelfCheck:
    """The result of the comparison, for the manifest."""

    engine: str
    max_error: float | None
    """Largest difference in log-probability over all compared scores, as a share of the effect where that is above one
    nat; None if the shared-prefix engine could not run."""
    max_effect: float
    """Largest effect among the compared interventions: the check means nothing if nothing happened."""
    reason: str
    reference_error: float | None = None
    """The same difference for the reference engine, where that is the one in use."""
    rounding: float | None = None
    """The same difference in the arithmetic in use, where that has kernels."""
    writing_error: float | None = None
    """How far the heads' parts as written are from what attention adds to the residual stream (writing_check.py)."""

    @property
    def knows_writing(self) -> bool:
        """Whether what each head adds to the residual stream is known."""
        return self.writing_error is not None and self.writing_error <= RELATIVE_TOLERANCE


def choose_engine(backbone: Backbone, prompts: TokenIds) -> tuple[Engine, SelfCheck]:
    """Compare the engines on ``prompts`` (at least two, of different lengths) and return the one to use.

    The comparison runs in float32 whatever the precision is: it tests the algorithm, not the rounding. Kernels are part
    of what is tested; if they are at fault, the same engine goes on without them. Raises RunError for a model whose
    logits or projections relfv would misread, or whose logits are not finite.
    """
    float32 = backbone.plain().in_float32()
    trial = _checked_interventions(float32, prompts)
    engine, check = _choice(backbone, trial, float32)
    with_heads = sorted({head.layer for head in trial.heads})
    check = replace(check, writing_error=writing_error(float32, prompts[0], with_heads))
    if not check.knows_writing:
        log.warning("what attention adds to the residual stream of this family is not known: nothing is said of it")
    return engine, check


def _choice(backbone: Backbone, trial: _Interventions, float32: Backbone) -> tuple[Engine, SelfCheck]:
    """The engine that agrees with ``trial``, and how well it does."""
    wrong, error = "", None
    for candidate in [backbone.plain()] if backbone.arithmetic.is_plain else [backbone, backbone.plain()]:
        before = wrong
        error, rounding, wrong = _judge(candidate, trial)
        if error is not None and not wrong:
            if before:
                log.warning("%s with its kernels; using it without them", before)
            reason = f"agrees with plain hooks to {error:.1e} in log-probability (effects up to {trial.max_effect:.2g})"
            check = SelfCheck("shared_prefix", error, trial.max_effect, reason, rounding=rounding)
            return SharedPrefixEngine(candidate), check
    return _fallback(backbone.plain(), wrong, error, trial.error_of(ReferenceEngine(float32)), trial.max_effect)


def _checked_interventions(float32: Backbone, prompts: TokenIds) -> _Interventions:
    """The interventions, after the checks that concern both engines. Raises RunError for a model that fails one, or
    that does not run at all."""
    try:
        check_blocks(float32, prompts[0])
        trial = _interventions(float32, prompts)
        check_readout(float32, trial.prompts, trial.truth.base.logprob)
        check_projection(float32, trial.z[0], sorted({head.layer for head in trial.heads}))
        check_capture(float32, prompts, trial.z)
    except (RunError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # modules by others may want more than token ids, or not be where hooks expect them
        raise RunError(
            f"{type(float32.model).__name__} does not run on plain token ids with hooks on its blocks and attention "
            f"({_first_line(problem)}); expected a decoder that does, so relfv cannot measure this model"
        ) from problem
    return trial


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".split("\n")[0]


@dataclass(frozen=True)
class _Interventions:
    """Patches and injections, and what they do by one hooked forward pass each, in plain float32."""

    prompts: Prompts
    z: torch.Tensor
    """float32 (prompt, layer, head, head_dim): what the heads do."""
    heads: list[HeadId]
    replacement: torch.Tensor
    """(layer, head, head_dim)"""
    layers: list[int]
    vector: torch.Tensor
    """(1, resid_dim)"""
    truth: Effects
    """Columns: the patches of ``heads``, then the injections after ``layers``, then all of them at once."""
    max_effect: float

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


def _interventions(float32: Backbone, ids: TokenIds) -> _Interventions:
    """Each head is given its mean over the prompts, enlarged until there are effects that a wrong engine would miss.

    Raises RunError if the model's logits are not finite.
    """
    with float32.running():
        z, hidden = capture_heads(float32, ids)
        targets = float32.arch.final_logits(float32.arch.lm_head(hidden.float())).argmax(-1).tolist()
    prompts = Prompts(ids, targets)
    heads, layers = _sample(float32)
    for scale in (4.0, 32.0, 256.0):
        replacement = scale * z.mean(0)
        vector = torch.stack([_direction(float32, replacement)])
        truth = _naive(float32, prompts, replacement, heads, vector[0], layers)
        max_effect = float((truth.edited.logprob - truth.base.logprob[:, None]).abs().max())
        if max_effect >= MIN_EFFECT:
            break
    if not torch.isfinite(truth.base.logprob).all():
        raise RunError(
            f"{type(float32.model).__name__} gives NaN or infinite logits on a plain prompt, also in float32; expected "
            "finite numbers, so its weights are damaged: fetch or copy the model again"
        )
    return _Interventions(prompts, z, heads, replacement, layers, vector, truth, max_effect)


def _judge(candidate: Backbone, trial: _Interventions) -> tuple[float | None, float | None, str]:
    """Of the shared-prefix engine on ``candidate``: error of the algorithm, rounding of the arithmetic in use if it has
    kernels, and what is wrong with them, or an empty string."""
    has_kernels, precision = candidate.arithmetic.facts()["kernels"], candidate.arithmetic.precision
    try:
        error = trial.error_of(SharedPrefixEngine(candidate.in_float32()))
        rounding = trial.error_of(SharedPrefixEngine(candidate)) if has_kernels else None
    except Exception as problem:  # an unfit model may fail anywhere in its modules, a kernel in its compiler
        return None, None, f"the shared-prefix engine cannot run this model ({_first_line(problem)})"
    wrong = ""
    if not error <= TOLERANCE:
        wrong = f"the shared-prefix engine is off by {error:.2g} in log-probability on this model"
    elif rounding is not None and not rounding <= ROUNDING[precision]:
        wrong = f"the shared-prefix engine is off by {rounding:.2g} in {precision} arithmetic"
    return error, rounding, wrong


def _fallback(
    backbone: Backbone, reason: str, shared_prefix_error: float | None, reference_error: float, max_effect: float
) -> tuple[Engine, SelfCheck]:
    """The reference engine, and in its reason how far *it* is from one forward pass at a time.

    Raises RunError if it is far off although no weights are packed: then more than rounding is at work.
    """
    if not reference_error <= WRONG and not is_packed(backbone):
        raise RunError(
            f"{type(backbone.model).__name__}: {reason}, and the reference engine by {reference_error:.2g}: what it "
            "computes for a prompt depends on what shares the batch, so this model cannot be measured correctly"
        )
    if reference_error <= TOLERANCE:
        log.warning(
            "%s; using the reference engine, which agrees with plain hooks to %.1e and is slower",
            reason,
            reference_error,
        )
    else:
        reason += (
            f"; the reference engine differs by {reference_error:.2g} from one forward pass at a time, because this "
            "model's results depend on what shares its batch (8-bit weights do that, and nearly tied experts): take "
            "scores below that for noise"
        )
        log.warning("%s", reason)
    return ReferenceEngine(backbone), SelfCheck("reference", shared_prefix_error, max_effect, reason, reference_error)


def _sample(backbone: Backbone) -> tuple[list[HeadId], list[int]]:
    """Heads over all layers with attention, the first and last among them; and the first, middle and last layer."""
    n_layers, n_heads, with_heads = backbone.arch.n_layers, backbone.arch.n_heads, [*backbone.arch.out_projs]
    rng = random.Random(0)
    chosen = {with_heads[round(i * (len(with_heads) - 1) / (N_HEADS - 1))] for i in range(N_HEADS)}
    heads = [HeadId(layer, rng.randrange(n_heads)) for layer in sorted(chosen)]
    return heads, sorted({0, n_layers // 2, n_layers - 1})


def _direction(backbone: Backbone, activations: torch.Tensor) -> torch.Tensor:
    """A residual-stream vector of a usual size: what the heads of the middle layer with attention would write."""
    with_heads = [*backbone.arch.out_projs]
    layer = with_heads[len(with_heads) // 2]
    parts = [backbone.arch.project_head(layer, head, activations[layer, head]) for head in range(backbone.arch.n_heads)]
    return torch.stack(parts).sum(0).float()


def _naive(
    backbone: Backbone,
    prompts: Prompts,
    replacement: torch.Tensor,
    heads: list[HeadId],
    vector: torch.Tensor,
    layers: list[int],
) -> Effects:
    base, edited = [], []
    activations = {head: replacement[head.layer, head.head] for head in heads}
    with backbone.running():
        for prompt, target in zip(prompts.ids, prompts.targets, strict=True):
            base.append(naive_baseline(backbone, prompt, target))
            patched = [naive_head_patch(backbone, prompt, target, head, z) for head, z in activations.items()]
            injected = [naive_injection(backbone, prompt, target, layer, vector) for layer in layers]
            together = naive_together(backbone, prompt, target, activations, dict.fromkeys(layers, vector))
            edited.append(joined([*patched, *injected, together])[None])
    return Effects(base=joined(base), edited=joined(edited))


def _difference(measured: Effects, truth: Effects, columns: slice) -> float:
    """Largest |difference| in log-probability, as a share of the effect where that is above one nat; NaN counts as
    infinite."""
    true = truth.edited[:, columns].logprob
    effects = (true - truth.base.logprob[:, None]).abs()
    base = (measured.base.logprob - truth.base.logprob).abs()
    edited = (measured.edited.logprob - true).abs() / effects.clamp_min(1.0)
    return float(torch.cat([base, edited.flatten()]).nan_to_num(nan=torch.inf).max())
