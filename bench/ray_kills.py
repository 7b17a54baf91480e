"""``relfv run --ray`` on a local cluster of three nodes, a worker and a node killed in the middle, again and again.

    python bench/ray_kills.py --tries 10

Each try is a new folder of 12 q_ids on a tiny random model, run by three CPU workers. At a random moment one that is at
a q_id gets SIGKILL, and later a node is taken away, raylet and workers, without warning. What
counts: the exit code, q_ids completed, and whether every file but logs and statuses has the bytes of a run without Ray.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


def kill_two(folder: Path, cluster: Any, nodes: list[Any]) -> None:
    """A worker, and a node."""
    busy(folder)
    time.sleep(3 * random.random())
    os.kill(random.choice(busy(folder)), signal.SIGKILL)
    time.sleep(1 + 2 * random.random())
    busy(folder)
    cluster.remove_node(nodes.pop(random.randrange(len(nodes))), allow_graceful=False)


def main() -> None:
    """Parse, run, print a row a try."""
    import ray
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        tiny_model(here / "model")
        many(N_QIDS, here / "many.csv")
        command = ["run", "--model", str(here / "model"), "--relation_csv_path", str(here / "many.csv"), *SETTINGS]
        assert relfv([*command, "--out_root", str(here / "alone")]) == 0
        alone = digests(here / "alone/many")
        print("| try | exit code | q_ids completed | same bytes | seconds |\n|---|---|---|---|---|", flush=True)
        for number in range(1, args.tries + 1):
            out = here / f"try{number}"
            killer = threading.Thread(target=kill_two, args=[out / "many", cluster, nodes])
            killer.start()
            began = time.monotonic()
            on = ["--ray", cluster.address, "--gpus_per_worker", "0", "--workers", "3"]
            code = relfv([*command, "--out_root", str(out), *on])
            seconds = time.monotonic() - began
            killer.join()
            found = digests(out / "many")
            statuses = [read_status(path) for path in out.glob("many/*/artifacts")]
            done = sum(status is not None and status.status == "completed" for status in statuses)
            print(f"| {number} | {code} | {done} of {N_QIDS} | {found == alone} | {seconds:.0f} |", flush=True)
            nodes.append(cluster.add_node(num_cpus=1))
            cluster.wait_for_nodes()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
