"""Runs whose answers begin with white space or share first tokens: what is fed and scored, against plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import llama, make_tokenizer
from folders import arguments
from parity import rounding
from relfv.cli import main

N_BYTES = 258
"""A vocabulary of bytes alone: a space is a token, and so is each digit."""


@pytest.fixture(scope="module")
def model_path(save_model: Callable[..., Path]) -> Path:
    return save_model(llama(vocab_size=N_BYTES), make_tokenizer(vocab_size=N_BYTES))


@pytest.fixture(scope="module", params=["first", "distinguishing"])
def artifacts(request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("years")
    rows = [f"when,in{i},{1901 + i}" for i in range(12)] + ["when,in0,1950", "when,in1,then"]
    csv = folder / "years.csv"
    csv.write_text("\n".join(["id,ex_A,ex_B", *rows]))
    flags = ["--n_trials_per_q", "6", "--topk", "4", "--target", request.param]
    assert main(arguments(model_path, csv, folder, *flags)) == 0
    return folder / "years/when/artifacts"


def rows_of(artifacts: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifacts / name).read_text().splitlines()]


def trials_of(artifacts: Path, name: str = "sampled_trials.json") -> list[dict[str, Any]]:
    return json.loads((artifacts / name).read_text())["trials"]


def test_the_twins_say_what_is_fed(artifacts: Path) -> None:
    distinguishing = json.loads((artifacts / "qid_status.json").read_text())["config"]["target"] == "distinguishing"
    for trial, twin in zip(trials_of(artifacts), trials_of(artifacts, "sampled_trials_zeroshot.json"), strict=True):
        assert trial["space_fed"] is twin["space_fed"] is True
        n = trial["n_answer_tokens_fed"]
        assert n == twin["n_answer_tokens_fed"]
        assert n in ((2, 3) if distinguishing and trial["target_str"] != "then" else (0,))
        assert trial["target_first_token_id"] == twin["target_id"] == trial["answer_ids"][n]
        assert twin["corrupted_prompt_str"] == f"Q: {trial['query']['input']}\nA: "


def test_scores_are_those_of_a_plain_forward_of_the_text_that_is_said_to_be_fed(
    artifacts: Path, model_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def scores(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1)

    rows = rows_of(artifacts, "step6/layer_1/eval_trials.jsonl")
    trials = {trial["trial_idx"]: trial for trial in trials_of(artifacts)}
    right = {"in0": ["1901", "1950"], "in1": ["1902", "then"]}
    for row in rows:
        trial = trials[row["trial_idx"]]
        fed = f" {trial['target_str'][: trial['n_answer_tokens_fed']]}"
        assert row["prompt"] == f"Q: {trial['query']['input']}\nA:{fed}"
        logprobs = scores(row["prompt"])
        assert row["logprob_base"] == pytest.approx(float(logprobs[row["target_id"]]), abs=rounding(10))
        accepted = right.get(trial["query"]["input"], [trial["target_str"]])
        continued = {answer[len(fed) - 1] for answer in accepted if answer.startswith(fed[1:])}
        assert row["accuracy_base"] == int(tokenizer.decode([int(logprobs.argmax())]) in continued)
        assert scores(trial["corrupted_prompt_str"] + fed).isfinite().all()
    for trial in trials.values():
        fed = f" {trial['target_str'][: trial['n_answer_tokens_fed']]}"
        (base, *_) = [
            row for row in rows_of(artifacts, "trial_metrics.jsonl") if row["trial_idx"] == trial["trial_idx"]
        ]
        found = scores(trial["corrupted_prompt_str"] + fed)[trial["target_first_token_id"]]
        assert base["logprob_base"] == pytest.approx(float(found), abs=rounding(10))


def test_a_whole_answer_starts_at_its_first_character_and_must_end(artifacts: Path) -> None:
    answers = json.loads((artifacts / "step6/answers.json").read_text())
    for row in answers["rows"]:
        assert row["n_tokens"] == len(row["answer"])
        for name in ("base", "with"):
            accepted = [row["answer"], *row["other_right_answers"]]
            before, end, _ = row[f"written_{name}"].partition("\n")
            assert row[f"exact_{name}"] == int(bool(end) and before.strip() in accepted)
