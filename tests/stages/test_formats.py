from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import rounding, size_in
from relfv.cli import main
from relfv.engine.clean import run_clean
from relfv.engine.reference import naive_baseline, naive_head_patch, naive_injection
from relfv.language_model import open_model
from relfv.relations import load_relations
from relfv.stages.agreement import common_by_chance
from relfv.stages.measured import read_measured
from relfv.stages.prompts import AnswerTokens, PromptFormat
from relfv.stages.shown import read_frozen_trials, show
from relfv.stages.trials import read_trials
from relfv.types import Prompts


def test_other_formats_show_the_frozen_trials_and_their_numbers_are_those_of_plain_hooks(
    finished: Path, csv_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    where = ["--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path)]
    command = ["run", *where, "--q_list", "A1"]
    assert main([*command, "--formats", "arrow,instruction"]) == 0
    assert main(["verify", str(folder)]) == 0
    artifacts = folder / "A1/artifacts"
    document = json.loads((artifacts / "formats/formats.json").read_text())
    vectors, _ = read_measured(artifacts / "formats/vectors.safetensors")
    assert [*vectors] == [*document["formats"]] == [*document["targets"]] == ["spec", "arrow"]
    assert document["left_out"].keys() == {"instruction"}  # the CSV has no names

    trials = json.loads((artifacts / "sampled_trials.json").read_text())["trials"]
    first = document["formats"]["arrow"]["first_clean_prompt"]
    demos = [f"{demo['input']} -> {demo['output']}\n" for demo in trials[0]["demos_clean"]]
    assert first == "".join(demos) + f"{trials[0]['query']['input']} ->"

    model, frozen = open_model(str(llama_path)), read_trials(artifacts / "sampled_trials.json")
    relation = load_relations(csv_path)["A1"]
    arrow = PromptFormat("arrow", "{input} -> {output}")
    answers = AnswerTokens(relation, model.tokens, shown=arrow)
    shown = show(frozen, read_frozen_trials(artifacts / "sampled_trials.json"), answers, arrow)
    targets = [question.target for question in shown.questions]
    assert [target.token_id for target in targets] == [
        model.tokens.encode(f"{prompt} {question.answer}")[len(model.tokens.encode(prompt))]
        for prompt, question in zip(shown.clean_prompts, shown.questions, strict=True)
    ]
    clean, corrupted = (
        Prompts([model.tokens.encode(text) for text in texts], [target.token_id for target in targets])
        for texts in (shown.clean_prompts, shown.prompts)
    )
    means = run_clean(model.backbone, clean).activations.double().mean(0).float()
    limit = rounding(size_in(artifacts / "trial_metrics.jsonl"))
    assert np.allclose(vectors["arrow"].means, means.numpy(), atol=limit)
    best = vectors["arrow"].heads[0]
    cie = np.mean([
        float(naive_head_patch(model.backbone, ids, target, best, means[best.layer, best.head]).p)
        - float(naive_baseline(model.backbone, ids, target).p)
        for ids, target in zip(corrupted.ids, corrupted.targets, strict=True)
    ])  # fmt: skip
    assert max(vectors["arrow"].scores) == pytest.approx(cie, abs=limit)
    at, vector = document["targets"]["spec"]["per_layer"]["1"], torch.from_numpy(vectors["arrow"].vector)
    rows = [json.loads(line) for line in (artifacts / "step6/layer_1/eval_trials.jsonl").read_text().splitlines()]
    reached = [
        float(naive_injection(model.backbone, model.tokens.encode(row["prompt"]), row["target_id"], 1, vector).p)
        for row in rows
    ]
    assert at["arrow"]["mean_p"] == pytest.approx(np.mean(reached), abs=limit)
    assert at["spec"]["mean_p"] == pytest.approx(np.mean([row["p_with"] for row in rows]), abs=limit)


def test_heads_common_to_random_lists_are_counted_as_simulation_does() -> None:
    rng = np.random.default_rng(0)
    counts = [
        len(set.intersection(*({*rng.permutation(30)[:12].tolist()} for _ in range(3)))) for _ in range(4000)
    ]  # fmt: skip
    mean, p_value = common_by_chance(4, 3, 12, 30)
    assert mean == pytest.approx(np.mean(counts), abs=0.1)
    assert p_value == pytest.approx(np.mean(np.array(counts) >= 4), abs=0.03)
    assert common_by_chance(0, 3, 12, 30)[1] == 1
