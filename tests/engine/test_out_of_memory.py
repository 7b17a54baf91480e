"""A device that has no room for as many trials a pass as relfv thinks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from parity import rounding, size_in
from relfv.cli import main

VOCABULARY = 420
HEADS = 24


@contextmanager
def room_for(rows: float) -> Iterator[list[int]]:
    """While open, the vocabulary projection runs out of memory above so many rows; yields the row counts it was given.

    What lies in memory per row of the last pass is what a real device runs out of first.
    """
    seen: list[int] = []

    def allocate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # The self-check's whole forward passes, of one prompt each, go through it with a batch axis.
        if isinstance(module, nn.Linear) and module.out_features == VOCABULARY and args[0].dim() == 2:
            seen.append(len(args[0]))
            if seen[-1] > rows:
                raise torch.OutOfMemoryError("no room")

    handle = nn.modules.module.register_module_forward_pre_hook(allocate)
    try:
        yield seen
    finally:
        handle.remove()


def run(llama_path: Path, csv_path: Path, out: Path) -> int:
    return main(
        ["run", "--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(out), "--q_list", "A1"]  # noqa: E501
    )  # fmt: skip


def metrics(artifacts: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifacts / "trial_metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_chunk_is_halved_recorded_and_used_again(
    llama_path: Path, csv_path: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts, undisturbed = tmp_path / "pairs/A1/artifacts", finished / "A1/artifacts"
    with room_for(7 * (1 + HEADS)) as seen:
        assert run(llama_path, csv_path, tmp_path) == 0
    assert 25 * (1 + HEADS) in seen
    assert "going on with 6 prompts at a time" in capsys.readouterr().err

    status = json.loads((artifacts / "qid_status.json").read_text())
    assert status["status"] == "completed"
    expected = {"stepD_cie": 6, "stepE": 25, "step6": len({*distinct_queries(artifacts)})}
    assert status["trials_per_pass"].items() >= expected.items()
    assert json.loads((artifacts / "stepD_cie/noise_floor.json").read_text())["trials_per_pass"] == 6
    assert json.loads((undisturbed / "qid_status.json").read_text())["trials_per_pass"]["stepD_cie"] == 25
    limit = rounding(size_in(undisturbed / "trial_metrics.jsonl"))
    for found, expected in zip(metrics(artifacts), metrics(undisturbed), strict=True):
        assert found == pytest.approx(expected, abs=limit)

    # Again, with all the room in the world: the same bytes need the same chunk.
    made = (artifacts / "trial_metrics.jsonl").read_bytes()
    (artifacts / "trial_metrics.jsonl").unlink()
    (artifacts / "stepD_cie/noise_floor.json").unlink()
    with room_for(float("inf")) as seen:
        assert run(llama_path, csv_path, tmp_path) == 0
    assert (artifacts / "trial_metrics.jsonl").read_bytes() == made
    assert max(seen) == 6 * (1 + HEADS)


def distinct_queries(artifacts: Path) -> set[str]:
    return {trial["query"]["input"] for trial in json.loads((artifacts / "sampled_trials.json").read_text())["trials"]}


@pytest.mark.slow
def test_the_checks_and_injections_of_later_stages_shrink_on_their_own(
    llama_path: Path, csv_path: Path, tmp_path: Path, finished: Path
) -> None:
    # One prompt with all its controls, 44 vectors at 3 layers. Of those the first draws make 16, the others 28.
    with room_for(1 + 44 * 3):
        assert run(llama_path, csv_path, tmp_path) == 0
    artifacts, undisturbed = tmp_path / "pairs/A1/artifacts", finished / "A1/artifacts"
    status, n_eval = json.loads((artifacts / "qid_status.json").read_text()), len(distinct_queries(artifacts))
    assert status["trials_per_pass"] == {
        "stepD_cie": 3,
        "stepE_heads": 6,
        "stepE": 25,
        "step6": n_eval,
        "step6_held_out": n_eval,
        "step6_controls": 2,
        "step6_controls_more": 1,
        "step6_at_once": 2,
    }
    limit = rounding(size_in(undisturbed / "trial_metrics.jsonl"))
    for layer in range(3):
        name = f"step6/layer_{layer}/eval_summary.json"
        expected = json.loads((undisturbed / name).read_text())
        assert json.loads((artifacts / name).read_text()) == pytest.approx(expected, abs=limit)
    made = (artifacts / "stepE_eval.json").read_bytes()
    (artifacts / "stepE_eval.json").unlink()
    with room_for(float("inf")) as seen:
        assert run(llama_path, csv_path, tmp_path) == 0
    assert (artifacts / "stepE_eval.json").read_bytes() == made
    assert max(seen) == 6 * (1 + 2 * 9)  # the top heads' patches: two heads a pass, eight groups and all trials each


def test_no_room_for_a_single_trial_fails_the_q_id_and_says_what_helps(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    with room_for(24):
        assert run(llama_path, csv_path, tmp_path) == 1
    status = json.loads((tmp_path / "pairs/A1/artifacts/qid_status.json").read_text())
    assert status["status"] == "failed"
    assert "out of memory with one prompt at a time" in status["reason"]
