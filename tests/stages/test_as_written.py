from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from conftest import scale_up
from parity import assert_close, largest, rounding
from relfv.cli import main
from relfv.engine.clean import CleanRun, run_clean
from relfv.engine.hooks import editing_inputs
from relfv.engine.reference import naive_together
from relfv.language_model import LanguageModel, open_model
from relfv.stages.as_written import AT_ONCE, parts_of_sets, vector_as_written
from relfv.stages.controls import Ground, candidate_vectors
from relfv.stages.function_vector import build_function_vector
from relfv.stages.means import mean_activations
from relfv.types import HeadId, Prompts

WORDS = ("cat", "cow", "sheep", "goat", "horse", "frog", "bear")
QUERIES, EVALUATED, K = [3, 3, 1, 4, 1, 5, 3], [3, 1, 5], 4


@pytest.fixture(scope="module")
def olmo_path(save_model: Callable[..., Path]) -> Path:
    """A family that norms what attention writes."""
    config = tf.Olmo2Config(
        vocab_size=420, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    return save_model(scale_up(tf.Olmo2ForCausalLM(config)))


@pytest.fixture(scope="module")
def olmo(olmo_path: Path) -> LanguageModel:
    return open_model(str(olmo_path))


@pytest.fixture(scope="module")
def llama(llama_path: Path) -> LanguageModel:
    return open_model(str(llama_path))


def prompts_of(model: LanguageModel) -> Prompts:
    texts = [f"Q: dog\nA: puppy\n\nQ: {word}\nA:" for word in WORDS]
    return Prompts([model.tokens.encode(text) for text in texts], [5, 6, 7, 8, 9, 10, 11], QUERIES)


def ground_of(model: LanguageModel) -> tuple[Ground, CleanRun]:
    clean = run_clean(model.backbone, prompts_of(model))
    heads = [HeadId(layer, head) for layer in range(model.arch.n_layers) for head in range(model.arch.n_heads)]
    scores = np.random.default_rng(0).standard_normal((len(WORDS), len(heads)))
    best = [heads[i] for i in np.argsort(-scores.mean(0))[:K]]
    fv = build_function_vector(model.arch, mean_activations(clean), best).total
    return Ground(model.arch, clean, QUERIES, scores, heads, fv, best, EVALUATED, seed="0:A"), clean


def test_where_nothing_stands_between_the_vector_as_written_is_the_function_vector(llama: LanguageModel) -> None:
    ground, clean = ground_of(llama)
    fv = build_function_vector(llama.arch, mean_activations(clean), ground.selected)
    written = vector_as_written(ground)
    assert np.array_equal(written.total, fv.total)
    assert all(np.array_equal(written.by_layer[layer], part) for layer, part in fv.by_layer.items())
    assert "as_written" not in candidate_vectors(ground).names


def test_a_heads_part_is_what_the_norm_makes_of_it_on_each_prompt(olmo: LanguageModel) -> None:
    ground, _ = ground_of(olmo)
    head, arch = HeadId(1, 3), olmo.arch
    found = parts_of_sets(ground, ground.all_trials(1), [[head]], written=True)
    parts = []
    for ids in prompts_of(olmo).ids:
        seen: dict[str, torch.Tensor] = {}
        norm: Any = arch.blocks[1].post_attention_layernorm  # type: ignore[union-attr]
        with (
            olmo.backbone.running(),
            editing_inputs(
                [
                    (arch.out_projs[1], lambda z, seen=seen: seen.update(z=z[0, -1].double().cpu())),
                    (norm, lambda u, seen=seen: seen.update(u=u[0, -1].double().cpu())),
                ]
            ),
        ):
            olmo.backbone.decoder(input_ids=torch.tensor([ids], device=olmo.backbone.device), use_cache=False)
        z = seen["z"].view(arch.n_heads, arch.head_dim)[head.head]
        factor = 1 / (seen["u"].pow(2).mean() + norm.variance_epsilon).sqrt()
        parts.append(norm.weight.detach().double().cpu() * factor * arch.project_head(1, head.head, z))
    assert_close(found[1, 0], torch.stack(parts).mean(0))
    assert not found[[0, 2]].any()
    defined = parts_of_sets(ground, ground.all_trials(1), [[head]], written=False)[1, 0]
    assert largest(found[1, 0] - defined) > 0.1 * largest(defined)


def test_vectors_as_written_are_held_out_and_have_rivals(olmo: LanguageModel) -> None:
    ground, clean = ground_of(olmo)
    found = candidate_vectors(ground)
    parts = dict(zip(dict.fromkeys(found.names), found.parts, strict=True))
    assert parts["random_heads_as_written"].shape[:2] == (1, 1)
    assert_close(parts["as_written"][0, 0, 0], torch.from_numpy(vector_as_written(ground).total))
    for n, query in enumerate(EVALUATED):
        kept = [i for i, other in enumerate(QUERIES) if other != query]
        best = [ground.heads[i] for i in np.argsort(-ground.scores[kept].mean(0), kind="stable")[:K]]
        total = torch.zeros(olmo.arch.resid_dim, dtype=torch.float64)
        for head in best:
            z = clean.written[kept, head.layer, head.head].mean(0)
            assert clean.writing
            total += clean.writing.gained(head.layer, olmo.arch.project_head(head.layer, head.head, z))
        assert_close(parts["as_written_held_out"][0, n, 0].double(), total)


def test_heads_are_put_in_place_without_their_own_querys_trials(olmo: LanguageModel) -> None:
    ground, clean = ground_of(olmo)
    (held_out,) = AT_ONCE["heads_in_place_held_out"].versions(ground, 1.0)
    assert held_out.chosen is not None
    assert held_out.values is not None
    for n, query in enumerate(EVALUATED):
        kept = [i for i, other in enumerate(QUERIES) if other != query]
        best = {ground.heads[i] for i in np.argsort(-ground.scores[kept].mean(0), kind="stable")[:K]}
        assert {HeadId(*place) for place in held_out.chosen[n].nonzero().tolist()} == best
        chosen = held_out.chosen[n]
        assert_close(held_out.values[n][chosen], clean.activations[kept].mean(0)[chosen])
    (all_trials,) = AT_ONCE["heads_in_place"].versions(ground, 1.0)
    assert {HeadId(*place) for place in all_trials.chosen[0].nonzero().tolist()} == set(ground.selected)  # type: ignore[index]
    draws = AT_ONCE["random_heads_in_place"].versions(ground, 1.0)
    assert len(draws) == len(ground.draws)


def test_each_layers_part_is_added_at_its_own_layer_times_alpha(olmo: LanguageModel) -> None:
    ground, _ = ground_of(olmo)
    (version,) = AT_ONCE["as_written_by_layer"].versions(ground, 1.5)
    assert version.added is not None
    for layer in range(olmo.arch.n_layers):
        part = vector_as_written(ground).by_layer.get(layer)
        expected = torch.zeros(olmo.arch.resid_dim) if part is None else 1.5 * torch.from_numpy(part)
        assert_close(version.added[0, layer], expected, scale=largest(version.added))


def test_of_what_is_not_known_nothing_is_made(llama: LanguageModel) -> None:
    ground, clean = ground_of(llama)
    ground.clean = replace(clean, writing=None)
    made = {name: kind.versions(ground, 1.0) for name, kind in AT_ONCE.items()}
    assert {name for name, versions in made.items() if versions} == {
        "heads_in_place", "heads_in_place_held_out", "random_heads_in_place"
    }  # fmt: skip
    assert "as_written" not in candidate_vectors(ground).names


def test_a_finished_q_id_says_what_its_heads_do_by_themselves(
    olmo_path: Path, olmo: LanguageModel, csv_path: Path, tmp_path: Path
) -> None:
    run = ["run", "--model", str(olmo_path), "--model_spec", "olmo", "--relation_csv_path", str(csv_path)]
    assert main([*run, "--q_list", "A1", "--topk", "5", "--out_root", str(tmp_path), "--n_trials_per_q", "12"]) == 0
    artifacts = tmp_path / "pairs/A1/artifacts"
    assert main(["verify", str(tmp_path)]) == 0
    controls = json.loads((artifacts / "step6/controls.json").read_text())
    heads = [HeadId(h["layer"], h["head"]) for h in json.loads((artifacts / "top_heads.json").read_text())["heads"]]
    means = torch.load(artifacts / "stepD_mean_acts/qid_A1_clean_mean.pt", weights_only=True)["clean_mean"]
    rows = (artifacts / "step6/layer_0/eval_trials.jsonl").read_text().splitlines()
    backbone = olmo.backbone.in_float32()
    for row, found in zip(map(json.loads, rows), controls["at_once"]["by_prompt"]["heads_in_place"], strict=True):
        with backbone.running():
            scores = naive_together(
                backbone, olmo.tokens.encode(row["prompt"]), row["target_id"],
                {head: means[head.layer, head.head] for head in heads}, {},
            )  # fmt: skip
        assert found == pytest.approx(float(scores.p[0]), rel=rounding(largest(scores.logit, scores.logprob)))
    written = torch.load(artifacts / "step6/fv_as_written.pt", weights_only=True)
    assert written["same_as_fv"] is controls["as_written"]["same_as_fv"] is False
    assert controls["mean_norm_added"]["as_written"] == pytest.approx(float(written["fv_as_written"].norm()))
    assert {"as_written", "as_written_held_out", "random_heads_as_written"} <= controls["meaning"].keys()
    meta = json.loads((artifacts / "step6/layer_1/eval_meta.json").read_text())
    assert meta["mean_norm_hidden"] == controls["mean_norm_hidden"]["1"]
    assert meta["share_of_hidden"] == pytest.approx(meta["fv_norm"] / meta["mean_norm_hidden"])
    summary = json.loads((artifacts / "summary.json").read_text())
    assert summary["carriers"].keys() >= {"heads_in_place", "as_written", "as_written_by_layer"}
    note = "norms what attention writes"
    manifest = json.loads((tmp_path / "pairs/run_manifest.json").read_text())
    assert all(note in notes[0] for notes in (summary["notes"], controls["notes"], manifest["model"]["notes"]))
    assert note in (tmp_path / "pairs/report/index.html").read_text()
