"""The stages of every q_id, once, in the spec's order. What follows from this list: the order they run in, what a
restart runs, which settings may still be chosen, what completes a q_id, what ``relfv verify`` reads and checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from relfv.settings import IDENTITY, Settings
from relfv.stages import (
    ablation,
    answers,
    attribution,
    cie,
    controls,
    curve,
    formats,
    function_vector,
    heatmap,
    means,
    mlps,
    new_queries,
    positions,
    replicates,
    step6,
    step6_summary,
    summary,
    sweeps,
    trials,
    vector_file,
    zeroshot,
)
from relfv.stages.stage import Stage, Step
from relfv.store.files import sha256_file
from relfv.store.folder import File
from relfv.store.status import HashOf, QidStatus

STAGES: tuple[Stage, ...] = (
    trials.STAGE,
    means.STAGE,
    cie.STAGE,
    heatmap.STAGE,
    function_vector.STAGE,
    zeroshot.STAGE,
    step6.STAGE,
    step6_summary.STAGE,
    vector_file.STAGE,
    curve.STAGE,
    controls.STAGE,
    answers.STAGE,
    summary.STAGE,
    sweeps.STAGE,
    ablation.STAGE,
    mlps.STAGE,
    positions.STAGE,
    new_queries.STAGE,
    replicates.STAGE,
    formats.STAGE,
    attribution.STAGE,
)
STEP_D = (trials.STAGE, means.STAGE, cie.STAGE)
"""The stages that the spec calls StepD."""


def steps(layers: Sequence[int], *, of: Iterable[Stage] = STAGES, extras: bool = True) -> list[Step]:
    """The entries of qid_status.json that make a q_id complete, in order; without ``extras`` the spec's alone."""
    required = [stage for stage in of if not stage.asked and (extras or not stage.extra)]
    return [step for stage in required for step in (map(stage.step, layers) if stage.per_layer else [stage.step()])]


def asked_for(settings: Settings) -> list[Stage]:
    """The stages that a q_id is complete without and ``settings`` ask for, in order."""
    return [stage for stage in STAGES if stage.asked and stage.asked(settings)]


def shares(extras: bool = True) -> dict[str, float]:
    """Stage -> share of a q_id's time that it usually takes, for the stages that make a q_id complete, in order."""
    return {step.stage.name: step.stage.share for step in steps((0,), extras=extras)}


def step_named(name: str) -> Step | None:
    """The step that qid_status.json calls ``name``; None for one of another version of relfv."""
    for stage in STAGES:
        layer = name.removeprefix(stage.name)
        if stage.per_layer and name.startswith(stage.name) and layer.isdecimal():
            return stage.step(int(layer))
        if not stage.per_layer and name == stage.name:
            return stage.step()
    return None


def is_done(status: QidStatus, step: Step, hash_of: HashOf = sha256_file) -> bool:
    """Whether a step is recorded, with every file that it writes today, and neither those nor what it read have
    changed."""
    record = status.stages.get(step.name)
    return record is not None and step.has_all([*record.files], status.q_id) and status.intact(step.name, hash_of)


def not_done(status: QidStatus) -> Iterator[Step]:
    """The steps that are missing, damaged or out of date, in order. Each file is read once."""
    wanted, hash_of = steps(status.expected_layers, extras=status.settings.has_extras), cache(sha256_file)
    return (step for step in wanted if not is_done(status, step, hash_of))


def is_complete(status: QidStatus) -> bool:
    """Whether every step is done: nothing is missing, damaged or out of date."""
    return bool(status.expected_layers) and next(not_done(status), None) is None


@cache
def makers() -> dict[File[Any], Stage]:
    """The stage that writes each file."""
    return {file: stage for stage in STAGES for file in stage.writes}


@cache
def settings_of(stage: Stage) -> frozenset[str]:
    """The settings that what a stage writes depends on: its own, and those of the stages whose files it reads."""
    return frozenset(stage.settings).union(*(settings_of(makers()[file]) for file in stage.reads))


def free_settings(status: QidStatus, chosen_by: Iterable[Stage]) -> set[str]:
    """The settings that may still be chosen: no step that was begun depends on them, besides those of the stages that
    are about to run."""
    begun = {step.stage for name in status.stages if (step := step_named(name))} - set(chosen_by)
    return set(IDENTITY).difference(*map(settings_of, begun))


def file_named(name: str, q_id: str) -> File[Any] | None:
    """The file of the contract with this ``name``, relative to ``artifacts/``; None if there is none."""
    return next((file for file in makers() if file.is_named(name, q_id)), None)
