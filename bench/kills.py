"""q_ids that several processes share, with processes killed in the middle, again and again.

    python bench/kills.py --way ray --tries 10     # three workers on a local Ray cluster of three nodes
    python bench/kills.py --way runs --tries 10    # four identical commands on one folder, as a Slurm array has them

Each try is a new folder of 12 q_ids on a tiny random model. At a random moment a process that is at a q_id gets
SIGKILL; with Ray a node is taken away later, raylet and workers, without warning, and without Ray the command is called
once more at the end. What counts: the exit code, q_ids completed, and whether every file but logs and statuses has the
bytes of a run by one process.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from many import SETTINGS, many, tiny_model
from relfv.cli import main as relfv
from relfv.store.locks import held_by
from relfv.store.status import read_status

N_QIDS = 12


def digests(folder: Path) -> dict[str, bytes]:
    """Every file of the q_ids but logs and statuses, which have times."""
    paths = [path for path in sorted(folder.glob("*/artifacts/**/*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "qid_status.json"}


def at_work(folder: Path) -> list[int]:
    """Numbers of the processes that hold a q_id."""
    locks = [path for path in folder.glob(".locks/*.lock") if not path.name.startswith(".")]
    holders = [holder for path in locks if (holder := held_by(path))]
    return [int(holder.split()[1]) for holder in holders if holder.split()[1].isdecimal()]


def busy(folder: Path) -> list[int]:
    """``at_work``, once other processes than this one are."""
    while not (found := [process for process in at_work(folder) if process != os.getpid()]):
        time.sleep(0.02)
    return found


def kill_one(folder: Path) -> None:
    """A process that is at a q_id."""
    busy(folder)
    time.sleep(3 * random.random())
    os.kill(random.choice(busy(folder)), signal.SIGKILL)


@contextmanager
def on_ray() -> Iterator[Callable[[list[str], Path], int]]:
    """While open, runs a command into a folder by three workers, of which one is killed, and a node."""
    import ray  # type: ignore[import-not-found]
    from ray.cluster_utils import Cluster  # type: ignore[import-not-found]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def kill_two(folder: Path) -> None:
        kill_one(folder)
        time.sleep(1 + 2 * random.random())
        busy(folder)
        cluster.remove_node(nodes.pop(random.randrange(len(nodes))), allow_graceful=False)

    def run(command: list[str], out: Path) -> int:
        killer = threading.Thread(target=kill_two, args=[out / "many"])
        killer.start()
        on = ["--ray", cluster.address, "--gpus_per_worker", "0", "--workers", "3"]
        code = relfv([*command, "--out_root", str(out), *on])
        killer.join()
        nodes.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes()
        return code

    yield run
    ray.shutdown()
    cluster.shutdown()


@contextmanager
def by_four() -> Iterator[Callable[[list[str], Path], int]]:
    """While open, runs a command into a folder four times at once, of which one is killed, and then once more."""

    def run(command: list[str], out: Path) -> int:
        whole = [sys.executable, "-m", "relfv", *command, "--out_root", str(out)]
        runs = [subprocess.Popen(whole, stderr=subprocess.DEVNULL) for _ in range(4)]
        kill_one(out / "many")
        codes = sorted(one.wait() for one in runs)
        if codes != [-signal.SIGKILL, 0, 0, 0]:
            raise SystemExit(f"the four ended with {codes}")
        return subprocess.run(whole, stderr=subprocess.DEVNULL, check=False).returncode

    yield run


WAYS = {"ray": on_ray, "runs": by_four}


def main() -> None:
    """Parse, run, print a row a try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="ray")
    parser.add_argument("--tries", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, WAYS[args.way]() as run:
        here = Path(temporary)
        tiny_model(here / "model")
        many(N_QIDS, here / "many.csv", different=N_QIDS)
        command = ["run", "--model", str(here / "model"), "--relation_csv_path", str(here / "many.csv"), *SETTINGS]
        assert relfv([*command, "--out_root", str(here / "alone")]) == 0
        alone = digests(here / "alone/many")
        print("| try | exit code | q_ids completed | same bytes | seconds |\n|---|---|---|---|---|", flush=True)
        for number in range(1, args.tries + 1):
            out, began = here / f"try{number}", time.monotonic()
            code = run(command, out)
            seconds = time.monotonic() - began
            statuses = [read_status(path) for path in out.glob("many/*/artifacts")]
            done = sum(status is not None and status.status == "completed" for status in statuses)
            same = digests(out / "many") == alone
            print(f"| {number} | {code} | {done} of {N_QIDS} | {same} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
