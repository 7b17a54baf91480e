"""Thousands of q_ids: do time a q_id, memory or open files grow with their number, and how long do a restart, ``relfv
status`` and ``relfv report`` take?

    python bench/many.py --n 2000           # a tiny random model: what is measured is everything around it
    python bench/many.py --n 10000 --run 20 # 20 are run; the others are copies of them, each with a status of its own
    python bench/many.py --n 10000 --workers 14  # all are run, by so many processes on one folder; OMP_NUM_THREADS=1

CPU s are this process's processor time, which others on the machine do not add to; with workers it only hands out q_ids
and writes page and tables. Linux: memory and open files are read from /proc.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import PLACES, WORDS, llama, make_tokenizer
from long_run import Sampler
from relfv.cli import main as relfv
from relfv.store.files import entries_below
from relfv.store.status import read_status
from relfv.store.statuses import statuses_in

SETTINGS = [
    *("--topk", "4", "--n_trials_per_q", "10", "--n_eval", "10", "--n_demos", "5", "--extras", "none"),
]  # fmt: skip


class Parts(Sampler):
    """Prints a row for each part of the run as soon as it is over."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.size, self._began = max(100, n // 10), 0.0
        print("| q_ids | a second | CPU s a q_id, mean | median | resident MiB | open files | largest worker MiB |")
        print("|---|---|---|---|---|---|---|", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Logging's hook."""
        n = len(self.samples)
        super().emit(record)
        if len(self.samples) == 1 > n:
            self._began = time.monotonic()
        elif len(self.samples) % self.size == 0 and len(self.samples) > n:
            self.row()

    def row(self) -> None:
        """Of what ended since the last one."""
        now, n = time.monotonic(), len(self.samples)
        part = self.samples[(n - 1) // self.size * self.size :]
        seconds = [sample.seconds for sample in part]
        cells = [f"{len(part) / (now - self._began):.2f}", f"{statistics.mean(seconds):.3f}"]
        cells += [f"{statistics.median(seconds):.3f}", f"{part[-1].resident_mib:.0f}", str(part[-1].open_files)]
        print(f"| {n - len(part) + 1} to {n} | {' | '.join(cells)} | {largest_worker_mib():.0f} |", flush=True)
        self._began = now


def largest_worker_mib() -> float:
    """Resident memory of the largest process that this one started, 0 if there is none."""
    sizes = [0.0]
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with suppress(OSError):  # it has ended
                pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return max(sizes)


def tiny_model(folder: Path) -> None:
    """Two layers of four heads."""
    model = llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model.save_pretrained(folder)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)


def many(n: int, path: Path, *, different: int) -> None:
    """A CSV of ``n`` q_ids of 12 pairs each, of which so many are ``different``."""
    chosen = random.Random(0)
    pairs = [chosen.sample(WORDS + PLACES, 12) for _ in range(different)]
    rows = [(i, *pair) for i in range(n) for pair in pairs[i % different]]
    path.write_text("id,ex_A,ex_B\n" + "".join(f"R{i},{a},{b}\n" for i, a, b in rows), encoding="utf-8")


def copy_others(folder: Path, n: int, run: int) -> None:
    """Finished q_ids R<run> to R<n - 1> beside the first ``run``: copies of their files under their own names, and a
    status that says so. Their rows are the same, so their fingerprints are."""
    for i in range(run, n):
        first, own = f"R{i % run}", f"R{i}"
        artifacts = Path(shutil.copytree(folder / first, folder / own)) / "artifacts"
        status = read_status(artifacts)
        assert status
        status.q_id = own
        for path in [*artifacts.rglob(f"*_{first}[._]*")]:
            path.rename(path.with_name(path.name.replace(first, own)))
        for record in status.stages.values():
            record.files = {name.replace(f"_{first}", f"_{own}"): digest for name, digest in record.files.items()}
            record.inputs = {name.replace(f"_{first}", f"_{own}"): digest for name, digest in record.inputs.items()}
        status.write()


def timed(name: str, arguments: list[str], times: int = 2) -> None:
    """Print what a command takes, twice, since the first may write something; what it prints itself is dropped."""
    cells = []
    for _ in range(times):
        began, wall = time.process_time(), time.monotonic()
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            code = relfv(arguments)
        if code:
            raise SystemExit(code)
        cells.append(f"{time.process_time() - began:.1f} ({time.monotonic() - wall:.1f})")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def size_of(folder: Path) -> tuple[int, int]:
    """Number of files in it, and bytes of all."""
    sizes = [entry.stat().st_size for entry in entries_below(folder) if entry.is_file()]
    return len(sizes), sum(sizes)


def main() -> None:
    """Parse, run, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="how many q_ids (default: %(default)s)")
    parser.add_argument("--run", type=int, default=None, help="how many of them are run, if not all")
    parser.add_argument("--workers", type=int, default=1, help="processes that run them (default: this one)")
    parser.add_argument("--seconds", type=float, default=None, help="the run is interrupted then; what is done counts")
    parser.add_argument("--work", type=Path, default=None, help="keeps the results")
    args = parser.parse_args()
    run = args.run or args.n
    with tempfile.TemporaryDirectory() as temporary:
        here = args.work or Path(temporary)
        out = here / "out"
        tiny_model(here / "model")
        many(args.n, here / "many.csv", different=run)
        command = ["run", "--model", str(here / "model"), "--relation_csv_path", str(here / "many.csv"), *SETTINGS]
        command += ["--out_root", str(out)]
        shared = ["--devices", ",".join(["cpu"] * args.workers)] if args.workers > 1 else []
        sampler = Parts(run)
        logging.getLogger("relfv.runs.worker").addHandler(sampler)
        began, wall = time.process_time(), time.monotonic()
        timer = threading.Timer(args.seconds or threading.TIMEOUT_MAX, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
        code = relfv([*command, *shared, "--q_list", ",".join(f"R{i}" for i in range(run))])
        timer.cancel()
        if len(sampler.samples) % sampler.size:
            sampler.row()
        if code and not (args.seconds and time.monotonic() - wall > args.seconds):
            raise SystemExit(code)
        took = time.process_time() - began
        print(f"\n{len(sampler.samples)} of {run} q_ids in {time.monotonic() - wall:.0f} s; {took:.0f} CPU s, of which")
        print(f"{took - sum(s.seconds for s in sampler.samples):.0f} before and after them\n", flush=True)
        if code:
            done = [status.q_id for status in statuses_in(out / "many") if status.status == "completed"]
            command += ["--q_list", ",".join(done)]
        else:
            copy_others(out / "many", args.n, run)
        print("| command | CPU s (wall) | again |\n|---|---|---|")
        timed("run, all finished", [*command, *shared])
        timed("status", ["status", str(out)])
        timed("report", ["report", str(out / "many")])
        timed("verify of one", ["verify", str(out / "many/R1")], 1)
        n_files, n_bytes = size_of(out / "many")
        page, tables = (out / "many/report/index.html").stat().st_size, size_of(out / "many/tables")[1]
        print(f"\n{n_files} files and {n_bytes / 1e6:.0f} MB, of which the page {page / 1e6:.1f} and tables", end=" ")
        print(f"{tables / 1e6:.1f} MB; of a q_id {size_of(out / 'many/R1')}")


if __name__ == "__main__":
    main()
