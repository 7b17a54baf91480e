"""The effects of MLPs on a finished q_id, against plain hooks; and a model that has none to hook."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from conftest import scale_up
from folders import arguments, contents
from parity import largest, rounding
from relfv.cli import main
from relfv.engine.reference import naive_baseline, naive_together
from relfv.language_model import open_model
from relfv.report.written_tables import statuses_of, table_of


def test_every_mlp_has_the_effect_that_plain_hooks_find(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    artifacts, command = folder / "A1/artifacts", arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")
    before = contents(artifacts)
    assert main([*command, "--extras", "mlp"]) == 0
    after = contents(artifacts)
    assert {name for name in after if after[name] != before.get(name)} == {"stepD_mlp/mlp_cie.json"}
    assert main(["verify", str(folder)]) == 0
    assert "CIE of its MLP in P" in (folder / "report/index.html").read_text()
    document, trials = json.loads(after["stepD_mlp/mlp_cie.json"]), json.loads(after["sampled_trials.json"])["trials"]
    rows = table_of("mlps", statuses_of(folder))
    assert [row["mean_delta_p_fdr"] for row in rows] == [mlp["mean_delta_p_fdr"] for mlp in document["mlps"]]
    model = open_model(str(llama_path))
    backbone = model.backbone.plain().in_float32()
    written: list[torch.Tensor] = []
    mlp = model.arch.blocks[1].mlp  # type: ignore[union-attr]
    handle = mlp.register_forward_hook(lambda _, __, output: written.append(output[0, -1].double()))  # type: ignore[union-attr]
    with backbone.running():
        for trial in trials:
            naive_baseline(backbone, model.tokens.encode(trial["clean_prompt_str"]), 0)
    handle.remove()  # type: ignore[union-attr]
    mean = torch.stack(written).mean(0).float()
    found = np.array(document["by_trial"]["delta_p"]["1"])
    for i in (0, 11):
        prompt, target = model.tokens.encode(trials[i]["corrupted_prompt_str"]), trials[i]["target_first_token_id"]
        with backbone.running():
            base = naive_baseline(backbone, prompt, target)
            scores = naive_together(backbone, prompt, target, {}, {}, mlps={1: mean})
        limit = rounding(largest(scores.logit, scores.logprob)) * float(torch.maximum(base.p, scores.p)[0])
        assert found[i] == pytest.approx(float(scores.p[0] - base.p[0]), abs=limit)
    assert document["mlps"][1]["mean_delta_p"] == pytest.approx(found.mean())
    heads = [row.split(",") for row in after["cie_scores.csv"].decode().splitlines()[1:]]
    best = max((row for row in heads if row[1] == "1"), key=lambda row: float(row[4]))
    assert document["mlps"][1]["best_head"] == {"head": int(best[2]), "mean_delta_p": float(best[4])}


def test_a_model_whose_mlps_are_no_modules_is_told_so_and_stays_completed(
    save_model: Callable[..., Path], csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tf.OPTConfig(
        vocab_size=420, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=48,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    path = save_model(scale_up(tf.OPTForCausalLM(config)))
    command = arguments(path, csv_path, tmp_path, "--q_list", "A1", "--topk", "2", "--model_spec", "auto")
    assert main([*command, "--extras", "mlp"]) == 1
    assert "expected a model with a module 'mlp' in its blocks" in capsys.readouterr().err
    assert json.loads((tmp_path / "pairs/A1/artifacts/qid_status.json").read_text())["status"] == "completed"
