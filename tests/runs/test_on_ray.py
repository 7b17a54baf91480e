"""``relfv run --ray`` on a real cluster of three nodes, all on this machine."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from folders import arguments, contents, status
from relfv.cli import main
from relfv.store.locks import held_by

N_QIDS = 8
SMALL = ("--n_trials_per_q", "5", "--n_eval", "5", "--n_demos", "3", "--extras", "none")


def test_without_ray_one_line_says_what_to_install(
    llama_path: Path,
    csv_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*arguments(llama_path, csv_path, tmp_path), "--ray"]) == 2
    assert "--ray: Ray is not installed; run: pip install 'relfv[ray]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def at_work(folder: Path) -> list[int]:
    """The worker processes that hold a q_id, once some do."""
    while True:
        locks = [path for path in folder.glob(".locks/*.lock") if not path.name.startswith(".")]
        found = [int(holder.split()[1]) for path in locks if (holder := held_by(path)) and holder.startswith("process")]
        if workers := [process for process in found if process != os.getpid()]:
            return workers
        time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_and_a_node_die_and_every_q_id_is_completed_with_the_bytes_of_one_alone(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray", reason="relfv[ray] is not installed")
    from ray.cluster_utils import Cluster

    many = tmp_path / "many.csv"
    pairs = [line.split(",", 1)[1] for line in csv_path.read_text().splitlines()[1:] if line.startswith("A1,")]
    many.write_text("id,ex_A,ex_B\n" + "".join(f"Q{i},{pair}\n" for i in range(N_QIDS) for pair in pairs))
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert main(arguments(llama_path, many, alone, *SMALL)) == 0
    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:

        def kill_two() -> None:
            os.kill(at_work(out / "many")[0], signal.SIGKILL)
            time.sleep(random.random())
            at_work(out / "many")
            cluster.remove_node(nodes[0], allow_graceful=False)

        killer = threading.Thread(target=kill_two)
        killer.start()
        on = ("--ray", cluster.address, "--gpus_per_worker", "0", "--workers", "3")
        assert main(arguments(llama_path, many, out, *SMALL, *on)) == 0
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray leaves its own to the tests after this one
    assert "is lost while it was at Q" in capsys.readouterr().err
    for q_id in (f"Q{i}" for i in range(N_QIDS)):
        assert status(out / "many", q_id)["status"] == "completed"
        assert contents(out / f"many/{q_id}/artifacts") == contents(alone / f"many/{q_id}/artifacts")
    assert not list((out / "many/.locks").glob(".ray-*"))
