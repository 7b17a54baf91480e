"""Whole q_ids by several processes on one card: what one leaves of it while it writes, another computes on.

    python bench/one_card.py --work /dev/shm                                 # on a GPU of 80 GB: about five minutes
    python bench/one_card.py --shapes demo=1,2 --device cpu --q_list Q1,Q2   # on any machine

Each row is a ``relfv run --per_card N`` of its own, every file written, and is printed when it ends; stderr has the
runs' logs. Time counts from the first stage's beginning, when all processes have the model open, to the last stage's
end; the pace "later" leaves out each process's first q_id, which pays for what a process does but once. The files are
compared with those of the first row of the shape: the same bytes, where q_ids were begun with as many trials a pass.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import sampling_the_gpu
from shapes import NAMES, model_folder

MODELS = ("llama-3.1-8b=1,2,3", "demo=1,2,4", "gpt2=1,2,4")
COLUMNS = ("shape", "processes", "until open, s", "then to the end, s", "q_ids a second", "later", "s a q_id",
           "GPU busy, %", "peak GiB of the card", "trials a pass", "files as in the first row")  # fmt: skip
Q_IDS = ",".join(f"Q{i}" for i in (*range(1, 14), 15))


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=MODELS, metavar="SHAPE=N,...", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--q_list", default=Q_IDS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random models between runs")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes:
            name, _, numbers = shape.partition("=")
            model, first = model_folder(name, args.work or Path(temporary)), dict[str, str]()
            for n in map(int, numbers.split(",")):
                out = Path(temporary, name, str(n))
                flags = ["--model", model, "--q_list", args.q_list, "--device", args.device, "--per_card", str(n)]
                print(f"| {name} | {n} | {row(out, n, flags, first)} |", flush=True)


def row(out: Path, n_processes: int, flags: list[str], first: dict[str, str]) -> str:
    """Of a run into ``out``, whose files are compared with ``first``, digests of those of the shape's first row; these
    are filled in where there are none yet."""
    started = time.time()
    with sampling_the_gpu() as samples:
        command = [sys.executable, "-m", "relfv", "run", "--out_root", str(out), *flags]
        done = subprocess.run(command, check=False)
    if done.returncode:
        return f"exit code {done.returncode}{' |' * (len(COLUMNS) - 3)}"
    spans, per_pass = [], set[str]()
    for path in out.glob("*/*/artifacts/qid_status.json"):
        status = json.loads(path.read_text())
        per_pass.add(str(status["trials_per_pass"].get("stepD_cie")))
        spans.append(span_of(status))
    begun, ends = min(start for start, _ in spans), sorted(end for _, end in spans)
    later = (ends[-1] - ends[n_processes - 1]).total_seconds() if ends[n_processes:] else 0.0
    during = [sample for sample in samples if begun <= sample[0] <= ends[-1]]
    found = digests(out)
    first.update({} if first else found)
    differ = sorted(name for name in first.keys() | found.keys() if first.get(name) != found.get(name))
    span = (ends[-1] - begun).total_seconds()
    return " | ".join((
        f"{begun.timestamp() - started:.1f}",
        f"{span:.1f}",
        f"{len(spans) / span:.2f}",
        f"{len(ends[n_processes:]) / later:.2f}" if later else "",
        f"{statistics.mean((end - start).total_seconds() for start, end in spans):.2f}",
        f"{statistics.mean(share for _, share, _ in during):.0f}" if during else "",
        f"{max(held for *_, held in during) / 2**30:.1f}" if during else "",
        ", ".join(sorted(per_pass)),
        f"{len(differ)} differ, such as {differ[0]}" if differ else f"yes, {len(found)}",
    ))  # fmt: skip


def span_of(status: dict[str, Any]) -> tuple[datetime, datetime]:
    """When the first stage of a q_id began and its last one ended."""
    started, finished = (
        [datetime.fromisoformat(stage[key]) for stage in status["stages"].values()]
        for key in ("started_at", "finished_at")
    )
    return min(started), max(finished)


def digests(out: Path) -> dict[str, str]:
    """Of every artifact but the statuses and logs, which hold times."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.glob("*/*/artifacts/**/*")
        if path.is_file() and path.name != "qid_status.json"
    }


if __name__ == "__main__":
    main()
