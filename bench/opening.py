"""How long a model takes to open, in processes of their own: the first pays for what a machine has not compiled yet,
and makes the self-check, whose finding the others take from the cache. Weights are read beside other work: "rest of
weights" is what is waited for after it.

python bench/opening.py --shape llama-3.1-8b     # on a GPU with 20 GB or more
python bench/opening.py --shape demo             # on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import NAMES, model_folder

CHILD = """
import json, sys, time
began = time.perf_counter()
from relfv.runs.qid import loading, open_for
from relfv.settings import Settings
settings = Settings(model=sys.argv[1], model_spec="auto", device=sys.argv[2], precision=sys.argv[3])
with loading(settings, settings.device):
    import torch, transformers
    libraries = time.perf_counter()
    import relfv.models.opening as opening, relfv.language_model as opened
imported = time.perf_counter()
parts = {}
def timed(module, name):
    original = getattr(module, name)
    def call(*args, **kwargs):
        started = time.perf_counter()
        found = original(*args, **kwargs)
        parts[name] = time.perf_counter() - started
        return found
    setattr(module, name, call)
timed(opening, "_load_weights")
timed(opened.Arithmetic, "with_kernels")
timed(opened, "remembered")
model = open_for(settings)
ended = time.perf_counter()
row = [libraries - began, imported - libraries, *parts.values(), ended - imported - sum(parts.values())]
print(json.dumps([*row, ended - imported, time.time() - float(sys.argv[4])]))
print(f"{model.engine.name}: {model.check.said}")
"""
COLUMNS = (
    "process", "import torch and transformers, s", "import relfv, s", "rest of weights, s", "kernels, s",
    "self-check, s", "rest of opening, s", "opening, s", "all, from the start of the process, s", "self-check",
)  # fmt: skip


def main() -> None:
    """Parse, open a few times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMES, default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("exact", "fast"), default="exact")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(args.shape, args.work or Path(temporary))
        environment = {**os.environ, "RELFV_CACHE": f"{temporary}/cache"}  # empty for the first process
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for number in range(1, args.times + 1):
            command = [sys.executable, "-c", CHILD, folder, args.device, args.precision, str(time.time())]
            child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            row, said = child.stdout.splitlines()[-2:]
            print(f"| {number} | {' | '.join(f'{value:.1f}' for value in json.loads(row))} | {said} |", flush=True)


if __name__ == "__main__":
    main()
