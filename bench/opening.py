"""How long a model takes to open, in processes of their own: the first pays for what a machine has not compiled yet,
and makes the self-check, whose finding the others take from the cache.

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
from pathlib import Path

from shapes import NAMES, model_folder

CHILD = """
import json, sys, time
started = time.perf_counter()
import torch, transformers
libraries = time.perf_counter()
import relfv.models.opening, relfv.language_model as opened
from relfv.runs.qid import open_for
from relfv.settings import Settings
imported = time.perf_counter()
checked = []
def timed(*args):
    began = time.perf_counter()
    found = check(*args)
    checked.append(time.perf_counter() - began)
    return found
check, opened.remembered = opened.remembered, timed
model = open_for(Settings(model=sys.argv[1], model_spec="auto", device=sys.argv[2], precision=sys.argv[3]))
ended = time.perf_counter()
print(json.dumps([libraries - started, imported - libraries, ended - imported, checked[0], ended - started]))
print(f"{model.engine.name}: {model.check.said}")
"""


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
        print(
            "| process | import torch and transformers, s | import relfv, s | open, s | of it self-check, s | all, s "
            f"| self-check |\n{'|---' * 7}|"
        )
        for number in range(1, args.times + 1):
            command = [sys.executable, "-c", CHILD, folder, args.device, args.precision]
            child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            row, said = child.stdout.splitlines()[-2:]
            print(f"| {number} | {' | '.join(f'{value:.1f}' for value in json.loads(row))} | {said} |", flush=True)


if __name__ == "__main__":
    main()
