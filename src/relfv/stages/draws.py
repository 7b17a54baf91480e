"""Independent draws of a relation's trials, and what each gives.

Draw i is what ``--seed <seed + i>`` draws; draw 0 is the run's own, as it was frozen, with its own effects. A draw's
first 5 and 10 trials, and two draws together, have clean means and a head sweep of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from relfv.settings import MAX_SEED, Settings
from relfv.stages.cie import corrupted_prompts
from relfv.stages.means import clean_run
from relfv.stages.measured import Kept, Measured, measure, own
from relfv.stages.snapshot import snapshot_of
from relfv.stages.stage import Work
from relfv.stages.trials import TRIALS, draw
from relfv.types import Prompts, Snapshot

if TYPE_CHECKING:
    from relfv.engine.clean import CleanRun

FEWER = (5, 10)
"""Numbers of trials: so many first trials of a draw are measured by themselves, too."""


def draw_seeds(settings: Settings) -> list[int]:
    """The seed of each draw; the first is the run's own."""
    return [(settings.seed + i) % (MAX_SEED + 1) for i in range(settings.replicates)]


def snapshot_of_draw(work: Work, number: int) -> Snapshot:
    """The trials of a draw: the frozen ones, or those of its seed."""
    if number == 0:
        return work.read(TRIALS)
    assert work.relation
    settings = replace(work.settings, seed=draw_seeds(work.settings)[number])
    _, document = draw(work.relation, settings, work.model.tokens, csv_sha256=work.csv_sha256)
    return snapshot_of(document, Path(f"draw {number} of {work.q_id}"), with_demos=True)


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


def _trials(work: Work, number: int) -> _Trials:
    from relfv.engine.clean import run_clean

    if number == 0:
        return _Trials(work.once(clean_run), work.once(corrupted_prompts))
    snapshot = snapshot_of_draw(work, number)
    clean = run_clean(work.model.backbone, work.tokenised(snapshot, clean=True))
    return _Trials(clean, work.tokenised(snapshot))


def all_draws(work: Work, kept: Kept) -> dict[int, list[Measured]]:
    """Number of trials -> what each draw of so many gives; for twice the trials of a draw, what each two draws give."""
    n_all = work.settings.n_trials_per_q
    trials = lru_cache(maxsize=2)(lambda number: _trials(work, number))

    def of(some: _Trials) -> Measured:
        return measure(work, some.clean, some.corrupted)

    draws: dict[int, list[Measured]] = {n: [] for n in (*(n for n in FEWER if n < n_all), n_all, 2 * n_all)}
    for i in range(work.settings.replicates):
        for n, made in draws.items():
            if n == n_all and i == 0:
                made.append(kept.take(draw_name(n, i), lambda: own(work)))
            elif n <= n_all:
                made.append(kept.take(draw_name(n, i), lambda n=n, i=i: of(trials(i).first(n))))
            elif i % 2:
                made.append(kept.take(draw_name(n, i // 2), lambda i=i: of(trials(i - 1) + trials(i))))
    return draws


def prompts_swept(settings: Settings) -> int:
    """Number of prompts swept for all draws together; draw 0 whole has been swept before."""
    n_all, n_draws = settings.n_trials_per_q, settings.replicates
    fewer = sum(n for n in FEWER if n < n_all)
    return n_draws * fewer + (n_draws - 1) * n_all + n_draws // 2 * 2 * n_all


def draw_name(n_trials: int, number: int) -> str:
    """Name of a draw, or of two together, in draws.safetensors."""
    return f"{n_trials}.{number}"
