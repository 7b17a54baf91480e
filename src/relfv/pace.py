"""Estimate of how long the rest of a run will take: from the stages that have been timed, and before those from their
usual shares of a q_id's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from relfv.progress import at_hand, duration

_LEAST_SHARE = 0.03
"""Share of a q_id's usual time that must have passed before the time left is estimated."""
_MANY_TIMES = 4.0
"""How many times as long as its share has it a stage may take in the first q_id and still be counted."""


class Pace:
    """Progress of a run: which q_id of how many is running, and the time that each stage took."""

    def __init__(self, total: int, shares: Mapping[str, float] | None = None) -> None:
        """``total`` is the number of q_ids; ``shares`` has, for each stage in order, the share of a q_id's time it
        usually takes."""
        self._total, self._done, self._waiting = total, 0, total
        self._shares = dict(shares or {"": 1.0})
        self._took: dict[str, tuple[float, int]] = {}
        """Stage -> (its seconds summed over the q_ids before this one, number of these q_ids that ran it). Sums are
        kept so that with 10,000 q_ids no list is added up for every line of a log."""
        self._of_this: dict[str, float] = {}
        self._stage: str | None = None
        self._started = self._stage_started = time.monotonic()

    def begin(self) -> None:
        """Note that a q_id starts."""
        self._of_this, self._stage = {}, None
        self._started = time.monotonic()
        self._waiting = max(0, self._waiting - 1)

    def begin_stage(self, name: str) -> float | None:
        """Note that the present q_id comes to a stage, or to another layer of it. -> mean seconds that the stage took
        in earlier q_ids, None where there is none."""
        if name != self._stage:
            self._end_stage()
            self._stage, self._stage_started = name, time.monotonic()
        return self._mean(name) if name in self._took else None

    def end(self, waiting: Callable[[], int] | None = None) -> None:
        """Note that the present q_id ended. If another run took it, it says nothing of the pace, and ``waiting`` counts
        the q_ids that are left for this run."""
        was_run = self._stage is not None
        self._end_stage()
        for name, seconds in self._of_this.items():
            total, count = self._took.get(name, (0.0, 0))
            self._took[name] = total + seconds, count + 1
        self._done, self._of_this = self._done + 1, {}
        if waiting and not was_run:
            self._waiting = waiting()

    def seconds(self) -> float:
        """How long the present q_id has been running."""
        return time.monotonic() - self._started

    def heading(self) -> str:
        """Beginning of a log line, such as ``[2/28, 14 min left] ``."""
        left = self.left()
        said = "" if left is None else f", {duration(left)} left"
        return f"[{min(self._done + 1, self._total)}/{self._total}{said}] "

    def left(self) -> float | None:
        """Seconds for the rest of this q_id and the waiting ones; None before there is an estimate, and at the end."""
        usual = self._usual()
        if usual is None or self._done >= self._total:
            return None
        rest = 0.0
        if self._stage is not None:
            order = list(usual)
            here = usual.get(self._stage, 0.0) - (time.monotonic() - self._stage_started)
            after = order[order.index(self._stage) + 1 :] if self._stage in order else []
            rest = max(0.0, here) + sum(usual[name] for name in after)
        return rest + self._waiting * sum(usual.values())

    def _usual(self) -> dict[str, float] | None:
        """Seconds a q_id needs for each stage: as timed, else from its share and the time of what is behind. Studies,
        which have no usual share, come last, and are known once they were timed."""
        timed = {**self._of_this, **{name: self._mean(name) for name in self._took}}
        studies = {name: seconds for name, seconds in timed.items() if name not in self._shares}
        behind = {name: (share, timed[name]) for name, share in self._shares.items() if name in timed}
        if self._stage in self._shares and self._stage not in timed and (task := at_hand()) and task.total:
            counted = task.done / task.total
            behind[self._stage] = counted * self._shares[self._stage], time.monotonic() - self._stage_started
        if not self._took:
            behind = _without_first_uses(behind)
            timed = {name: seconds for name, seconds in timed.items() if name in behind}
        share, seconds = (sum(column) for column in zip(*behind.values(), strict=True)) if behind else (0.0, 0.0)
        if share < _LEAST_SHARE and not self._took:
            return None
        usual = {name: timed.get(name, part * seconds / share if share else 0.0) for name, part in self._shares.items()}
        if self._stage in behind and self._stage not in timed and behind[self._stage][0]:
            part, seconds = behind[self._stage]
            usual[self._stage] = seconds * self._shares[self._stage] / part
        return usual | studies

    def _mean(self, name: str) -> float:
        total, count = self._took[name]
        return total / count

    def _end_stage(self) -> None:
        if self._stage is not None:
            seconds = time.monotonic() - self._stage_started
            self._of_this[self._stage] = self._of_this.get(self._stage, 0.0) + seconds
        self._stage = None


def _without_first_uses(behind: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Stages, each with its share and seconds, without those that took many times as long for their share as the
    others: a library that is imported in the first q_id's heatmap says nothing of the q_ids to come."""
    rates = sorted((seconds / share, share) for share, seconds in behind.values() if share)
    half, so_far = sum(share for _, share in rates) / 2, 0.0
    for usual, share in rates:
        so_far += share
        if so_far >= half:
            return {name: of for name, of in behind.items() if of[1] <= _MANY_TIMES * usual * of[0]}
    return dict(behind)
