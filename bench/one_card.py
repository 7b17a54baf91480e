"""Whole q_ids by several processes on one card: what one leaves of it while it writes, another computes on.

    python bench/one_card.py                                                 # on a GPU of 80 GB
    python bench/one_card.py --shapes demo=1,2 --device cpu --q_list Q1,Q2   # on any machine

Each row is a ``relfv run --per_card N`` of its own, every file written. Time counts from the first stage's beginning,
when all processes have the model open, to the last stage's end. The files are compared with those of the first row of
the shape: the same bytes, where q_ids were begun with as many trials a pass.
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

from pipeline import sampling_the_gpu
from shapes import NAMES, model_folder

MODELS = ("demo=1,2,4,8", "gpt2=1,2,4,8", "llama-3.1-8b=1,2,3")
COLUMNS = ("shape", "processes", "until open, s", "then to the end, s", "q_ids a second", "s a q_id", "GPU busy, %",
           "peak GiB of the card", "trials a pass", "files as in the first row")  # fmt: skip
Q_IDS = ",".join(f"Q{i}" for i in (*range(1, 14), 15))


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=MODELS, metavar="SHAPE=N,...", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--q_list", default=Q_IDS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random models between runs")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes:
            name, _, numbers = shape.partition("=")
            model, first = model_folder(name, args.work or Path(temporary)), None
            for n in map(int, numbers.split(",")):
                out = Path(temporary, name, str(n))
                first = first or out
                flags = ["--model", model, "--q_list", args.q_list, "--device", args.device, "--per_card", str(n)]
                print(f"| {name} | {n} | {row(out, first, flags)} |", flush=True)


def row(out: Path, first: Path, flags: list[str]) -> str:
    """Of a run into ``out``, whose files are compared with those of ``first``."""
    started = time.time()
    with sampling_the_gpu() as samples:
        subprocess.run([sys.executable, "-m", "relfv", "run", "--out_root", str(out), *flags], check=True)
    seconds, per_pass, times = [], set[str](), []
    for path in out.glob("*/*/artifacts/qid_status.json"):
        status = json.loads(path.read_text())
        per_pass.add(str(status["trials_per_pass"].get("stepD_cie")))
        stages = [[datetime.fromisoformat(record[key]) for key in ("started_at", "finished_at")]
                  for record in status["stages"].values()]  # fmt: skip
        seconds.append(sum((ended - begun).total_seconds() for begun, ended in stages))
        times += [at for both in stages for at in both]
    span = (max(times) - min(times)).total_seconds()
    during = [sample for sample in samples if min(times) <= sample[0] <= max(times)]
    busy = f"{statistics.mean(share for _, share, _ in during):.0f}" if during else ""
    peak = f"{max(held for *_, held in during) / 2**30:.1f}" if during else ""
    found = digests(out)
    differ = [name for name, value in digests(first).items() if found.get(name) != value]
    same = "yes" if not differ else f"{len(differ)} differ, such as {differ[0]}"
    return (f"{min(times).timestamp() - started:.1f} | {span:.1f} | {len(seconds) / span:.2f} | "
            f"{statistics.mean(seconds):.2f} | {busy} | {peak} | {', '.join(sorted(per_pass))} | {same}")  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """Of every artifact but the statuses, which hold times."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.glob("*/*/artifacts/**/*")
        if path.is_file() and path.name != "qid_status.json"
    }


if __name__ == "__main__":
    main()
