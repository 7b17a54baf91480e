"""Thousands of q_ids: do time a q_id, memory or open files grow with their number, and how long do a restart, ``relfv
status`` and ``relfv report`` take?

    python bench/many.py --n 2000           # a tiny random model: what is measured is everything around it

Time is this process's processor time, which others on the machine do not add to. Linux: memory and open files are read
from /proc.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import PLACES, WORDS, llama, make_tokenizer
from long_run import Sampler
from relfv.cli import main as relfv

SETTINGS = [
    *("--topk", "4", "--n_trials_per_q", "10", "--n_eval", "10", "--n_demos", "5", "--extras", "none"),
]  # fmt: skip
PART = 100


def tiny_model(folder: Path) -> None:
    """Two layers of four heads."""
    llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def many(n: int, path: Path) -> None:
    """A CSV of ``n`` q_ids of 12 pairs each."""
    chosen = random.Random(0)
    rows = [(i, *pair) for i in range(n) for pair in chosen.sample(WORDS + PLACES, 12)]
    path.write_text("id,ex_A,ex_B\n" + "".join(f"R{i},{a},{b}\n" for i, a, b in rows), encoding="utf-8")


def timed(name: str, arguments: list[str]) -> None:
    """Print what a command takes, twice, since the first may write something; what it prints itself is dropped."""
    took = []
    for _ in range(2):
        began = time.process_time()
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            code = relfv(arguments)
        if code:
            raise SystemExit(code)
        took.append(time.process_time() - began)
    print(f"| {name} | {took[0]:.1f} | {took[1]:.1f} |", flush=True)


def main() -> None:
    """Parse, run, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="how many q_ids (default: %(default)s)")
    args = parser.parse_args()
    sampler = Sampler()
    logging.getLogger("relfv.runs.worker").addHandler(sampler)
    with tempfile.TemporaryDirectory() as temporary:
        here, out = Path(temporary), Path(temporary) / "out"
        tiny_model(here / "model")
        many(args.n, here / "many.csv")
        command = ["run", "--model", str(here / "model"), "--relation_csv_path", str(here / "many.csv"), *SETTINGS]
        command += ["--out_root", str(out)]
        began = time.process_time()
        if code := relfv(command):
            raise SystemExit(code)
        took = time.process_time() - began
        print("| q_ids | CPU s a q_id, mean | median | resident MiB | open files |\n|---|---|---|---|---|")
        for first in range(0, len(sampler.samples), PART):
            part = sampler.samples[first : first + PART]
            seconds = [sample.seconds for sample in part]
            of_part = f"{statistics.mean(seconds):.3f} | {statistics.median(seconds):.3f} | {part[-1].resident_mib:.0f}"
            print(f"| {first + 1} to {first + len(part)} | {of_part} | {part[-1].open_files} |")
        print(f"\n{took:.0f} s in all, {took - sum(s.seconds for s in sampler.samples):.0f} s before and after them\n")
        print("| command | CPU s | again |\n|---|---|---|")
        timed("run, all finished", command)
        timed("status", ["status", str(out)])
        timed("report", ["report", str(out / "many")])
        files = [path for path in (out / "many/R1").rglob("*") if path.is_file()]
        sizes = sum(path.stat().st_size for path in files)
        page = (out / "many/report/index.html").stat().st_size
        print(f"\n{len(files)} files and {sizes / 1000:.0f} kB a q_id; the page {page / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
