"""Independent draws of a relation's trials, and what each gives: clean means, scores of all heads, top heads, vector.

Draw i is what ``--seed <seed + i>`` draws; draw 0 is the run's own, as it was frozen, with its own effects. A draw's
first 5 and 10 trials, and two draws together, have clean means and a head sweep of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relfv.errors import RelfvError, RunError
from relfv.settings import IDENTITY, MAX_SEED, Settings
from relfv.stages.cie import METRICS, corrupted_prompts, head_effects, heads_to_sweep, require_finite
from relfv.stages.function_vector import TOP_HEADS, build_function_vector
from relfv.stages.means import MEANS, clean_run, mean_activations
from relfv.stages.scores import measure_of, trial_scores
from relfv.stages.snapshot import snapshot_of
from relfv.stages.stage import Work
from relfv.stages.trials import TRIALS, draw
from relfv.store.files import sha256_bytes
from relfv.store.folder import File
from relfv.store.safetensors import read_safetensors, safetensors_bytes
from relfv.types import HeadId, MeanActivations, Prompts, Snapshot

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun
    from relfv.language_model import LanguageModel

FEWER = (5, 10)
"""Trials of a draw, its first, that are taken by themselves, too."""


def draw_seeds(settings: Settings) -> list[int]:
    """The seed of each draw; the first is the run's own."""
    return [(settings.seed + i) % (MAX_SEED + 1) for i in range(settings.replicates)]


@dataclass(frozen=True)
class Draw:
    """What some trials, taken together, give."""

    means: np.ndarray
    """float32 (layer, head, head_dim): the mean clean activations."""
    scores: np.ndarray
    """float32 (head,): the score of every head that is swept, by layer, then head."""
    heads: tuple[HeadId, ...]
    """The top k, best first."""
    vector: np.ndarray
    """float32 (resid_dim,)."""


def draw_from(
    model: LanguageModel, means: MeanActivations, deltas: np.ndarray, heads: Sequence[HeadId], settings: Settings
) -> Draw:
    """From the effects ``deltas`` (trial, head) on the score key's measure, ``heads`` sorted. Raises RunError for
    effects that are not finite."""
    require_finite(deltas, f"{len(deltas)} trials")
    scores = trial_scores(deltas, settings.score_key).mean(0)
    top = tuple(heads[i] for i in np.argsort(-scores, kind="stable")[: settings.topk])
    return Draw(means.values, scores.astype(np.float32), top, build_function_vector(model.arch, means, top).total)


# --- files ---------------------------------------------------------------------------------------------------------

Draws = dict[int, dict[int, Draw]]
"""Number of trials -> number of the draw, or of the two draws -> what it gives."""


def read_draws(path: Path) -> tuple[Draws, str]:
    """-> (the draws of a draws.safetensors, what they were made from). Raises RunError for any other file, or one whose
    numbers are not as they were written."""
    arrays, metadata = read_safetensors(path)
    if metadata.get("digest") != _digest(arrays):
        raise RunError(f"{path}: its numbers are not those that were written")
    draws: Draws = {}
    for name in arrays:
        n_trials, number, what = name.split(".")
        if what == "vector":
            means, scores, heads, vector = (
                arrays[f"{n_trials}.{number}.{part}"] for part in ("means", "scores", "heads", "vector")
            )
            top = tuple(HeadId(int(layer), int(head)) for layer, head in heads)
            draws.setdefault(int(n_trials), {})[int(number)] = Draw(means, scores, top, vector)
    return draws, metadata.get("made_from", "")


def draws_bytes(draws: Draws, made_from: str) -> bytes:
    """The content of draws.safetensors: an array ``<trials>.<number>.<means, scores, heads or vector>`` each."""
    arrays: dict[str, np.ndarray] = {}
    for n_trials in sorted(draws):
        for number, one in sorted(draws[n_trials].items()):
            parts = {**vars(one), "heads": np.array([(head.layer, head.head) for head in one.heads], np.float32)}
            arrays |= {f"{n_trials}.{number}.{name}": np.asarray(part, np.float32) for name, part in parts.items()}
    return safetensors_bytes(arrays, {"made_from": made_from, "digest": _digest(arrays)})


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    return sha256_bytes(b"".join(name.encode() + array.tobytes() for name, array in arrays.items()))


DRAWS = File("replicates/draws.safetensors", read_draws)
SO_FAR = File("replicates/.draws_so_far.safetensors", read_draws)
"""While the stage runs: a run that is stopped goes on from there."""

# --- making them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trials:
    """The trials of a draw, or of two together."""

    clean: CleanRun
    corrupted: Prompts

    def first(self, n: int) -> _Trials:
        return _Trials(replace(self.clean, activations=self.clean.activations[:n]), self.corrupted[:n])

    def __add__(self, other: _Trials) -> _Trials:
        import torch

        both, one, two = (self.clean.activations, other.clean.activations), self.corrupted, other.corrupted
        prompts = Prompts(
            [*one.ids, *two.ids], [*one.targets, *two.targets], [*one.clusters, *two.clusters], [*one.right, *two.right]
        )
        return _Trials(replace(self.clean, activations=torch.cat(both)), prompts)


def snapshot_of_draw(work: Work, number: int) -> Snapshot:
    """The trials of a draw: the frozen ones, or those of its seed."""
    if number == 0:
        return work.read(TRIALS)
    assert work.relation
    settings = replace(work.settings, seed=draw_seeds(work.settings)[number])
    _, document = draw(work.relation, settings, work.model.tokens, csv_sha256=work.csv_sha256)
    return snapshot_of(document, Path(f"draw {number} of {work.q_id}"), with_demos=True)


def _trials(work: Work, number: int) -> _Trials:
    from relfv.engine.clean import run_clean

    if number == 0:
        return _Trials(work.once(clean_run), work.once(corrupted_prompts))
    snapshot = snapshot_of_draw(work, number)
    clean = run_clean(work.model.backbone, work.tokenised(snapshot, clean=True))
    return _Trials(clean, work.tokenised(snapshot))


def _measure(work: Work, trials: _Trials) -> Draw:
    """Clean means, head sweep, heads and vector of some trials, as StepD and StepE make them."""
    settings, means = work.settings, mean_activations(trials.clean)
    heads, per_pass = heads_to_sweep(work.model, settings), work.trials_per_pass.get("stepD_cie")
    effects = head_effects(work.model, trials.corrupted, means, heads, trials_per_pass=per_pass)
    return draw_from(work.model, means, effects.effects.delta(measure_of(settings.score_key)), effects.heads, settings)


def all_draws(work: Work) -> Draws:
    """Every draw on every rung: what an earlier run has made of them is taken, and each is on disk as soon as it is
    made."""
    origin, n_all = made_from(work), work.settings.n_trials_per_q
    made = _made_before(work, origin)
    trials = lru_cache(maxsize=2)(lambda number: _trials(work, number))

    def keep(n_trials: int, number: int, of: Sequence[int]) -> None:
        if number in made.get(n_trials, {}):
            return
        if n_trials == n_all and number == 0:
            deltas = work.read(METRICS)
            one = draw_from(
                work.model,
                work.read(MEANS),
                deltas.of[measure_of(work.settings.score_key)],
                deltas.heads,
                work.settings,
            )
        else:
            some = trials(of[0]) if len(of) == 1 else trials(of[0]) + trials(of[1])
            one = _measure(work, some.first(n_trials))
        made.setdefault(n_trials, {})[number] = one
        work.write(SO_FAR, draws_bytes(made, origin))

    for number in range(work.settings.replicates):
        for n_trials in (*(n for n in FEWER if n < n_all), n_all):
            keep(n_trials, number, [number])
        if number % 2:
            keep(2 * n_all, number // 2, [number - 1, number])
    return made


def made_from(work: Work) -> str:
    """What the draws are made from; another means none of them may be taken."""
    files = work.folder.hashes([work.folder.path(file) for file in (TRIALS, MEANS, METRICS, TOP_HEADS)])
    settings = {name: getattr(work.settings, name) for name in IDENTITY}
    return json.dumps([files, settings, work.model_identity])


def _made_before(work: Work, wanted: str) -> Draws:
    made: Draws = {}
    for file in (DRAWS, SO_FAR):
        try:
            draws, origin = work.read(file)
        except RelfvError:  # not there, or damaged: it is made again
            continue
        if origin == wanted:
            made |= {n_trials: {**made.get(n_trials, {}), **some} for n_trials, some in draws.items()}
    return made
