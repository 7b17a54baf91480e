"""Which engine a model gets: the fast one if it agrees with plain hooks on this very model, else the obvious one.

A fast wrong answer is the worst outcome there is, and no list of families can promise that the next one fits. So the
first thing a newly opened model does is a handful of patches and injections twice, in strict float32, on two prompts
of different length.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from relfv.engine.arithmetic.precision import widened_if_low
from relfv.engine.base import Backbone, Engine, TokenIds, capture_heads
from relfv.engine.reference import ReferenceEngine, naive_baseline, naive_head_patch, naive_injection
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.errors import RunError
from relfv.types import Effects, HeadId, Prompts, TokenScores

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest accepted difference in log-probability (nats), float32 both ways, as a share of the intervention's effect where
that is above one nat. A wrong mask, position or cache is off by far more; float32 rounding by far less."""

ROUNDING = {"exact": 0.2, "fast": 1.0}
"""The same for the arithmetic that is then used: no measure of it, but a broken kernel in it shows."""

PROJECTION_TOLERANCE = 0.02
"""Accepted relative error of projected heads. 8-bit products reach a percent; a missing scale is off by far more."""

MIN_EFFECT = 0.1
"""Interventions are enlarged until one of them moves a log-probability by at least this much."""

N_HEADS = 6


@dataclass(frozen=True)
class SelfCheck:
    """What the comparison found, for the manifest."""

    engine: str
    max_error: float | None
    """Largest difference in log-probability over all compared scores, as a share of the effect where that is above one
    nat; None if the fast engine could not run."""
    max_effect: float
    """Largest effect among the compared interventions: the check means nothing if nothing happened."""
    reason: str
    reference_error: float | None = None
    """The same difference for the reference engine, where that is the one in use."""
    rounding: float | None = None
    """The same difference for the kernels in the arithmetic that is used, where it is not the one compared."""


def choose_engine(backbone: Backbone, prompts: TokenIds) -> tuple[Engine, SelfCheck]:
    """Compare the engines on ``prompts`` (at least two, of different lengths) and return the one to use.

    The comparison runs in float32 whatever ``backbone.precision`` is: it tests the algorithm, not the rounding. The
    fused kernels are part of what is tested; should they be at fault, the same engine goes on without them.
    """
    exact = backbone.strict()
    with exact.running():
        z, hidden = capture_heads(exact, prompts)
        targets = exact.arch.final_logits(exact.arch.lm_head(hidden.float())).argmax(-1).tolist()
    heads, layers = _sample(exact)
    # Each head is given its mean over both prompts, enlarged: effects that are there to be missed.
    for scale in (4.0, 32.0, 256.0):
        replacement = scale * z.mean(0)
        vector = torch.stack([_direction(exact, replacement)])
        truth = _naive(exact, prompts, targets, replacement, heads, vector[0], layers)
        max_effect = float((truth.edited.logprob - truth.base.logprob[:, None]).abs().max())
        if max_effect >= MIN_EFFECT:
            break
    if not torch.isfinite(truth.base.logprob).all():
        raise RunError(
            f"{type(backbone.model).__name__} gives NaN or infinite logits on a plain prompt, also in float32; expected "
            "finite numbers, so its weights are damaged: fetch or copy the model again"
        )
    _check_readout(exact, prompts, targets, truth)
    _check_projection(exact, z[0], sorted({head.layer for head in heads}))

    def error_of(engine: Engine) -> float:
        return max(
            _difference(engine.sweep_heads(Prompts(prompts, targets), replacement, heads), truth, slice(0, len(heads))),
            _difference(engine.inject(Prompts(prompts, targets), vector, layers), truth, slice(len(heads), None)),
        )

    def judged(chosen: Backbone, checked: Backbone) -> tuple[float | None, float | None, str]:
        """Error of the algorithm, rounding of the arithmetic in use, and what is wrong with them, if anything is."""
        try:
            error = error_of(SharedPrefixEngine(checked))
            rounding = error_of(SharedPrefixEngine(chosen)) if chosen.fusions is not None else None
        except Exception as problem:  # a misfit may fail anywhere in the model's modules, a kernel in its compiler
            first_line = f"{type(problem).__name__}: {problem}".split("\n")[0]
            return None, None, f"the shared-prefix engine cannot run this model ({first_line})"
        if not error <= TOLERANCE:
            return error, rounding, f"the shared-prefix engine is off by {error:.2g} in log-probability on this model"
        if rounding is not None and not rounding <= ROUNDING[backbone.precision]:
            return (
                error,
                rounding,
                f"the shared-prefix engine is off by {rounding:.2g} in {backbone.precision} arithmetic",
            )
        return error, rounding, ""

    candidates = [(backbone.plain(), exact)]
    if backbone.fusions is not None or backbone.split:
        candidates.insert(0, (backbone, backbone.careful()))
    wrong, error = "", None
    for chosen, checked in candidates:
        before = wrong
        error, rounding, wrong = judged(chosen, checked)
        if error is not None and not wrong:
            if before:
                log.warning("%s with its fused kernels; using it without them", before)
            reason = f"agrees with plain hooks to {error:.1e} in log-probability (effects up to {max_effect:.2g})"
            return SharedPrefixEngine(chosen), SelfCheck("shared_prefix", error, max_effect, reason, rounding=rounding)
    return _fallback(backbone.plain(), wrong, error, error_of(ReferenceEngine(exact)), max_effect)


def _fallback(
    backbone: Backbone, reason: str, fast_error: float | None, own_error: float, max_effect: float
) -> tuple[Engine, SelfCheck]:
    """The reference engine, with a word on how far *it* is from one forward pass at a time."""
    if own_error <= TOLERANCE:
        log.warning(
            "%s; using the reference engine, which agrees with plain hooks to %.1e and is slower", reason, own_error
        )
    else:
        reason += (
            f"; the reference engine differs by {own_error:.2g} from one forward pass at a time, because this model's "
            "results depend on what shares its batch (8-bit weights do that): take scores below that for noise"
        )
        log.warning("%s", reason)
    return ReferenceEngine(backbone), SelfCheck("reference", fast_error, max_effect, reason, own_error)


def _sample(backbone: Backbone) -> tuple[list[HeadId], list[int]]:
    """Heads over the whole depth, first and last layer among them, and the first, middle and last layer."""
    n_layers, n_heads = backbone.arch.n_layers, backbone.arch.n_heads
    rng = random.Random(0)
    chosen = {round(i * (n_layers - 1) / (N_HEADS - 1)) for i in range(N_HEADS)}
    heads = [HeadId(layer, rng.randrange(n_heads)) for layer in sorted(chosen)]
    return heads, sorted({0, n_layers // 2, n_layers - 1})


def _direction(backbone: Backbone, activations: torch.Tensor) -> torch.Tensor:
    """A residual-stream vector of natural size: what the heads of the middle layer would write."""
    layer = backbone.arch.n_layers // 2
    parts = [backbone.arch.project_head(layer, head, activations[layer, head]) for head in range(backbone.arch.n_heads)]
    return torch.stack(parts).sum(0).float()


def _naive(
    backbone: Backbone,
    prompts: TokenIds,
    targets: Sequence[int],
    replacement: torch.Tensor,
    heads: list[HeadId],
    vector: torch.Tensor,
    layers: list[int],
) -> Effects:
    base, edited = [], []
    with backbone.running():
        for prompt, target in zip(prompts, targets, strict=True):
            base.append(naive_baseline(backbone, prompt, target))
            patched = [
                naive_head_patch(backbone, prompt, target, head, replacement[head.layer, head.head]) for head in heads
            ]
            injected = [naive_injection(backbone, prompt, target, layer, vector) for layer in layers]
            edited.append(TokenScores.cat([*patched, *injected])[None])
    return Effects(base=TokenScores.cat(base), edited=TokenScores.cat(edited))


def _check_readout(backbone: Backbone, prompts: TokenIds, targets: Sequence[int], truth: Effects) -> None:
    """The model's own logits against relfv's read-out, which both engines share and so cannot judge.

    Raises RunError: with an unknown last step no engine would be right.
    """
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        with backbone.running():
            ids = torch.tensor([list(prompt)], device=backbone.device)
            logits = backbone.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        gap = abs(float(logits.log_softmax(-1)[target]) - float(truth.base.logprob[index]))
        if not gap <= TOLERANCE:
            raise RunError(
                f"{type(backbone.model).__name__} turns hidden states into logits in a way relfv does not know "
                f"(log-probabilities differ by {gap:.2g}); this model cannot be measured correctly"
            )


def _check_projection(backbone: Backbone, z: torch.Tensor, layers: list[int]) -> None:
    """The heads' projected parts must sum to what the projection itself makes of them, without its bias.

    ``z`` is (layer, head, head_dim). Raises RunError: the function vector would be wrong.
    """
    arch = backbone.arch
    for layer in layers:
        parts = torch.stack([arch.project_head(layer, head, z[layer, head]) for head in range(arch.n_heads)]).sum(0)
        rows = torch.stack([z[layer].flatten(), torch.zeros(arch.n_heads * arch.head_dim)])[:, None]
        with torch.inference_mode(), widened_if_low(arch.out_projs[layer]):
            out = arch.out_projs[layer](rows.to(backbone.device)).cpu().double()[:, 0]
        whole = out[0] - out[1]
        gap = float((parts - whole).norm() / whole.norm().clamp_min(1e-12))
        if not gap <= PROJECTION_TOLERANCE:
            raise RunError(
                f"{type(backbone.model).__name__}, layer {layer}: the projected heads are off by {gap:.2g} of the output "
                "projection's own result, so a function vector would be wrong; this weight format is not supported"
            )


def _difference(found: Effects, truth: Effects, columns: slice) -> float:
    """Largest |difference| in log-probability, as a share of the effect where that is above one nat; NaN counts as
    infinite."""
    true = truth.edited[:, columns].logprob
    effects = (true - truth.base.logprob[:, None]).abs()
    base = (found.base.logprob - truth.base.logprob).abs()
    edited = (found.edited.logprob - true).abs() / effects.clamp_min(1.0)
    return float(torch.cat([base, edited.flatten()]).nan_to_num(nan=torch.inf).max())
