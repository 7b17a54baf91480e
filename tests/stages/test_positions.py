"""Heads at earlier tokens: against plain hooks, with a planted head, and which tokens they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from folders import arguments, contents
from parity import largest, rounding
from planted import RELATIONS, leave_one_head_after_layer_1
from relfv.cli import main
from relfv.engine.hooks import editing_inputs
from relfv.engine.reference import AtTokens, ReferenceEngine, naive_baseline
from relfv.language_model import open_model
from relfv.report.written_tables import statuses_of, table_of
from relfv.settings import Settings
from relfv.stages import function_vector, positions
from relfv.stages.positions import places_in
from relfv.stages.stage import Work
from relfv.stages.table import STEP_D
from relfv.store.folder import QidFolder
from relfv.types import HeadId, Prompts
from zoo import ZOO, backbone_of

POSITIONS = "stepD_positions/positions.json"


@pytest.mark.parametrize(
    "family",
    [
        "Llama 2, Llama 3: grouped keys",
        "GPT-2: Conv1D, learned positions",
        "Gemma 2: soft caps, window in some layers, norms after attention",
    ],
)
def test_heads_set_at_any_tokens_are_what_plain_hooks_find(family: str) -> None:
    backbone = backbone_of(ZOO[family].build)
    arch, prompts = backbone.arch, [[5, 9, 44, 17, 23, 80, 11, 3], [7, 12, 90, 31, 2, 60, 41, 8, 19]]
    places = [[1, 4, 6], [2, 3, 8]]
    values = torch.randn(3, arch.n_layers, arch.n_heads, arch.head_dim, generator=torch.Generator().manual_seed(1))
    one, other = HeadId(0, 1), HeadId(2, 3)
    versions = [AtTokens((one,), (0, 1)), AtTokens((one, other), (2,)), AtTokens((other,), (0, 1, 2))]
    targets = [33, 71]
    engine = ReferenceEngine(backbone)
    found = engine.set_at_tokens(Prompts(prompts, targets), places, values, versions)
    in_parts = engine.set_at_tokens(Prompts(prompts, targets), places, values, versions, per_pass=2)
    assert in_parts.per_pass == 2
    plain = backbone.in_float32()
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        for v, version in enumerate(versions):

            def patching(layer: int, version: AtTokens = version, i: int = i):  # type: ignore[no-untyped-def]
                def patch(z: torch.Tensor) -> torch.Tensor:
                    z = z.clone()
                    for head in version.heads:
                        for slot in version.slots if head.layer == layer else ():
                            start = head.head * arch.head_dim
                            z[0, places[i][slot], start : start + arch.head_dim] = values[slot, layer, head.head]
                    return z

                return patch

            layers = {head.layer for head in version.heads}
            with plain.running(), editing_inputs([(arch.out_projs[layer], patching(layer)) for layer in layers]):
                truth = naive_baseline(plain, prompt, target)
            limit = rounding(largest(truth.logit, truth.logprob))
            for effects in (found, in_parts):
                assert float(effects.edited.logprob[i, v]) == pytest.approx(float(truth.logprob[0]), abs=limit)
        assert abs(float(found.edited.logprob[i, 0] - found.base.logprob[i])) > 1e-3


def test_a_q_id_gets_the_effects_of_means_at_each_class_of_tokens(
    llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    few = [text for name in ("n_trials_per_q", "n_demos", "topk") for text in (f"--{name}", "3")]
    command = arguments(llama_path, csv_path, tmp_path, "--q_list", "A1", *few)
    assert main([*command, "--extras", "positions"]) == 0
    folder = tmp_path / "pairs"
    assert main(["verify", str(folder)]) == 0
    assert "Earlier tokens" in (folder / "report/index.html").read_text()
    after = contents(folder / "A1/artifacts")
    document, trials = json.loads(after[POSITIONS]), json.loads(after["sampled_trials.json"])["trials"]
    rows = table_of("positions", statuses_of(folder))
    assert len(rows) == 4 * (2 + 3)
    # Of a P of 0.005 at most, the float32 logarithm of which is up to 23.
    limit = 0.005 * rounding(23)
    # At the last token it is StepD's effect.
    cie = [row.split(",") for row in after["cie_scores.csv"].decode().splitlines()[1:]]
    effect = {(int(row[1]), int(row[2])): float(row[4]) for row in cie}
    for head in document["heads"]:
        assert head["last"]["mean_delta_p"] == pytest.approx(effect[head["layer"], head["head"]], abs=limit)

    model = open_model(str(llama_path))
    backbone, arch = model.backbone.plain().in_float32(), model.arch
    first = min(document["heads"], key=lambda head: head["layer"])
    start, projection = first["head"] * arch.head_dim, arch.out_projs[first["layer"]]

    def labels_in(text: str) -> list[int]:
        """By tokenising what comes before: the tests' tokenizer merges nothing across a line break."""
        return [len(model.tokens.encode(text[:i])) - 1 for i in range(len(text)) if text.startswith("\n\n", i)]

    seen: list[torch.Tensor] = []
    with backbone.running():
        for trial in trials:
            at = labels_in(trial["clean_prompt_str"])
            with editing_inputs([(projection, lambda z, at=at: seen.append(z[0, at, start : start + 10]))]):
                naive_baseline(backbone, model.tokens.encode(trial["clean_prompt_str"]), 0)
    means = torch.stack(seen).double().mean(0).float()
    assert means.shape == (3, 10)
    found = []
    for trial in trials:
        prompt, at = trial["corrupted_prompt_str"], labels_in(trial["corrupted_prompt_str"])

        def patch(z: torch.Tensor, at: list[int] = at) -> torch.Tensor:
            z = z.clone()
            z[0, at, start : start + 10] = means
            return z

        ids, target = model.tokens.encode(prompt), trial["target_first_token_id"]
        with backbone.running():
            base = naive_baseline(backbone, ids, target)
            with editing_inputs([(projection, patch)]):
                found.append(float(naive_baseline(backbone, ids, target).p[0] - base.p[0]))
    assert first["label"]["mean_delta_p"] == pytest.approx(sum(found) / len(found), abs=limit)
    assert abs(first["label"]["mean_delta_p"]) > 10 * limit


def test_a_head_that_nothing_reads_later_counts_at_the_last_token_alone(tmp_path: Path) -> None:
    planted = HeadId(2, 8)
    leave_one_head_after_layer_1(planted, tmp_path / "model")
    model, settings = open_model(str(tmp_path / "model")), Settings(model="demo", n_trials_per_q=6, topk=1)
    folder = QidFolder(tmp_path / "artifacts", "Q27")
    work = Work(folder, settings, lambda: model, relation=RELATIONS["Q27"], csv_sha256="0" * 64)
    for stage in (*STEP_D, function_vector.STAGE, positions.STAGE):
        stage.step().run(work)
    (top,) = work.read(positions.POSITIONS)["heads"]
    assert HeadId(top["layer"], top["head"]) == planted
    assert top["last"]["mean_delta_p"] > 0.1
    assert all(abs(top[name]["mean_delta_p"]) < 1e-5 for name in ("label", "separator", "query"))


def test_a_token_that_holds_more_than_a_label_is_its_last() -> None:
    text = "Q: a\nA: b c.\n\nQ: d\nA:"
    pieces = ["", "Q:", " a", "\nA:", " b", " c", ".\n\n", "Q:", " d", "\n", "A:"]
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    assert places_in(text, ends) == {"label": [6], "separator": [6], "query": [8]}
    apart = [end for end in ends if end != 14] + []
    apart[6:6] = [12, 12, 14]  # two bytes of one letter, then the line breaks
    assert places_in(text, apart) == {"label": [7], "separator": [8], "query": [10]}
