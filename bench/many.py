"""Thousands of q_ids: do time a q_id, memory or open files grow with their number, and how long do a restart, ``relfv
status`` and ``relfv report`` take?

    python bench/many.py --n 2000           # a tiny random model: what is measured is everything around it
    python bench/many.py --n 10000 --run 20 # 20 are run; the others are copies of them, each with a status of its own

Time is this process's processor time, which others on the machine do not add to. Linux: memory and open files are read
from /proc.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
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
from relfv.store.status import read_status

SETTINGS = [
    *("--topk", "4", "--n_trials_per_q", "10", "--n_eval", "10", "--n_demos", "5", "--extras", "none"),
]  # fmt: skip
PART = 100


def tiny_model(folder: Path) -> None:
    """Two layers of four heads."""
    llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder)
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
    parser.add_argument("--run", type=int, default=None, help="how many of them are run, if not all")
    parser.add_argument("--work", type=Path, default=None, help="keeps the results")
    args = parser.parse_args()
    run = args.run or args.n
    sampler = Sampler()
    logging.getLogger("relfv.runs.worker").addHandler(sampler)
    with tempfile.TemporaryDirectory() as temporary:
        here = args.work or Path(temporary)
        out = here / "out"
        tiny_model(here / "model")
        many(args.n, here / "many.csv", different=run)
        command = ["run", "--model", str(here / "model"), "--relation_csv_path", str(here / "many.csv"), *SETTINGS]
        command += ["--out_root", str(out)]
        began = time.process_time()
        if code := relfv([*command, "--q_list", ",".join(f"R{i}" for i in range(run))]):
            raise SystemExit(code)
        took = time.process_time() - began
        print("| q_ids | CPU s a q_id, mean | median | resident MiB | open files |\n|---|---|---|---|---|")
        for first in range(0, len(sampler.samples), PART):
            part = sampler.samples[first : first + PART]
            seconds = [sample.seconds for sample in part]
            of_part = f"{statistics.mean(seconds):.3f} | {statistics.median(seconds):.3f} | {part[-1].resident_mib:.0f}"
            print(f"| {first + 1} to {first + len(part)} | {of_part} | {part[-1].open_files} |")
        print(f"\n{took:.0f} s in all, {took - sum(s.seconds for s in sampler.samples):.0f} s before and after them\n")
        copy_others(out / "many", args.n, run)
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
