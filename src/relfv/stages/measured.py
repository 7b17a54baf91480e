"""Results of some trials, taken together: clean means, scores of all heads, top heads, vector; and a file of several
such results, each kept as soon as it is made, so that a stage that is stopped can go on from there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relfv.errors import RelfvError, RunError
from relfv.settings import IDENTITY, Settings
from relfv.stages.agreement import cosines, mean_of_pairs
from relfv.stages.cie import METRICS, head_effects, heads_to_sweep, require_finite
from relfv.stages.function_vector import TOP_HEADS, build_function_vector
from relfv.stages.means import MEANS, mean_activations
from relfv.stages.scores import measure_of, trial_scores
from relfv.stages.stage import Work
from relfv.stages.trials import TRIALS
from relfv.store.files import sha256_bytes
from relfv.store.folder import File
from relfv.store.safetensors import read_safetensors, safetensors_bytes
from relfv.types import HeadId, MeanActivations, Prompts

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun
    from relfv.language_model import LanguageModel

_RANDOM_LISTS = 10


@dataclass(frozen=True)
class Measured:
    """Results of some trials, taken together."""

    means: np.ndarray
    """float32 (layer, head, head_dim): the mean clean activations."""
    scores: np.ndarray
    """float32 (head,): the score of every head that is swept, by layer, then head."""
    heads: tuple[HeadId, ...]
    """The top k heads, best first."""
    vector: np.ndarray
    """float32 (resid_dim,)."""


def measured_from(
    model: LanguageModel, means: MeanActivations, deltas: np.ndarray, heads: Sequence[HeadId], settings: Settings
) -> Measured:
    """The results from the effects ``deltas`` (trial, head) on the score key's measure, ``heads`` sorted. Raises
    RunError for effects that are not finite."""
    require_finite(deltas, f"{len(deltas)} trials")
    scores = trial_scores(deltas, settings.score_key).mean(0)
    top = tuple(heads[i] for i in np.argsort(-scores, kind="stable")[: settings.topk])
    return Measured(means.values, scores.astype(np.float32), top, build_function_vector(model.arch, means, top).total)


def measure(work: Work, clean: CleanRun, corrupted: Prompts) -> Measured:
    """The results of clean and corrupted prompts, made as StepD and StepE make theirs."""
    settings, means = work.settings, mean_activations(clean)
    heads, per_pass = heads_to_sweep(work.model, settings), work.trials_per_pass.get("stepD_cie")
    effects = head_effects(work.model, corrupted, means, heads, per_pass=per_pass)
    deltas = effects.effects.delta(measure_of(settings.score_key))
    return measured_from(work.model, means, deltas, effects.heads, settings)


def own(work: Work) -> Measured:
    """The results of the frozen trials, from what StepD has written."""
    deltas = work.read(METRICS)
    of_measure = deltas.of[measure_of(work.settings.score_key)]
    return measured_from(work.model, work.read(MEANS), of_measure, deltas.heads, work.settings)


def cosine_of_random_heads(work: Work, several: Sequence[Measured]) -> float | None:
    """Mean cosine between vectors of ``topk`` random heads each, some from the means of each of ``several``: any two
    sums of mean activations have something in common."""
    rng, settings = random.Random(f"relfv:{work.settings.seed}:random heads"), work.settings
    heads, arch = heads_to_sweep(work.model, settings), work.model.arch
    vectors = [
        build_function_vector(arch, MeanActivations(one.means, 0), rng.sample(heads, settings.topk)).total
        for one in several
        for _ in range(_RANDOM_LISTS)
    ]
    found = mean_of_pairs(cosines(np.stack(vectors)))
    return found.mean if found else None


# --- files ---------------------------------------------------------------------------------------------------------


def read_measured(path: Path) -> tuple[dict[str, Measured], str]:
    """Read a file as ``measured_bytes`` makes it. -> (results by name, what they were made from). Raises RunError for
    any other, or one whose numbers are not as they were written."""
    arrays, metadata = read_safetensors(path)
    if metadata.get("digest") != _digest(arrays):
        raise RunError(f"{path}: its numbers are not those that were written")
    found: dict[str, Measured] = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in arrays):
        means, scores, heads, vector = (arrays[f"{name}.{part}"] for part in ("means", "scores", "heads", "vector"))
        top = tuple(HeadId(int(layer), int(head)) for layer, head in heads)
        found[name] = Measured(means, scores, top, vector)
    return found, metadata.get("made_from", "")


def measured_bytes(several: Mapping[str, Measured], made_from: str) -> bytes:
    """A safetensors file with the arrays ``<name>.means``, ``.scores``, ``.heads`` and ``.vector`` of each."""
    arrays: dict[str, np.ndarray] = {}
    for name, one in several.items():
        parts = {**vars(one), "heads": np.array([(head.layer, head.head) for head in one.heads])}
        arrays |= {f"{name}.{part}": np.asarray(values, np.float32) for part, values in parts.items()}
    return safetensors_bytes(arrays, {"made_from": made_from, "digest": _digest(arrays)})


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    return sha256_bytes(b"".join(name.encode() + array.tobytes() for name, array in arrays.items()))


MeasuredFile = File[tuple[dict[str, Measured], str]]


@dataclass
class Kept:
    """Several results of a q_id: those that an earlier run has made are taken, and each is on disk as soon as it is
    made."""

    work: Work
    file: MeasuredFile
    so_far: MeasuredFile
    """Hidden file with the results made so far, there only until all are made."""
    _before: dict[str, Measured] = field(default_factory=dict)
    _made: dict[str, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._from = _made_from(self.work)
        for file in (self.file, self.so_far):
            try:
                there, made_from = self.work.read(file)
            except RelfvError:  # not there, or damaged: it is made again
                continue
            self._before |= there if made_from == self._from else {}

    def take(self, name: str, make: Callable[[], Measured]) -> Measured:
        """The result of ``name``, made unless it is there."""
        if name in self._before:
            self._made[name] = self._before[name]
        else:
            self._made[name] = make()
            self.work.write(self.so_far, measured_bytes({**self._before, **self._made}, self._from))
        return self._made[name]

    def finish(self) -> None:
        """Write the file of the results that were taken, and remove the hidden one."""
        self.work.write(self.file, measured_bytes(self._made, self._from))
        self.work.folder.remove(self.so_far)


def _made_from(work: Work) -> str:
    """Record of what the results are made from; if it has changed, no earlier result may be taken."""
    files = work.folder.hashes([work.folder.path(file) for file in (TRIALS, MEANS, METRICS, TOP_HEADS)])
    settings = {name: getattr(work.settings, name) for name in IDENTITY}
    return json.dumps([files, settings, work.model_identity])
