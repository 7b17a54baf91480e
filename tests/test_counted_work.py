"""How much one q_id makes the model and the disk do: counts, which no machine's mood changes, so that none grows
unnoticed. Who makes one smaller writes the smaller number here."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import ROOT
from crashes import Fork, Operations
from relfv.cli import main
from relfv.models.architecture import Architecture
from relfv.models.tokens import Tokens
from relfv.stages.stage import Step

pytestmark = pytest.mark.slow

VOCABULARY = 1163
"""Of the demo model."""
MOST = {
    "passes over the decoder": 18,
    "tokens embedded": 5146,
    "rows through a block": 81_130,
    "rows through the vocabulary": 11_515,
    "calls of the tokenizer": 1,
    "products of heads with W_O": 56,
    "texts decoded": 80,
    "files read": 206,
    "files written": 77,
    "writes of qid_status.json": 16,
    "fsyncs": 132,
    "tensors asked for one number": 25,
}
"""For Q1 of the shipped CSV on the demo model (8 layers x 16 heads), all stages; 25 trials of 15 queries. No random
draw does as well as the vector, so all are made, in two passes."""
MOST_ROWS = {
    "stepD_means": 25,
    "stepD_cie": 3279,
    "stepE": 4775,
    "step6_layer_": 135,
    "step6_controls": 3240,
    "step6_answers": 61,
}
"""Of these the rows through the vocabulary by stage: in a model with a large one that is most of the work."""


class Counts(Counter[str]):
    """What a process does from ``install`` on."""

    stage = ""

    def install(self) -> None:
        nn.modules.module.register_module_forward_pre_hook(self._module)
        self._follow(Step)
        self._watch(Tokens, "_made", "calls of the tokenizer")
        self._watch(Tokens, "joined", "texts decoded")
        self._watch(Architecture, "project_heads", "products of heads with W_O")
        self._watch(Path, "read_bytes", "files read")
        for asked in ("item", "__bool__", "__int__", "__float__"):  # for which a host waits for its GPU
            self._watch(torch.Tensor, asked, "tensors asked for one number")

    def _module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            self["passes over the decoder"] += 1
            self["tokens embedded"] += args[0].numel()
        elif type(module).__name__.endswith("DecoderLayer"):
            self["rows through a block"] += args[0][..., 0].numel()
        elif isinstance(module, nn.Linear) and module.out_features == VOCABULARY:
            self["rows through the vocabulary"] += args[0][..., 0].numel()
            self[_rows_of(self.stage)] += args[0][..., 0].numel()

    def _follow(self, step: type[Step]) -> None:
        real = step.run

        def followed(one: Step, *args: Any) -> str:
            self.stage = one.stage.name
            return real(one, *args)

        step.run = followed  # type: ignore[method-assign]

    def _watch(self, owner: type, name: str, what: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **named: Any) -> Any:
            self[what] += 1
            return real(*args, **named)

        setattr(owner, name, counted)


def _rows_of(stage: str) -> str:
    return f"rows through the vocabulary in {stage}"


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Of a run of two q_ids without what a run of one takes: opening the model, its self-check, the page."""
    folder = tmp_path_factory.mktemp("counts")
    one, two = (_counted(folder / q_list, q_list) for q_list in ("Q2", "Q1,Q2"))
    return {what: two[what] - one[what] for what in two}


def _counted(folder: Path, q_list: str) -> Counter[str]:
    folder.mkdir()
    counts, files = Counts(), Operations(folder)
    csv_path = ROOT / "datasets/relation/relationA_ex.csv"

    def body() -> int:
        counts.install()
        files.install()
        flags = ["--model", "demo", "--relation_csv_path", str(csv_path), "--q_list", q_list]
        flags += ["--self_check", "always"]
        code = main(["run", *flags, "--out_root", str(folder / "out")])
        kinds = Counter(kind for kind, _, _ in files.seen)
        counts["fsyncs"], counts["files written"] = kinds["fsync"], kinds["write"]
        counts["writes of qid_status.json"] = len(files.statuses)
        (folder / "counts").write_bytes(pickle.dumps(Counter(counts)))
        return code

    fork = Fork(body, folder / "said")
    assert fork.wait(limit_s=600) == 0, fork.said()
    return pickle.loads((folder / "counts").read_bytes())


def test_a_q_id_makes_no_more_work_than_it_did(counts: dict[str, int]) -> None:
    print(counts)
    most = MOST | {_rows_of(stage): n for stage, n in MOST_ROWS.items()}
    assert {what: n for what, n in counts.items() if n > most.get(what, 0)} == {}


def test_every_count_is_a_count_of_something(counts: dict[str, int]) -> None:
    assert all(counts[what] > 0 for what in (*MOST, *map(_rows_of, MOST_ROWS)))
