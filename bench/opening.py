"""How long a model takes to open, in processes of their own: the first pays for what a machine has not compiled yet.

python bench/opening.py --shape llama-3.1-8b     # on a GPU with 20 GB or more
python bench/opening.py --shape demo             # on any machine
"""

from __future__ import annotations

import argparse
import json
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
from relfv.models.opening import load_checkpoint
from relfv.language_model import open_model
imported = time.perf_counter()
model = open_model(sys.argv[1], device=sys.argv[2])
ended = time.perf_counter()
print(json.dumps({"torch and transformers": libraries - started, "relfv": imported - libraries,
                  "weights, kernels, self-check": ended - imported, "all": ended - started}))
"""


def main() -> None:
    """Parse, open a few times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMES, default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(args.shape, args.work or Path(temporary))
        print(
            "| process | import torch and transformers, s | import relfv, s | open, s | all, s |\n|---|---|---|---|---|"
        )
        for number in range(1, args.times + 1):
            command = [sys.executable, "-c", CHILD, folder, args.device]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(child.stdout.splitlines()[-1])
            print(f"| {number} | {' | '.join(f'{value:.1f}' for value in row.values())} |", flush=True)


if __name__ == "__main__":
    main()
