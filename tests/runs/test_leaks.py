"""Thirty-five q_ids in one process leave behind what one does."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from conftest import WORDS
from relfv.cli import main

N_QIDS, WARM_UP, EVERY = 35, 10, 5


class Census(logging.Handler):
    """Counts what is alive each time a q_id is done."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0
        self.counts: list[dict[str, int]] = []
        self.resident: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if " completed in " not in record.getMessage():
            return
        self.done += 1
        if self.done >= WARM_UP and (self.done - WARM_UP) % EVERY == 0:
            gc.unfreeze()  # what a run has frozen, its model, counts too
            gc.collect()
            self.resident.append(resident_bytes())
            alive = gc.get_objects()
            kinds = [type(thing) for thing in alive]
            modules = [thing for thing in alive if issubclass(type(thing), nn.Module)]
            self.counts.append(
                {
                    "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
                    "figures": sum(issubclass(kind, Figure) for kind in kinds) + len(plt.get_fignums()),
                    "modules": len(modules),
                    "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
                    "log handlers": len(logging.getLogger("relfv").handlers),
                    "open files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                }
            )


def resident_bytes() -> int:
    """Of this process, after what its allocator only keeps was given back: that comes and goes by megabytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_watched(arguments: list[str]) -> Census:
    census = Census()
    watched = logging.getLogger("relfv.runs.worker")
    watched.addHandler(census)
    assert main(arguments) == 0
    watched.removeHandler(census)
    census.lock = None  # a lock does not travel between processes
    return census


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files and memory through /proc")
def test_nothing_grows_with_the_number_of_q_ids(llama_path: Path, tmp_path: Path) -> None:
    """In a process of its own: one that has run hundreds of tests takes and returns memory for reasons of its own.
    A leak grows between any two looks, an allocator's step between two of them: so the median, not the sum."""
    rows = [f"Q{q},{a}{q % 7},{b}\n" for q in range(N_QIDS) for a, b in WORDS[:4]]
    csv_path = tmp_path / "many.csv"
    csv_path.write_text("id,ex_A,ex_B\n" + "".join(rows))
    small = ["--n_trials_per_q", "2", "--n_demos", "2", "--n_eval", "2", "--topk", "1"]
    run = ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        census = pool.submit(run_watched, [*run, *small]).result()
    assert census.done == N_QIDS
    assert len(census.counts) == 6
    assert all(count == census.counts[0] for count in census.counts), census.counts
    assert census.counts[0]["figures"] == census.counts[0]["hooks"] == 0 < census.counts[0]["modules"]
    grown = [after - before for before, after in pairwise(census.resident)]
    assert median(grown) * len(grown) < 5 << 20, f"bytes in {EVERY} q_ids each: {grown}"
