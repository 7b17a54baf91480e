"""StepD, means: mean clean activation of every attention head at the last prompt token (Todd et al. 2024, eq. 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relfv.errors import RunError
from relfv.settings import MODEL_SETTINGS
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.store.folder import File, QidFolder
from relfv.store.formats import read_tensors, tensor_bytes
from relfv.store.status import QidStatus
from relfv.types import MeanActivations, Prompts

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun


def mean_activations(clean: CleanRun) -> MeanActivations:
    """Mean over trials of z[layer, head] at the last token.

    Summed in float64, so that the order of the prompts does not matter to any digit that is kept.
    """
    return MeanActivations(clean.activations.double().mean(0).float().numpy(), n_prompts=len(clean.activations))


def clean_prompts(work: Work) -> Prompts:
    """The frozen trials' clean prompts as token ids (``work.once(clean_prompts)``)."""
    return work.tokenised(work.read(TRIALS), clean=True)


def clean_run(work: Work) -> CleanRun:
    """The frozen trials' clean prompts, run; several stages need what they give (``work.once(clean_run)``)."""
    from relfv.engine.clean import run_clean

    clean = run_clean(work.model.backbone, work.once(clean_prompts))
    return clean if work.model.check.knows_writing else replace(clean, writing=None)


# --- files ---------------------------------------------------------------------------------------------------------


def read_means(path: Path) -> MeanActivations:
    """The ``clean_mean`` of a file, float32 (layer, head, head_dim); files of other tools may lack ``n_prompts``."""
    content = read_tensors(path)
    values = content.get("clean_mean") if isinstance(content, dict) else None
    if not isinstance(values, np.ndarray) or values.ndim != 3 or values.dtype.kind != "f":
        raise RunError(f"{path}: has no float tensor 'clean_mean' (layer, head, head_dim)")
    if not np.isfinite(values).all():
        raise RunError(f"{path}: its clean_mean holds NaN or infinities; expected finite numbers")
    return MeanActivations(values.astype(np.float32), n_prompts=int(content.get("n_prompts", 0)))


MEANS = File("stepD_mean_acts/qid_{q_id}_clean_mean.pt", read_means)
GLOBAL_MEANS = File("stepD_mean_acts/global_clean_mean.pt", read_means)
"""Mean activations over the q_ids of the run, which here is one, so that they are those of ``MEANS``."""


# --- the stage -----------------------------------------------------------------------------------------------------


def _measure(work: Work) -> str:
    means = mean_activations(work.once(clean_run))
    _, n_heads, head_dim = means.values.shape
    content = {
        "clean_mean": means.values,
        "slot_q": [work.q_id],
        "n_prompts": means.n_prompts,
        "n_heads": n_heads,
        "head_dim": head_dim,
        "resid_dim": work.model.arch.resid_dim,
    }
    for file in (MEANS, GLOBAL_MEANS):
        work.write(file, tensor_bytes(content), content=means)
    return f"{means.n_prompts} clean prompts"


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    same = len(folder.read(MEANS).values) == len(status.expected_layers)
    yield Check(folder.path(MEANS), "as many layers as qid_status.json", same)


STAGE = Stage(
    "stepD_means",
    "Mean clean activation of every head.",
    _measure,
    reads=(TRIALS,),
    writes=(MEANS, GLOBAL_MEANS),
    settings=MODEL_SETTINGS,
    agrees=_agrees,
    share=0.04,
)
