"""A model larger than a card, on several cards at once: a process on each, streaming weights that all share.

    python bench/each_card.py          # on two GPUs of 80 GB with 200 GB of host memory: five minutes
    python bench/each_card.py --tiny   # on any machine, with two processes

Each process has the 70B shape of streaming.py where ``--offload auto`` puts it. What streams is in host memory once,
put there by whoever comes to a layer first (models/shared.py), and page-locked by each for its card. Timed on all cards
at once, then on the first alone: a *trip* of all that streams with little to compute behind it, which shows what bus
and host memory give, and is timed on every card alone; a head *sweep* over 25 trials, ``exact``; and a *q_id*, which is
``relfv run`` with all its files. "Same" says whether all scores, or files, are byte for byte those of the first process
in the first row. Host memory is what the machine has less of than before, taken by all processes together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch

from one_card import digests, span_of
from pipeline import IN_MEMORY, made_in_memory, measuring_steps
from relfv.cli import main as relfv
from relfv.engine.passes import capture_heads
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.models.memory import available_bytes
from relfv.models.shared import bytes_shared, new_file, share
from streaming import asked, counted, timed, where

MEASURES = ("trip", "sweep", "q_id")


def main() -> None:
    """Parse, run, print each row of the table when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on the CPU if there is no GPU")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2, help="one on each card")
    parser.add_argument("--what", nargs="+", choices=MEASURES, default=MEASURES)
    args = parser.parse_args()
    free, shared = available_bytes(), new_file()
    if free is None or shared is None:
        parser.error("needs Linux")
    with tempfile.TemporaryDirectory() as work:
        shape = "70b-tiny" if args.tiny else "70b"
        members = [started(index, shared, shape, Path(work)) for index in range(args.processes)]
        print(f"torch {torch.__version__}, host memory free: {free / 1e9:.0f} GB", flush=True)
        for member in members:
            print(member.recv(), flush=True)
        print("\n| what | on | s | GB streamed | GB/s | peak GiB of each | same | host memory, GB (of it shared) |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for what in args.what:
            first = None
            alone = members if what == "trip" else members[:1]
            for on in (members, *([member] for member in alone)):
                found = together(on, what)
                first = first or found[0]["digest"]
                name = "all at once" if on is members else f"card {members.index(on[0])} alone"
                numbers = [", ".join(one[key] for one in found) for key in ("s", "GB", "GB/s", "peak")]
                same = "yes" if all(one["digest"] == first for one in found) else "no"
                taken = f"{(free - (available_bytes() or 0)) / 1e9:.0f} ({found[0]['shared']})"
                print(f"| {' | '.join([what, name, *numbers, same, taken])} |", flush=True)


def started(index: int, shared: int, shape: str, work: Path) -> Connection:
    """Start a process that has the model on a card and sees no other. -> what it is talked to by; it ends with that."""
    start = multiprocessing.get_context("spawn")
    ours, theirs = start.Pipe()
    if torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    start.Process(target=on_its_card, args=(theirs, DupFd(shared), shape, work / str(index))).start()
    theirs.close()
    return ours


def together(members: Sequence[Connection], what: str) -> list[dict[str, Any]]:
    """Have all of ``members`` measure this at the same time."""
    for member in members:
        member.send(what)
    return [member.recv() for member in members]


def on_its_card(parent: Connection, shared: Any, shape: str, work: Path) -> None:
    """Open the model, then measure what the parent names, until it is gone."""
    share(shared.detach())
    work.mkdir()
    os.chdir(work)  # so that all call the model by the same name
    began = time.perf_counter()
    card = OneCard(shape)
    parent.send(f"{card.name}: {where(card.streaming.placement)}, after {time.perf_counter() - began:.0f} s")
    with suppress(EOFError):
        while True:
            parent.send(card.measured(parent.recv()))


class OneCard:
    """The model on one card, and what is measured on it."""

    def __init__(self, shape: str) -> None:
        """Make the model of this shape, and run everything once, so that kernels are compiled."""
        self.backbone, self.runs = made_in_memory(shape, Path("model")), 0
        assert self.backbone.streaming
        self.streaming, cuda = self.backbone.streaming, self.backbone.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if cuda else "CPU"
        self.prompts, self.heads = asked(self.backbone.arch, IN_MEMORY[shape])
        self.means = self.trip().mean(0)
        engine = SharedPrefixEngine(self.backbone)
        engine.sweep_heads(self.prompts[:2], self.means, self.heads[:: self.backbone.arch.n_heads])

    def measured(self, what: str) -> dict[str, Any]:
        """Numbers of the table, as text."""
        seconds, gigabytes = list[float](), list[float]()
        with timed(self.backbone.device, seconds), counted(self.streaming, gigabytes):
            found = {"trip": self.trip, "sweep": self.sweep, "q_id": self.q_id}[what]()
        if isinstance(found, torch.Tensor):
            s, gb, digest = seconds[0], gigabytes[0], hashlib.sha256(found.cpu().numpy().tobytes()).hexdigest()
        else:
            s, gb, digest = found
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        shared = (bytes_shared() or 0) / 1e9
        return {"s": f"{s:.2f}", "GB": f"{gb:.0f}", "GB/s": f"{gb / s:.1f}", "peak": f"{peak:.1f}", "digest": digest,
                "shared": f"{shared:.0f}"}  # fmt: skip

    def trip(self) -> torch.Tensor:
        """A forward pass over four prompts: (prompt, layer, head, head_dim) inputs of W_O."""
        with self.backbone.running():
            return capture_heads(self.backbone, self.prompts.ids[:4])[0]

    def sweep(self) -> torch.Tensor:
        """Log-probabilities of the targets with each head patched: (trial, head)."""
        return SharedPrefixEngine(self.backbone).sweep_heads(self.prompts, self.means, self.heads).edited.logprob

    def q_id(self) -> tuple[float, float, dict[str, str]]:
        """A whole q_id: seconds and gigabytes of its stages, and the digests of its files."""
        self.runs += 1
        out = Path(f"out{self.runs}")
        with measuring_steps(self.streaming) as spent:
            code = relfv(["run", "--model", "model", "--q_list", "Q1", "--out_root", str(out)])
        if code:
            raise SystemExit(code)
        (status,) = out.glob("*/*/artifacts/qid_status.json")
        began, ended = span_of(json.loads(status.read_text()))
        gigabytes = sum(one.streamed for one in spent.values()) / 1e9
        return (ended - began).total_seconds(), gigabytes, digests(out)


if __name__ == "__main__":
    main()
