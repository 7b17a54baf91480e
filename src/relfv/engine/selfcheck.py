"""Choice of a model's engine: the shared-prefix one if it agrees with hooks on this very model, else the reference.

A fast wrong answer is the worst outcome there is, and no list of families can promise that the next one fits. So a
newly opened model first does a handful of patches and injections twice, in float32, on two prompts of different length.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from relfv.engine.base import Backbone, Engine, TokenIds
from relfv.engine.fitness import (
    RELATIVE_TOLERANCE,
    TOLERANCE,
    check_blocks,
    check_capture,
    check_projection,
    is_packed,
    readout_gap,
    require_readout,
    run_alone,
)
from relfv.engine.interventions import Interventions, interventions
from relfv.engine.reference import ReferenceEngine
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.engine.writing_check import writing_error
from relfv.errors import RunError

log = logging.getLogger(__name__)

ROUNDING = {"exact": 0.2, "fast": 1.0}
"""Largest accepted difference, as ``TOLERANCE``, for the arithmetic in use: too wide to measure its rounding, and
narrow enough to show a broken kernel."""

WRONG = 0.05
"""Difference in log-probability, as ``TOLERANCE``, above which a model is refused because of its reference engine.
Between experts that are nearly tied a router's choice is rounding, which moves scores by less."""


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
    """``max_error`` of the reference engine, where that is the one in use."""
    rounding: float | None = None
    """Largest difference, as ``max_error``, in the arithmetic in use, where that has kernels."""
    writing_error: float | None = None
    """Relative distance of the heads' parts as written from what attention adds to the residual stream
    (writing_check.py)."""
    found_at: str | None = None
    """Time (UTC) of the comparison, if its result was taken from an earlier opening of the same model (remembered.py);
    None if it was made now."""

    @property
    def said(self) -> str:
        """The result in words."""
        return self.reason + (f" (found on {self.found_at}, taken from the cache)" if self.found_at else "")

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
    return engine, check


def _choice(backbone: Backbone, trial: Interventions, float32: Backbone) -> tuple[Engine, SelfCheck]:
    """The engine that agrees with ``trial``, and how well it does."""
    wrong, error = "", None
    for candidate in [backbone.plain()] if backbone.arithmetic.is_plain else [backbone, backbone.plain()]:
        before = wrong
        error, rounding, wrong = _judge(candidate, trial)
        if wrong and trial.in_rows:  # perhaps it is the rows, which share a batch
            trial = trial.one_by_one(float32)
            error, rounding, wrong = _judge(candidate, trial)
        if error is not None and not wrong:
            if before:
                log.warning("%s with its kernels; using it without them", before)
            reason = f"agrees with plain hooks to {error:.1e} in log-probability (effects up to {trial.max_effect:.2g})"
            check = SelfCheck("shared_prefix", error, trial.max_effect, reason, rounding=rounding)
            return SharedPrefixEngine(candidate), check
    return _fallback(backbone.plain(), wrong, error, trial.error_of(ReferenceEngine(float32)), trial.max_effect)


def _checked_interventions(float32: Backbone, prompts: TokenIds) -> Interventions:
    """The interventions, after the checks that concern both engines. Raises RunError for a model that fails one, or
    that does not run at all."""
    try:
        alone = [run_alone(float32, prompt) for prompt in prompts]
        check_blocks(float32, prompts[0], alone[0])
        trial = interventions(float32, prompts, alone)
        gap = readout_gap(alone, trial.prompts.targets, trial.truth.base.logprob)
        if gap > TOLERANCE and trial.in_rows:
            trial = trial.one_by_one(float32)
            gap = readout_gap(alone, trial.prompts.targets, trial.truth.base.logprob)
        require_readout(float32, gap)
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


def _judge(candidate: Backbone, trial: Interventions) -> tuple[float | None, float | None, str]:
    """Judge the shared-prefix engine on ``candidate``: -> error of the algorithm, rounding of the arithmetic in use if
    it has kernels, and what is wrong with them, or an empty string."""
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
