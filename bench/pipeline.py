"""Whole q_ids through ``relfv run``, and where their time goes.

    python bench/pipeline.py --shape llama-3.1-8b --precision exact     # on a GPU with 40 GB or more
    python bench/pipeline.py --shape gemma-3-270m --q_list Q1           # on two CPU cores, 262,144 tokens
    python bench/pipeline.py --shape 70b --q_list Q1    # on a GPU of 80 GB with 128 GiB of host memory, streaming
    python bench/pipeline.py --shape demo                               # on any machine

Models other than the demo have the real shape and random weights (saved once, opened like any checkpoint): times and
memory are those of the real ones, their scores mean nothing. On a CPU the products of every stage are counted as well,
which does not depend on what else the machine does. ``70b`` has no checkpoint, since no disk of the machine holds it:
its weights are made in memory, where ``--offload auto`` puts them (streaming.py), and opened from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from relfv import language_model
from relfv.cli import main as relfv
from relfv.engine.base import Backbone
from relfv.models.opening import Checkpoint, load_tokenizer
from relfv.models.sources import model_source
from relfv.models.streaming import Streaming
from relfv.stages.stage import Step, Work
from relfv.stages.table import STAGES
from shapes import NAMES, model_folder
from streaming import TINY, WIDE, built

IN_MEMORY = {"70b": WIDE, "70b-tiny": {**TINY, "vocab_size": 4096}}


def main() -> None:
    """Parse, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*NAMES, *IN_MEMORY), default="demo")
    parser.add_argument("--precision", choices=("exact", "fast"), default="exact")
    parser.add_argument("--q_list", default="Q1,Q2,Q3")
    parser.add_argument("--extras", choices=("all", "none"), default="all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="keeps the random model between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        out = Path(temporary) / "out"
        if args.shape in IN_MEMORY:
            model, streaming = str(work / "model"), made_in_memory(args.shape, work / "model").streaming
        else:
            model, streaming = model_folder(args.shape, work), None
        started = time.monotonic()
        with sampling_the_gpu() as busy, measuring_steps(streaming) as spent:
            code = relfv(
                ["run", "--model", model, "--q_list", args.q_list, "--out_root", str(out), "--device", args.device,
                 "--precision", args.precision, "--extras", args.extras]
            )  # fmt: skip
        seconds = time.monotonic() - started
        if code:
            raise SystemExit(code)
        print(table(out, args, seconds, busy, spent))


def made_in_memory(shape: str, folder: Path) -> Backbone:
    """A model of this shape where ``--offload auto`` puts it, all streamed on a CPU; opening ``folder``, which has its
    config and a tokenizer, gives it."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    backbone, _ = built(IN_MEMORY[shape], device, "auto" if device.type == "cuda" else "cpu")
    backbone.model.config.architectures = [type(backbone.model).__name__]
    backbone.model.config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_source("demo")).save_pretrained(folder)
    tokens = load_tokenizer(str(folder), "", trust_remote_code=False)
    made = Checkpoint(backbone.model, tokens, backbone.arch, device, "bfloat16", backbone.streaming)
    language_model.load_checkpoint = lambda *_, **__: made
    return backbone


@contextmanager
def sampling_the_gpu() -> Iterator[list[tuple[datetime, int, int]]]:
    """While open, a thread notes the time, the share of it (%) in which a kernel ran, and the bytes of the card that
    are taken, as the driver counts them."""
    samples: list[tuple[datetime, int, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            try:
                used = torch.cuda.device_memory_used()
                samples.append((datetime.now(timezone.utc), torch.cuda.utilization(), used))
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


@dataclass
class Spent:
    """On one stage, over all q_ids."""

    cpu_s: float = 0.0
    """Of all threads of the process."""
    flop: int = 0
    """Of matrix products and attention."""
    streamed: int = 0
    """Bytes of weights."""


@contextmanager
def measuring_steps(streaming: Streaming | None) -> Iterator[dict[str, Spent]]:
    """While open, every step is measured, by the name that ``table`` calls it; products on a CPU alone, since counting
    them takes a GPU's host more time than launching them."""
    spent: dict[str, Spent] = defaultdict(Spent)
    real = Step.run

    def run(step: Step, work: Work) -> str:
        on, started = spent[in_table(step.name)], time.process_time()
        before = streaming.bytes_streamed if streaming else 0
        try:
            if torch.cuda.is_available():
                return real(step, work)
            with FlopCounterMode(display=False) as counter:
                return real(step, work)
        finally:
            on.cpu_s += time.process_time() - started
            on.streamed += streaming.bytes_streamed - before if streaming else 0
            on.flop += 0 if torch.cuda.is_available() else counter.get_total_flops()

    Step.run = run  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Step.run = real  # type: ignore[method-assign]


def in_table(step: str) -> str:
    """The layers of Step6 are one line."""
    return "step6 (all layers)" if step.startswith("step6_layer") else step


def table(
    out: Path,
    args: argparse.Namespace,
    seconds: float,
    busy: list[tuple[datetime, int, int]],
    spent: Mapping[str, Spent],
) -> str:
    """What each stage of a q_id takes: seconds from the time stamps in qid_status.json, bytes of the files it names."""
    manifest = json.loads(next(out.glob("*/run_manifest.json")).read_text())
    stages: dict[str, list[float]] = defaultdict(list)
    written: dict[str, int] = defaultdict(int)
    times: list[datetime] = []
    for path in sorted(out.glob("*/*/artifacts/qid_status.json"), key=lambda path: path.stat().st_mtime):
        per_stage: dict[str, float] = defaultdict(float)
        for name, record in json.loads(path.read_text())["stages"].items():
            begun, ended = (datetime.fromisoformat(record[key]) for key in ("started_at", "finished_at"))
            times += [begun, ended]
            took = ended - begun
            per_stage[in_table(name)] += took.total_seconds()
            written[in_table(name)] += sum((path.parent / file).stat().st_size for file in record["files"])
        for name, value in per_stage.items():
            stages[name].append(value)
    lines = [
        f"{args.shape}, {args.precision}, {manifest['model']['device_name']}, torch {manifest['versions']['torch']}, "
        f"transformers {manifest['versions']['transformers']}, engine {manifest['model']['engine']}, "
        f"self-check error {manifest['model']['self_check']['max_error']:.1e}",
        "",
        "| stage | first q_id, s | later q_ids, mean s | CPU s a q_id | TFLOP a q_id | KiB written a q_id "
        "| GB streamed a q_id |",
        "|---|---|---|---|---|---|---|",
    ]
    later = {name: sum(values[1:]) / max(1, len(values) - 1) for name, values in stages.items()}
    columns = {
        name: (values[0], later[name], spent[name].cpu_s / len(values), spent[name].flop / 1e12 / len(values),
               written[name] / 1024 / len(values), spent[name].streamed / 1e9 / len(values))
        for name, values in stages.items()
    }  # fmt: skip
    columns["**whole q_id**"] = tuple(map(sum, zip(*columns.values(), strict=True)))  # type: ignore[assignment]
    beyond = [*zip(*(columns[stage.name] for stage in STAGES if stage.extra and stage.name in columns), strict=True)]
    if beyond:
        columns["of that beyond the spec's stages"] = tuple(map(sum, beyond))  # type: ignore[assignment]
    lines += [
        "| {} | {:.2f} | {:.2f} | {:.1f} | {:.3f} | {:.0f} | {:.1f} |".format(name, *row)
        for name, row in columns.items()
    ]
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
        during = [share for at, share, _ in busy if first_stage <= at <= last_stage]
        lines.append(f"GPU busy {statistics.mean(during):.0f} % of that time" if during else "GPU's share not known")
        lines.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
