"""Heads and directions taken away from clean prompts: against plain hooks, with a planted head, and where there is no
relation."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folders import arguments, contents, rewrite
from head_statistics import mixed
from parity import largest, rounding
from planted import RELATIONS, leave_one_head_after_layer_1
from relfv.cli import main
from relfv.engine.passes import capture_heads, reading_blocks
from relfv.engine.reference import naive_together
from relfv.language_model import open_model
from relfv.report.written_tables import statuses_of, table_of
from relfv.settings import Settings
from relfv.stages.ablation_edits import drawn_by_length, ladder, sets_of_heads
from relfv.stages.ablation_words import verdict_of_ablation
from relfv.stages.other_relations import trials_of_others
from relfv.stages.trials import ineligible_reason
from relfv.types import HeadId


def test_a_finished_q_id_gets_what_plain_hooks_find_and_nothing_else_changes(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "pairs"))
    artifacts, command = folder / "A1/artifacts", arguments(llama_path, csv_path, tmp_path, "--q_list", "A1")
    before = contents(artifacts)
    assert main([*command, "--extras", "ablation"]) == 0
    first = contents(artifacts)
    assert {name for name in first if first[name] != before.get(name)} == {"stepE/ablation.json"}
    document = json.loads(first["stepE/ablation.json"])
    assert "Enough, and needed?" in (folder / "report/index.html").read_text()
    assert main(["verify", str(folder)]) == 0
    rows = {(r["without"], r["how"], r["layer"]): r for r in table_of("ablation", statuses_of(folder))}
    asked = [row["asks"] for row in document["table"]]
    assert asked == ["sufficient"] * 2 + ["necessary"] * 6
    top = document["heads"]["top"]["swapped"]
    assert rows["top", "swapped", None]["mean_delta_logprob"] == top["mean_delta_logprob"]
    assert rows["fv", "alone", 2]["mean_p_with"] == document["directions"]["fv"]["per_layer"]["2"]["mean_p"]
    (artifacts / "stepE/ablation.json").unlink()
    assert main(command) == 0  # what was asked for once is made again
    assert contents(artifacts) == first

    trials = json.loads(first["sampled_trials.json"])["trials"]
    heads = [HeadId(h["layer"], h["head"]) for h in json.loads(first["top_heads.json"])["heads"]]
    fv = torch.load(artifacts / "fv_global_resid.pt", weights_only=True)["fv_global_resid"].double()
    unit = (fv / fv.norm()).float()
    model = open_model(str(llama_path))
    backbone, layers = model.backbone.plain().in_float32(), range(model.arch.n_layers)
    clean, shuffled = (
        [model.tokens.encode(t[f"{kind}_prompt_str"]) for t in trials] for kind in ("clean", "corrupted")
    )
    with backbone.running(), reading_blocks(backbone, shuffled) as blocks:
        z, _ = capture_heads(backbone, shuffled)
    others = document["other_relations"]["prompts"]
    with backbone.running():
        of_others, _ = capture_heads(backbone, [model.tokens.encode(prompt["clean_prompt_str"]) for prompt in others])
    along = {layer: (blocks[layer].double().mean(0).cpu() @ unit.double()).float() * unit for layer in layers}
    everywhere = dict.fromkeys(layers, unit)
    for i in (0, 7, 24):
        target = trials[i]["target_first_token_id"]
        set_to = {
            "swapped": z[i],
            "mean": z.double().mean(0).float(),
            "zero": torch.zeros_like(z[i]),
            "other_relations": of_others.double().mean(0).float(),
        }
        edits: dict[str, tuple[dict[Any, Any], ...]] = {
            **{f"top, {how}": ({h: v[h.layer, h.head] for h in heads}, {}, {}) for how, v in set_to.items()},
            "fv, all": ({}, {}, everywhere),
            "fv, all_to_mean": ({}, along, everywhere),
            "fv, 1": ({}, {}, {1: unit}),
        }
        for name, edit in edits.items():
            with backbone.running():
                scores = naive_together(backbone, clean[i], target, *edit)
            limit = rounding(largest(scores.logit, scores.logprob))
            assert document["by_prompt"]["p_without"][name][i] == pytest.approx(float(scores.p[0]), rel=limit), name

    def another_head(path: Path) -> None:
        changed = json.loads(path.read_text())
        changed["heads"]["top"]["heads"].reverse()
        path.write_text(json.dumps(changed))

    rewrite(artifacts, "stepE/ablation.json", another_head)
    assert main(["verify", str(folder)]) == 1


def test_other_relations_are_those_of_the_csv_whatever_has_been_run_and_a_change_of_theirs_is_noticed(
    finished: Path, llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_csv = Path(shutil.copy(csv_path, tmp_path / "pairs.csv"))
    artifacts = Path(shutil.copytree(finished / "A1", tmp_path / "pairs/A1")) / "artifacts"  # B2 has not been run there
    command = arguments(llama_path, own_csv, tmp_path, "--q_list", "A1")

    def foretold() -> str:
        assert main([*command, "--dry_run"]) == 0
        return capsys.readouterr().out

    assert main([*command, "--extras", "ablation"]) == 0
    first = contents(artifacts)
    document = json.loads(first["stepE/ablation.json"])
    assert {prompt["q_id"] for prompt in document["other_relations"]["prompts"]} == {"B2"}  # C3 has too few rows
    frozen = json.loads((finished / "B2/artifacts/sampled_trials.json").read_text())["trials"]
    texts = [prompt["clean_prompt_str"] for prompt in document["other_relations"]["prompts"]]
    assert texts[:25] == [trial["clean_prompt_str"] for trial in frozen]
    assert len(texts) == document["other_relations"]["n_prompts"] == 50
    assert document["against_random_other_relations"].keys() == document["against_random"].keys()

    rows = own_csv.read_text()
    own_csv.write_text(rows.replace("C3,dog,puppy", "C3,dog,hound"))
    assert "to be added" not in foretold()
    own_csv.write_text(rows.replace("B2,peru,lima", "B2,peru,cusco"))
    assert "stepE_ablation to be added" in foretold()
    own_csv.write_text("".join(row for row in rows.splitlines(keepends=True) if row[:3] in ("id,", "A1,")))
    assert main(command) == 0
    assert "of other relations' rows than the CSV has now" in capsys.readouterr().err
    again = contents(artifacts)
    assert {name for name in again if again[name] != first[name]} == {"stepE/ablation.json"}
    alone = json.loads(again["stepE/ablation.json"])
    assert "no other relation with rows enough" in alone["other_relations"]["not_available"]
    assert alone["against_random_other_relations"] == {}
    assert "other_relations" not in alone["heads"]["top"]
    assert len(alone["table"]) == len(document["table"]) - 1


def test_of_many_relations_as_many_as_prompts_are_drawn_evenly_and_a_copy_is_no_other() -> None:
    relation = RELATIONS["Q1"]
    drawn = trials_of_others(relation, Settings())
    assert drawn.keys() == {q_id for q_id, one in RELATIONS.items() if not ineligible_reason(one, 9)} - {"Q1"}
    assert {len(trials) for trials in drawn.values()} == {1, 2}
    assert sum(map(len, drawn.values())) == 50
    copied = replace(relation, csv_pairs={**relation.csv_pairs, "Q2": relation.pairs})
    assert "Q2" not in trials_of_others(copied, Settings())
    many = {f"{q_id}_{i}": pairs for i in range(3) for q_id, pairs in relation.csv_pairs.items() if q_id != "Q1"}
    assert {len(its) for its in trials_of_others(replace(relation, csv_pairs=many), Settings()).values()} == {1}


def run_with_one_head(tmp_path: Path, model: str, relation: str, *more: str) -> dict[str, Any]:
    command = ["run", "--model", model, "--q_list", relation, "--topk", "1", "--out_root", str(tmp_path / "out")]
    assert main([*command, "--extras", "ablation", *more]) == 0
    (path,) = (tmp_path / "out").rglob("ablation.json")
    return json.loads(path.read_text())


def test_without_the_planted_head_what_it_makes_is_gone_and_without_others_it_is_not(tmp_path: Path) -> None:
    planted = HeadId(2, 8)
    dead = leave_one_head_after_layer_1(planted, tmp_path / "model")
    found = run_with_one_head(tmp_path, str(tmp_path / "model"), "Q27", "--model_spec", "auto")
    heads = found["heads"]
    assert heads["top"]["heads"] == [vars(planted)]
    for how in ("swapped", "mean", "zero"):
        assert heads["top"][how]["share_of_gap"]["low"] > 0.5, how
        assert heads["top"][how]["mean_delta_logprob"] < -0.5, how
    assert heads["top_held_out"]["swapped"]["share_of_gap"]["low"] > 0.5
    (bottom,) = heads["bottom"]["heads"]
    assert HeadId(**bottom) in dead
    assert heads["bottom"]["zero"]["mean_delta_p"] == pytest.approx(0, abs=1e-4)
    # Of 16 heads of its layer a draw may be the planted one itself.
    draws = np.array(heads["random_of_layers"]["swapped"]["mean_p_of_draws"])
    assert (np.abs(draws - found["clean"]["mean_p"]) < 1e-4).sum() >= 15
    assert found["against_random"]["random_of_norm"]["ci_low"] > 0.1
    assert found["directions"]["fv"]["all"]["share_of_gap"]["value"] > 0.5


def test_where_labels_carry_no_relation_nothing_is_said_to_be_lost(tmp_path: Path) -> None:
    relation, path = mixed(RELATIONS, 12, random.Random("ablation")), tmp_path / "null.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "ex_A", "ex_B"), *(("N1", p.input, p.output) for p in relation.pairs)])
    found = run_with_one_head(tmp_path, "demo", "N1", "--relation_csv_path", str(path))
    assert "Right labels bring too little here" in found["verdict"]
    changes = [found["heads"][name]["swapped"] for name in ("top", "top_held_out", "bottom", "random_of_norm")]
    assert all(change["share_of_gap"] is None for change in changes)
    assert all(abs(change["mean_delta_p"]) < 0.05 for change in changes)


HEADS = [HeadId(layer, head) for layer in range(4) for head in range(4)]
CIE = dict(zip(HEADS, np.linspace(0.5, -0.26, 16), strict=True))


class _Ground:
    """What sets of heads are taken from."""

    generator_seed, draws = 1, [[HEADS[5], HEADS[6]]]

    def __init__(self, selected: list[HeadId]) -> None:
        self.selected = selected


def test_sets_are_the_best_the_most_negative_and_the_least_of_the_others() -> None:
    lengths = {head: float(i) for i, head in enumerate(HEADS)}
    sets = sets_of_heads(_Ground([HEADS[0], HEADS[15]]), HEADS, CIE, lengths)  # type: ignore[arg-type]
    assert sets["top"] == [[HEADS[0], HEADS[15]]]
    assert sets["writers"] == [[HEADS[0]]]
    assert sets["cancellers"] == [[HEADS[14], HEADS[13]]]
    assert sets["bottom"] == [[HEADS[10], HEADS[9]]]
    assert sets["top_1"] == [[HEADS[0]]]
    assert sets["top_4"] == [HEADS[:4]]
    assert sets["random_of_layers"] == _Ground.draws
    assert len(sets["random_of_norm"]) == 19
    assert "writers" not in sets_of_heads(_Ground(HEADS[:2]), HEADS, CIE, lengths)  # type: ignore[arg-type]
    assert ladder(20, 30) == [1, 5, 10]


def test_heads_of_about_the_same_length_are_drawn_and_never_the_same_twice_in_a_set() -> None:
    lengths = {head: 2.0**i for i, head in enumerate(HEADS)}
    draws = drawn_by_length(HEADS[::3], [h for h in HEADS if h not in HEADS[::3]], lengths, random.Random(0))
    assert all(len({*draw}) == len(HEADS[::3]) == 6 for draw in draws)
    assert not {head for draw in draws for head in draw} & {*HEADS[::3]}
    (longest,) = {
        max(draw, key=lambda h: lengths[h])
        for draw in drawn_by_length([HEADS[15]], HEADS[14:15], lengths, random.Random(0))
    }
    assert longest == HEADS[14]
    near = {head for draw in drawn_by_length([HEADS[0]], HEADS[1:], lengths, random.Random(0)) for head in draw}
    assert near <= {*HEADS[1:6]}
    assert drawn_by_length(HEADS[:9], HEADS[9:], lengths, random.Random(0)) == []


def share(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "high_of_mean": high}


@pytest.mark.parametrize(
    ("lost", "rival", "said"),
    [
        (share(0.8, 0.6, 0.95), {"ci_low": 0.2, "n_draws_as_low": 0}, "So these heads are needed there for that much."),
        (share(0.8, 0.6, 0.95), {"ci_low": 0.2, "n_draws_as_low": 1}, "Random heads do about as much harm"),
        (share(0.8, 0.6, 0.95), {"ci_low": None, "n_draws_as_low": 0}, "Random heads do about as much harm"),
        (share(0.2, -0.1, 0.5), {"ci_low": 0.2, "n_draws_as_low": 0}, "That they are needed is not shown."),
        (share(0.0, -0.02, 0.03), {"ci_low": -0.1, "n_draws_as_low": 9}, "So the model does without them there"),
    ],
)
def test_the_words_claim_no_more_than_the_numbers(lost: Any, rival: Any, said: str) -> None:
    one = {"mean_p": 0.3, "share_of_gap": lost}
    document = {
        "k": 20,
        "clean": {"mean_p": 0.8},
        "shuffled": {"mean_p": 0.2},
        "heads": {"top": {"swapped": one, "mean": one}},
        "directions": {},
        "against_random": {"random_of_layers": rival},
    }
    words = verdict_of_ablation(document, {"scored_token": {"tells_answers_apart": True}})
    assert said in words
    assert "P goes from 0.80 to 0.30" in words
    assert "needed" not in verdict_of_ablation(document, {"scored_token": {"tells_answers_apart": False}})
