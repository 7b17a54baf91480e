"""Whole q_ids through ``relfv run``, and where their time goes.

    python bench/pipeline.py --shape llama-3.1-8b --precision exact     # on a GPU with 40 GB or more
    python bench/pipeline.py --shape demo                               # on any machine

The 8B model has the real shape and random weights (saved once, opened like any checkpoint): times and memory are those
of the real one, its scores mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from relfv.cli import main as relfv
from shapes import NAMES, model_folder


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMES, default="demo")
    parser.add_argument("--precision", choices=("exact", "fast"), default="exact")
    parser.add_argument("--q_list", default="Q1,Q2,Q3")
    parser.add_argument("--extras", choices=("all", "none"), default="all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        model = model_folder(args.shape, work)
        out = Path(temporary) / "out"
        started = time.monotonic()
        with sampling_the_gpu() as busy:
            code = relfv(
                ["run", "--model", model, "--q_list", args.q_list, "--out_root", str(out), "--device", args.device,
                 "--precision", args.precision, "--extras", args.extras]
            )  # fmt: skip
        seconds = time.monotonic() - started
        if code:
            raise SystemExit(code)
        print(table(out, args, seconds, busy))


@contextmanager
def sampling_the_gpu() -> Iterator[list[tuple[datetime, int]]]:
    """While open, a thread notes the time and the share of it (%) in which a kernel ran, as the driver counts it."""
    samples: list[tuple[datetime, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            try:
                samples.append((datetime.now(timezone.utc), torch.cuda.utilization()))
            except (ImportError, RuntimeError):  # no NVML bindings
                return

    watcher = threading.Thread(target=watch)
    if torch.cuda.is_available():
        watcher.start()
    try:
        yield samples
    finally:
        done.set()
        if watcher.ident:
            watcher.join()


def table(out: Path, args: argparse.Namespace, seconds: float, busy: list[tuple[datetime, int]]) -> str:
    """Seconds a stage and q_id, from the time stamps in qid_status.json."""
    manifest = json.loads(next(out.glob("*/run_manifest.json")).read_text())
    stages: dict[str, list[float]] = defaultdict(list)
    times: list[datetime] = []
    for path in sorted(out.glob("*/*/artifacts/qid_status.json"), key=lambda path: path.stat().st_mtime):
        per_stage: dict[str, float] = defaultdict(float)
        for name, record in json.loads(path.read_text())["stages"].items():
            begun, ended = (datetime.fromisoformat(record[key]) for key in ("started_at", "finished_at"))
            times += [begun, ended]
            took = ended - begun
            per_stage["step6 (all layers)" if name.startswith("step6_layer") else name] += took.total_seconds()
        for name, value in per_stage.items():
            stages[name].append(value)
    lines = [
        f"{args.shape}, {args.precision}, {manifest['model']['device_name']}, torch {manifest['versions']['torch']}, "
        f"transformers {manifest['versions']['transformers']}, engine {manifest['model']['engine']}, "
        f"self-check error {manifest['model']['self_check']['max_error']:.1e}",
        "",
        "| stage | first q_id, s | later q_ids, mean s |",
        "|---|---|---|",
    ]
    later = {name: sum(values[1:]) / max(1, len(values) - 1) for name, values in stages.items()}
    lines += [f"| {name} | {values[0]:.2f} | {later[name]:.2f} |" for name, values in stages.items()]
    first = sum(values[0] for values in stages.values())
    lines.append(f"| **whole q_id** | {first:.2f} | {sum(later.values()):.2f} |")
    first_stage, last_stage = min(times), max(times)
    lines.append(
        f"\n{len(stages['stepE'])} q_ids: {(last_stage - first_stage).total_seconds():.1f} s after the model is open, "
        f"{seconds:.1f} s with opening it from disk"
    )
    floors = [
        json.loads(path.read_text())["other_shape"]["p"]["max"]
        for path in out.glob("*/*/artifacts/stepD_cie/noise_floor.json")
    ]
    lines.append(f"noise floor in P, largest of any q_id: {max(floors):.1e}")
    if torch.cuda.is_available():
        during = [share for at, share in busy if first_stage <= at <= last_stage]
        lines.append(f"GPU busy {statistics.mean(during):.0f} % of that time" if during else "GPU's share not known")
        lines.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
