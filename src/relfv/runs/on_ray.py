"""``relfv run --ray``: run the q_ids on a Ray cluster, with an actor that has its own opened model for each worker.

Ray places the actors, starts them elsewhere, and says when one has died. Each is a ``Worker`` that writes into the
results folder, which all nodes share; a q_id is locked by whoever works on it, and what a dead one has finished is on
disk, recorded by its hashes, so that another goes on from there. Ray's own retries of a task are left off: they may
return to the node that has just killed it. Here a q_id goes to another node, and so does the worker, if there is one.
"""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.errors import InputError, RelfvError, RunError, in_words
from relfv.progress import at_work
from relfv.runs.plan import OnRay, RunPlan
from relfv.runs.qid import its_own_trouble
from relfv.runs.ray_worker import RayWorker
from relfv.runs.worker import say_outcome

log = logging.getLogger(__name__)

_TRIES = 2
"""Number of nodes that may fail a q_id, or die at it, before it is given up; also the number of deaths on a node after
which no worker starts there."""
_PATIENCE_S = 10.0
"""Seconds to wait for a lock whose process has been ended."""


@dataclass(eq=False)
class _Member:
    """A worker on the cluster, as this process sees it."""

    actor: Any
    at: tuple[str, str] | None = None
    """Node of the worker: Ray's name, and one for people."""
    is_open: bool = False
    q_id: str | None = None
    """The q_id that the worker is at; None if it is idle."""
    ref: Any = None
    """Ray's reference to the answer that the worker owes."""
    since: float = field(default_factory=time.monotonic)

    def ask(self, method: str, *values: Any) -> None:
        """Call a method of the actor; the answer comes later."""
        self.ref, self.since = getattr(self.actor, method).remote(*values), time.monotonic()

    @property
    def place(self) -> str:
        """Name of the node, in words."""
        return f"node {self.at[1]} ({self.at[0][:8]})" if self.at else "a node"


class RayCrew:
    """The workers on the cluster; made with the model open in the first of them."""

    def __init__(self, plan: RunPlan, on_ray: OnRay) -> None:
        """Connect and start the workers. Raises InputError where Ray or its cluster is missing, RelfvError if the model
        cannot be opened anywhere."""
        self._plan, self._on = plan, on_ray
        self._members: list[_Member] = []
        self._deaths = Counter[str]()
        """Number of workers that have died, by node."""
        self._ray, self._is_ours = _connected(on_ray.address)
        self._mark = plan.folder.absolute() / ".locks" / f".ray-{secrets.token_hex(4)}"
        try:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
            self._shared = self._ray.put(plan)
            with at_work(f"opening {plan.request.settings.model}", "on the first node of the Ray cluster"):
                for _ in range(on_ray.workers or self._as_many_as_fit()):
                    self._start_one()
                self.description = self._first_opened()
        except BaseException:
            self.close()
            raise

    def outcomes(self, q_ids: Sequence[str]) -> Generator[tuple[str, str]]:
        """Run all of ``q_ids``. Yields each with how it ended, as they end."""
        waiting, left = deque(q_ids), dict.fromkeys(q_ids)
        tried: dict[str, list[str]] = defaultdict(list)
        with at_work("run", "", unit="q_ids") as task:
            task.total = len(q_ids)
            self._hand_out(waiting, tried)
            for member, answer, problem in self._heard():
                q_id, member.q_id = member.q_id, None
                outcome = self._outcome(member, answer, problem, q_id)
                if q_id and outcome != "completed" and self._is_to_try_again(member, q_id, outcome, tried):
                    waiting.append(q_id)
                elif q_id:
                    outcome = outcome or "failed"
                    say_outcome(self._plan, q_id, outcome, time.monotonic() - member.since)
                    del left[q_id]
                    task.done += 1
                    yield q_id, outcome
                if not left:
                    return
                self._hand_out(waiting, tried)
        log.error("no worker is left: %d q_ids were not run", len(left))
        yield from ((q_id, "failed") for q_id in left)

    def close(self) -> None:
        """End all workers. The status of a q_id that one was at says that the same command goes on."""
        stopped = [member.q_id for member in self._members if member.q_id]
        for member in self._members:
            self._ray.kill(member.actor)
        self._members = []
        for q_id in stopped:
            self._record_interrupted(q_id)
        self._mark.unlink(missing_ok=True)
        if self._is_ours:
            self._is_ours = False
            self._ray.shutdown()

    def _record_interrupted(self, q_id: str) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        with its_own_trouble(q_id, set()):
            while time.monotonic() < give_up:
                with self._plan.locked(q_id) as holder:
                    if holder is None:
                        status = self._plan.status_with_results(q_id)
                        if status and status.status == "running":
                            status.set("pending", "interrupted; the same command goes on from here")
                        return

    # --- workers -----------------------------------------------------------------------------------------------------

    def _as_many_as_fit(self) -> int:
        gpus, there = self._on.gpus_per_worker, self._ray.cluster_resources()
        return max(1, int(there.get("GPU", 0) / gpus if gpus else there.get("CPU", 1)))

    def _start_one(self) -> None:
        """Start a worker where Ray finds room, but not on nodes where one has died, if there are others."""
        need = ("GPU", self._on.gpus_per_worker) if self._on.gpus_per_worker else ("CPU", 1)
        nodes = {n["NodeID"] for n in self._ray.nodes() if n["Alive"] and n["Resources"].get(need[0], 0) >= need[1]}
        sick = {node for node in nodes if self._deaths[node]}
        if sick == nodes:
            sick = {node for node in nodes if self._deaths[node] >= _TRIES}
        if nodes and sick == nodes:
            log.error("no worker is started in its place: workers have died on every node")
            return
        only = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(sick))})"}} if sick else {}
        options = {"num_cpus": 1, "num_gpus": self._on.gpus_per_worker, "max_restarts": 0, "max_task_retries": 0}
        values = (self._shared, __version__, str(Path.cwd()), str(self._mark))
        member = _Member(self._ray.remote(RayWorker).options(**options, **only).remote(*values))
        member.ask("node")
        self._members.append(member)

    def _first_opened(self) -> dict[str, Any]:
        """Wait until a worker has the model open. -> the model's description. Raises the error that kept the last
        worker from it."""
        last: RelfvError | None = None
        for member, answer, problem in self._heard():
            if problem is not None:
                last = _as_ours(problem)
                self._lost(member, problem)
            elif self._is_now_open(member, answer):
                return answer
        raise last or RunError("--ray: no worker could be started")

    def _is_now_open(self, member: _Member, answer: Any) -> bool:
        """Take one of a worker's first two answers: where it is, and that its model is open. -> whether it is now
        open."""
        if member.at is None:
            member.at = answer
            member.ask("open")
            return False
        log.info("a worker has opened %s on %s", self._plan.request.settings.model, member.place)
        member.is_open = True
        return True

    def _lost(self, member: _Member, problem: BaseException) -> None:
        """Replace a worker that has died, or could not open the model: another starts, elsewhere if that is
        possible."""
        at = f" while it was at {member.q_id}" if member.q_id else ""
        log.warning("a worker on %s is lost%s: %s", member.place, at, _as_ours(problem))
        self._members.remove(member)
        with suppress(Exception):  # a worker that is unreachable or has no model must not keep its place
            self._ray.kill(member.actor)
        if member.at:
            self._deaths[member.at[0]] += 1
        self._start_one()

    # --- q_ids -------------------------------------------------------------------------------------------------------

    def _hand_out(self, waiting: deque[str], tried: dict[str, list[str]]) -> None:
        """Give idle workers the next q_id that their node has not failed, unless no other node is there."""
        nodes = {member.at[0] for member in self._members if member.is_open and member.at}
        for member in self._members:
            if not member.is_open or member.ref is not None or member.at is None:
                continue
            node = member.at[0]
            fitting = (q for q in waiting if node not in tried[q] or not nodes.difference(tried[q]))
            if (q_id := next(fitting, None)) is not None:
                waiting.remove(q_id)
                member.q_id = q_id
                member.ask("run", q_id)

    def _outcome(self, member: _Member, answer: Any, problem: BaseException | None, q_id: str | None) -> str | None:
        """How a worker's q_id ended; None where it did not, or where the answer was about something else."""
        if problem is not None:
            member.q_id = q_id
            self._lost(member, problem)
            return None
        if q_id is None:
            self._is_now_open(member, answer)
            return None
        outcome, lines = answer
        for level, line in lines:
            log.log(level, "%s: %s", member.place, line)
        return outcome

    def _is_to_try_again(self, member: _Member, q_id: str, outcome: str | None, tried: dict[str, list[str]]) -> bool:
        """Whether a q_id is tried again: after a death, or a failure where another node may do better, since a sick
        card fails whatever it is given."""
        if outcome not in (None, "failed"):
            return False
        tried[q_id].append(member.at[0] if member.at else "")
        elsewhere = any(m.at and m.at[0] not in tried[q_id] for m in self._members)
        return len(tried[q_id]) < _TRIES and (outcome is None or elsewhere)

    def _heard(self) -> Iterator[tuple[_Member, Any, BaseException | None]]:
        """Yield answers as they come, or the error in place of one; ends when none is owed."""
        while owed := {member.ref: member for member in self._members if member.ref is not None}:
            # Wait one second at a time: signals are raised between two calls.
            for ref in self._ray.wait([*owed], num_returns=1, timeout=1.0)[0]:
                member = owed[ref]
                member.ref = None
                try:
                    answer, problem = self._ray.get(ref), None
                except self._ray.exceptions.RayError as raised:
                    answer, problem = None, raised
                yield member, answer, problem


def _as_ours(problem: BaseException) -> RelfvError:
    """Turn an exception that Ray raised into a RelfvError of one line."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, RelfvError):
        return cause
    if isinstance(cause, Exception):
        return RunError(in_words(cause))
    return RunError(f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}")


def _connected(address: str) -> tuple[Any, bool]:
    """Connect to the cluster. -> Ray, and whether the connection was made here. Raises InputError."""
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("--ray: Ray is not installed; run: pip install 'relfv[ray]'") from None
    if ray.is_initialized():
        return ray, False
    try:
        with _own_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as problem:
        said = " ".join(str(problem).split())[:200]
        raise InputError(
            f"--ray {address}: no cluster there ({said}); start one with 'ray start --head', or use --ray local for "
            "one of this machine alone"
        ) from None
    return ray, True


@contextmanager
def _own_handlers() -> Iterator[None]:
    """While Ray is started, keep this run's own SIGTERM handler, which Ray would replace."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
