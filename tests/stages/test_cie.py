from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import assert_same_scores
from relfv.errors import InputError, RunError
from relfv.language_model import LanguageModel, open_model
from relfv.stages.cie import METRICS, head_effects, read_deltas
from relfv.store.folder import QidFolder
from relfv.types import HeadId, MeanActivations, Prompts


@pytest.fixture(scope="module")
def model(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> Prompts:
    words = ("cat", "cow", "sheep")
    return Prompts([model.tokens.encode(f"Q: dog\nA: calf\n\nQ: {word}\nA:") for word in words], [5, 6, 7])


def test_a_head_named_twice_gets_each_of_its_values(model: LanguageModel, prompts: Prompts) -> None:
    head = HeadId(1, 2)
    values = torch.randn(2, model.arch.head_dim, generator=torch.Generator().manual_seed(0))
    together = model.engine.sweep_heads(prompts, values, [head, head]).edited
    for i in range(2):
        means = np.zeros((model.arch.n_layers, model.arch.n_heads, model.arch.head_dim), np.float32)
        means[head.layer, head.head] = values[i]
        alone = head_effects(model, prompts, MeanActivations(means, 1), [head]).effects.edited[:, 0]
        assert_same_scores(together[:, i], alone)
    assert (together.logprob[:, 0] - together.logprob[:, 1]).abs().max() > 0.01


def test_clean_means_of_another_model_are_bad_input(model: LanguageModel, prompts: Prompts) -> None:
    means = MeanActivations(np.zeros((3, 8, 11), np.float32), 1)
    with pytest.raises(InputError, match=r"of shape \(3, 8, 11\) do not fit .*, which has \(3, 8, 10\)"):
        head_effects(model, prompts, means, [HeadId(0, 0)])


def test_deltas_are_those_of_the_file_whatever_was_read_before(finished: Path, tmp_path: Path) -> None:
    original = finished / "A1/artifacts/trial_metrics.jsonl"
    first = read_deltas(original)
    lines = original.read_text().splitlines()
    row = json.loads(lines[-1])
    row["delta_p"] += 0.5
    (tmp_path / "changed.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]))
    changed = read_deltas(tmp_path / "changed.jsonl").of["p"]
    assert changed[-1, -1] == first.of["p"][-1, -1] + 0.5
    again = read_deltas(original)
    assert again.heads == first.heads
    assert (again.of["p"][:-1] == changed[:-1]).all()
    # the same where what was read last is kept
    folder = QidFolder(tmp_path, "A1")
    for text, expected in ((original.read_text(), first.of["p"]), ((tmp_path / "changed.jsonl").read_text(), changed)):
        folder.path(METRICS).write_text(text)
        assert (folder.read(METRICS).of["p"] == expected).all()
        assert (folder.read(METRICS).of["p"] == expected).all()


def test_a_file_that_lacks_a_row_or_has_one_twice_is_named(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "A1/artifacts/trial_metrics.jsonl").read_text().splitlines()
    path = tmp_path / "x.jsonl"
    said = "rows are missing or there twice; expected one for each of 25 trials and 24 heads"
    for changed in (lines[:-1], [*lines, lines[0]], [lines[0], *lines[:-1]]):
        path.write_text("\n".join(changed))
        with pytest.raises(RunError, match=rf"x\.jsonl: {said}"):
            read_deltas(path)
    path.write_text("")
    with pytest.raises(RunError, match="is not a file of head effects"):
        read_deltas(path)
