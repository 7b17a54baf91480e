"""Many q_ids in one process: do memory, open files or time grow with their number?

    python bench/long_run.py                # 200 q_ids on the demo model, several minutes

The q_ids are those of the demo's CSV with enough rows, again and again under new names, at the spec's settings. Linux:
memory and open files are read from /proc. Time is this process's processor time, which others on the machine do not add
to.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from relfv.cli import main as relfv
from relfv.settings import SPEC_CSV

PARTS = 8


@dataclass(frozen=True)
class Sample:
    """One q_id, just done."""

    seconds: float
    resident_mib: float
    open_files: int


class Sampler(logging.Handler):
    """Takes a sample each time a q_id is completed."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[Sample] = []
        self._since = time.process_time()

    def emit(self, record: logging.LogRecord) -> None:
        """Logging's hook."""
        if " completed in " not in record.getMessage():
            return
        now = time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.samples.append(Sample(now - self._since, resident, len(list(Path("/proc/self/fd").iterdir()))))
        self._since = now


def many(n: int, path: Path) -> None:
    """Write a CSV of ``n`` q_ids, the demo's over and over."""
    with Path(SPEC_CSV).open(encoding="utf-8", newline="") as file:
        rows: dict[str, list[list[str]]] = defaultdict(list)
        for q_id, *pair in list(csv.reader(file))[1:]:
            rows[q_id].append(pair[:2])
    relations = [pairs for pairs in rows.values() if len(pairs) >= 10]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "ex_A", "ex_B"])
        for i in range(n):
            writer.writerows([f"R{i}", *pair] for pair in relations[i % len(relations)])


def table(samples: list[Sample]) -> str:
    """A row for each eighth of the run."""
    size = len(samples) // PARTS
    lines = ["| q_ids | CPU s a q_id, median | resident MiB at the end | open files |", "|---|---|---|---|"]
    for first in range(0, size * PARTS, size):
        part = samples[first : first + size]
        seconds = statistics.median(sample.seconds for sample in part)
        last = part[-1]
        lines.append(f"| {first + 1} to {first + size} | {seconds:.2f} | {last.resident_mib:.0f} | {last.open_files} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="how many q_ids (default: %(default)s)")
    args = parser.parse_args()
    sampler = Sampler()
    logging.getLogger("relfv.runs.worker").addHandler(sampler)
    with tempfile.TemporaryDirectory() as temporary:
        csv_path = Path(temporary) / "many.csv"
        many(args.n, csv_path)
        code = relfv(["run", "--model", "demo", "--relation_csv_path", str(csv_path), "--out_root", f"{temporary}/out"])
    if code or len(sampler.samples) != args.n:
        raise SystemExit(code or f"{len(sampler.samples)} of {args.n} q_ids completed")
    print(table(sampler.samples))


if __name__ == "__main__":
    main()
