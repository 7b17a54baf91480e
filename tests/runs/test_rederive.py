"""Means, CIE, FV and Step6 of one q_id again, in float64, with hooks written here, from the artifacts alone.

Computes with nothing of relfv: the model through transformers, the files through json, csv and torch.load.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parity import assert_close, rounding, size_in


class Truth:
    """Plain hooks on a float64 copy of the model."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.layers = self.model.model.layers

    def scores(self, prompt: str, target: int) -> dict[str, float]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = self.model(ids).logits[0, -1]
        logprob = logits.log_softmax(-1)[target]
        return {
            "logit": float(logits[target]),
            "logprob": float(logprob),
            "p": float(logprob.exp()),
            "top": int(logits.argmax()),
        }

    def heads(self, prompt: str) -> torch.Tensor:
        kept = []
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: kept.append(a[0][0, -1].clone()))
            for layer in self.layers
        ]
        self.scores(prompt, 0)
        for handle in handles:
            handle.remove()
        return torch.stack(kept).view(len(self.layers), self.model.config.num_attention_heads, -1)

    def patched(self, prompt: str, target: int, layer: int, head: int, value: torch.Tensor) -> dict[str, float]:
        def patch(_, arguments):  # type: ignore[no-untyped-def]
            z = arguments[0].clone()
            z[0, -1, head * len(value) : (head + 1) * len(value)] = value
            return (z,)

        handle = self.layers[layer].self_attn.o_proj.register_forward_pre_hook(patch)
        scores = self.scores(prompt, target)
        handle.remove()
        return scores

    def injected(self, prompt: str, target: int, layer: int, vector: torch.Tensor) -> dict[str, float]:
        def add(_, __, output):  # type: ignore[no-untyped-def]
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, -1] += vector
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.layers[layer].register_forward_hook(add)
        scores = self.scores(prompt, target)
        handle.remove()
        return scores


@pytest.fixture(scope="module")
def truth(llama_path: Path) -> Truth:
    return Truth(llama_path)


@pytest.fixture(scope="module")
def artifacts(finished: Path) -> Path:
    return finished / "B2" / "artifacts"


@pytest.fixture(scope="module")
def trials(artifacts: Path) -> list[dict]:  # type: ignore[type-arg]
    return json.loads((artifacts / "sampled_trials.json").read_text())["trials"]


@pytest.fixture(scope="module")
def limit(artifacts: Path) -> float:
    """What float32 may make of this run's logits and log-probabilities."""
    return rounding(size_in(artifacts / "trial_metrics.jsonl"))


@pytest.fixture(scope="module")
def means(artifacts: Path) -> torch.Tensor:
    saved = torch.load(artifacts / "stepD_mean_acts/qid_B2_clean_mean.pt", weights_only=True)
    assert saved["clean_mean"].dtype == torch.float32
    return saved["clean_mean"].double()


@pytest.fixture(scope="module")
def rows(artifacts: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (artifacts / "trial_metrics.jsonl").read_text().splitlines()]


def test_clean_means(truth: Truth, trials: list[dict], means: torch.Tensor) -> None:  # type: ignore[type-arg]
    expected = torch.stack([truth.heads(trial["clean_prompt_str"]) for trial in trials]).mean(0)
    assert_close(means, expected)
    assert expected.abs().max() > 0.1


def test_causal_indirect_effects(
    truth: Truth,
    trials: list[dict],  # type: ignore[type-arg]
    means: torch.Tensor,
    rows: list[dict],  # type: ignore[type-arg]
    limit: float,
) -> None:
    n_layers, n_heads, _ = means.shape
    assert len(rows) == 25 * n_layers * n_heads
    for row in rows[:: 7 if len(rows) > 100 else 1]:
        trial = trials[row["trial_idx"]]
        target, layer, head = trial["target_first_token_id"], row["layer"], row["head"]
        base = truth.scores(trial["corrupted_prompt_str"], target)
        patch = truth.patched(trial["corrupted_prompt_str"], target, layer, head, means[layer, head])
        for m in ("p", "logit", "logprob"):
            assert row[f"{m}_base"] == pytest.approx(base[m], abs=limit)
            assert row[f"{m}_patch"] == pytest.approx(patch[m], abs=limit)
            assert row[f"delta_{m}"] == pytest.approx(patch[m] - base[m], abs=limit)
    assert max(abs(row["delta_logprob"]) for row in rows) > 0.5


def test_head_scores_are_the_rows_statistics(artifacts: Path, rows: list[dict], means: torch.Tensor) -> None:  # type: ignore[type-arg]
    with (artifacts / "cie_scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert [(int(s["layer"]), int(s["head"])) for s in scores] == [(i, h) for i in range(3) for h in range(8)]
    for score in scores:
        own = [r for r in rows if (r["layer"], r["head"]) == (int(score["layer"]), int(score["head"]))]
        assert int(score["n_trials"]) == len(own) == 25
        for m in ("p", "logit", "logprob"):
            delta = torch.tensor([r[f"delta_{m}"] for r in own], dtype=torch.float64)
            assert float(score[f"mean_delta_{m}"]) == pytest.approx(float(delta.mean()), abs=1e-9)
            assert float(score[f"std_delta_{m}"]) == pytest.approx(float(delta.std(correction=0)), abs=1e-9)
            assert float(score[f"mean_abs_delta_{m}"]) == pytest.approx(float(delta.abs().mean()), abs=1e-9)
            for kind in ("base", "patch"):
                mean = sum(r[f"{m}_{kind}"] for r in own) / 25
                assert float(score[f"mean_{m}_{kind}"]) == pytest.approx(mean, abs=1e-9)
        norm = float(means[int(score["layer"]), int(score["head"])].norm())
        assert float(score["clean_mean_norm"]) == pytest.approx(norm, abs=1e-6)
    with (artifacts / "aie_scores.csv").open() as file:
        ranked = list(csv.DictReader(file))
    order = sorted(scores, key=lambda s: (-float(s["mean_delta_p"]), int(s["layer"]), int(s["head"])))
    assert [(r["layer"], r["head"], r["mean_delta_p"]) for r in ranked] == [
        (s["layer"], s["head"], s["mean_delta_p"]) for s in order
    ]
    assert {r["n_qid"] for r in ranked} == {"1"}
    top = json.loads((artifacts / "top_heads.json").read_text())["heads"]
    assert [(str(h["layer"]), str(h["head"])) for h in top] == [(s["layer"], s["head"]) for s in order[:20]]
    assert [h["rank_score"] for h in top] == [float(s["mean_delta_p"]) for s in order[:20]]


def test_function_vector(truth: Truth, artifacts: Path, means: torch.Tensor) -> None:
    top = json.loads((artifacts / "top_heads.json").read_text())["heads"]
    head_dim = means.shape[2]
    expected: dict[int, torch.Tensor] = {}
    for head in top:
        weight = truth.layers[head["layer"]].self_attn.o_proj.weight.detach()
        columns = weight[:, head["head"] * head_dim : (head["head"] + 1) * head_dim]
        part = columns @ means[head["layer"], head["head"]]
        expected[head["layer"]] = expected.get(head["layer"], 0) + part
    saved = torch.load(artifacts / "fv_global_resid.pt", weights_only=True)
    total = sum(expected.values())
    assert_close(saved["fv_global_resid"].double(), total)
    by_layer = torch.load(artifacts / "fv_by_layer.pt", weights_only=True)["fv_by_layer"]
    assert by_layer.keys() == expected.keys()
    for layer, part in by_layer.items():
        assert_close(part.double(), expected[layer])
    meta = json.loads((artifacts / "fv_global_resid_meta.json").read_text())
    assert meta["fv_norm"] == pytest.approx(float(total.norm()), rel=rounding(1))
    assert total.norm() > 1


def test_injection_at_every_layer(truth: Truth, artifacts: Path, limit: float) -> None:
    fv = torch.load(artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"].double()
    largest = 0.0
    for layer in range(3):
        folder = artifacts / f"step6/layer_{layer}"
        rows = [json.loads(line) for line in (folder / "eval_trials.jsonl").read_text().splitlines()]
        for row in rows:
            assert not row["prompt"].endswith(" ")
            base = truth.scores(row["prompt"], row["target_id"])
            edited = truth.injected(row["prompt"], row["target_id"], layer, fv)
            for m in ("p", "logit", "logprob"):
                assert row[f"{m}_base"] == pytest.approx(base[m], abs=limit)
                assert row[f"{m}_with"] == pytest.approx(edited[m], abs=limit)
            assert (row["pred_id_base"], row["pred_id_with"]) == (base["top"], edited["top"])
            largest = max(largest, abs(row["delta_logprob"]))
        summary = json.loads((folder / "eval_summary.json").read_text())
        assert summary["n_eval"] == len(rows) == len({row["prompt"] for row in rows})
        for m in ("p", "logit", "logprob"):
            delta = torch.tensor([row[f"delta_{m}"] for row in rows], dtype=torch.float64)
            assert summary[f"mean_delta_{m}"] == pytest.approx(float(delta.mean()), abs=1e-9)
            assert summary[f"std_delta_{m}"] == pytest.approx(float(delta.std(correction=0)), abs=1e-9)
        assert summary["acc_with"] == sum(row["accuracy_with"] for row in rows) / len(rows)
    assert largest > 0.5


def test_step_e_check(
    truth: Truth,
    artifacts: Path,
    trials: list[dict],  # type: ignore[type-arg]
    limit: float,
) -> None:
    fv = torch.load(artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"].double()
    saved = json.loads((artifacts / "stepE_eval.json").read_text())
    for layer in range(3):
        deltas = []
        for trial in trials:
            target = trial["target_first_token_id"]
            base = truth.scores(trial["corrupted_prompt_str"], target)
            deltas.append(truth.injected(trial["corrupted_prompt_str"], target, layer, fv)["logit"] - base["logit"])
        assert saved["per_layer"][str(layer)]["mean_delta_logit"] == pytest.approx(sum(deltas) / 25, abs=limit)
    clean = [truth.scores(trial["clean_prompt_str"], trial["target_first_token_id"])["p"] for trial in trials]
    assert saved["reference"]["clean"]["mean_p"] == pytest.approx(sum(clean) / 25, abs=limit)
