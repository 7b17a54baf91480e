from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity import rounding, size_in
from relfv.stages.summary import conclusions
from relfv.stages.verdict import doubt, in_short

N = 12
CAVEATS = {
    "ability": {"can_do": True, "n_trials": 25},
    "answered_right": {"n_trials": 25},
    "scored_token": {"tells_answers_apart": True},
    "corruption": {
        "how": "derange",
        "n_demos": 225,
        "n_labels_in_place": 0,
        "n_distinct_answers": 12,
        "acc_clean": 0.9,
        "acc_corrupted": 0.1,
    },
}
DRAWN = ("random_heads", "random_heads_scaled", "random_direction")


def controls(zero: float, clean: float, draws: Sequence[float] = (0.1,) * 19, **reached: float) -> dict[str, Any]:
    """controls.json of two layers and twelve prompts: nothing happens at layer 0, ``reached`` at layer 1."""
    wobble = [0.02 * (i % 3 - 1) for i in range(N)]
    return {
        "n_eval": N,
        "n_queries": N,
        "meaning": dict.fromkeys(reached, "..."),
        "mean_norm_added": {"fv": 10.0},
        "mean_norm_hidden": {"0": 10.0, "1": 20.0},
        "as_written": {"known": True, "same_as_fv": True},
        "at_once": {"numbers": {}, "by_prompt": {}},
        "notes": [],
        "zero_shot": {"acc": 0.0, "mean_p": zero},
        "per_layer": {
            layer: {
                name: {"acc": 0.5, "mean_p": p if layer == "1" else zero}
                | ({"mean_p_of_draws": [*draws] if layer == "1" else [zero] * len(draws)} if name in DRAWN else {})
                for name, p in reached.items()
            }
            for layer in ("0", "1")
        },
        "by_prompt": {
            "query_source_index": list(range(N)),
            "p_zero_shot": [zero + w for w in wobble],
            "p_clean": [clean + w for w in wobble],
            **{f"p_{name}": {"0": [zero] * N, "1": [p + w for w in wobble]} for name, p in reached.items()},
        },
    }


def top(called: int = 17, behind: Sequence[int] = (5,) * 20, **meta: int) -> dict[str, Any]:
    counts = {"n_distinguishable": called, "n_called_at_once": 1, "n_queries": 15, **meta}
    return {"heads": [{"mean_delta_p_queries_behind_half": n} for n in behind], "meta": counts}


def said(
    found: dict[str, Any],
    heads: dict[str, Any] | None = None,
    overlap: float | None = 0.81,
    layer: int = 1,
) -> str:
    stability = {"half_overlap": overlap, "chance_overlap": 0.02}
    return conclusions(heads or top(), found, stability, CAVEATS, layer=layer)["verdict"]


def test_the_verdict_says_what_the_numbers_say() -> None:
    verdict = said(controls(0.1, 0.9, fv=0.7, held_out=0.66, random_heads=0.14, random_direction=0.1, mean_hidden=0.3))
    assert verdict.startswith(
        "17 of the top 20 heads are distinguishable from noise; two halves of the queries, with one clean mean for "
        "both, agree on 81% of the 20 (by chance 2%). The function vector closes 75% (95% CI"
    )
    assert "at layer 1, the best of all on these very prompts (12 distinct queries)" in verdict
    assert "; 70% (95% CI" in verdict
    assert "with each query's own trials left out of means, ranking and choice of layer. 12 of 12 queries" in verdict
    assert (
        "random heads of the same layers 5%, random directions of its length 0%, the mean hidden state 25%" in verdict
    )
    assert "is not shown" not in verdict


def short(found: dict[str, Any], **caveats: Any) -> str:
    return in_short(conclusions(top(), found, None, {**CAVEATS, **caveats}, layer=1))


def test_the_verdict_in_short_says_what_is_to_be_believed_and_no_more_than_the_long_one() -> None:
    interval = r"\(95% CI \d+% to \d+%\)"
    sure = short(controls(0.1, 0.9, fv=0.7, held_out=0.66, random_heads=0.14, random_direction=0.1))
    assert re.fullmatch(
        rf"The function vector closes 70% {interval} of the gap, held out; random controls close up to 5% on average\.",
        sure,
    )
    rivalled = short(controls(0.1, 0.9, draws=[0.1] * 18 + [0.75], fv=0.7, held_out=0.66, random_heads=0.14))
    assert rivalled.endswith(
        "the relation's own effect is not shown: 1 of 19 random draws does as well, each at its best layer."
    )
    unsure = controls(0.1, 0.9, fv=0.3, held_out=0.12)
    unsure["by_prompt"]["p_held_out"]["1"] = [0.02, 0.4] + [0.08] * (N - 2)
    assert short(unsure).endswith("of the gap, held out, so that it closes any of it is not shown.")
    assert short(controls(0.4, 0.3, fv=0.6)) == "P is no higher with demos: there is no gap."
    assert "too small or too uncertain" in short(controls(0.4, 0.42, fv=0.6))
    assert short(controls(0.3, 0.9, fv=0.1)) == "The function vector does harm here: P 0.300 without and 0.100 with it."
    unable = {"can_do": False, "n_trials": 25, "clean_acc": {"value": 0.1}, "majority_acc": 0.2, "why_not": "so"}
    unable |= {"clean_acc": {"value": 0.1, "low": 0.0, "high": 0.2}, "judged_by": "scored_token"}
    assert short(controls(0.4, 0.3, fv=0.6), ability=unable).startswith("The model cannot do this relation. P is no")


def test_an_interval_is_no_narrower_than_twelve_queries_allow() -> None:
    found = conclusions(top(), controls(0.1, 0.9, fv=0.884, held_out=0.884), None, CAVEATS, layer=1)
    for share in (found["share_of_gap"]["fv"], found["share_of_gap"]["held_out, layer_chosen_by_others"]):
        assert share["value"] == pytest.approx(0.98)
        assert share["low"] < 0.75
        assert (share["n_closing_half"], share["n_queries"]) == (12, 12)
        assert share["others_up_to"] == pytest.approx(1 - 0.05 ** (1 / 12))
    assert "by their number alone, up to 22% of others may not." in found["verdict"]
    assert "agree" not in found["verdict"]


def test_a_vector_that_does_nothing_is_said_to_do_nothing_and_why() -> None:
    found = controls(0.002, 0.8, fv=0.0024, held_out=0.0021, random_heads=0.0022)
    found["by_prompt"]["p_fv"]["1"] = [p + 0.0004 for p in found["by_prompt"]["p_zero_shot"]]
    verdict = said(found)
    assert (
        "The function vector does nothing here where demos do much: P 0.002 without it and 0.002 with it at " in verdict
    )
    assert "against 0.80 with demos. 0 of 12 queries have half of their own gap closed or more; by their" in verdict
    assert "up to 22% of others may. Controls" in verdict
    assert "closes" not in verdict
    assert "shown" not in verdict
    assert "as long as" not in verdict
    found["mean_norm_added"]["fv"] = 0.04
    verdict = said(found)
    assert "What is added is 0.2% as long as the hidden state there, 0.3% at the median layer." in verdict


def test_where_first_tokens_cannot_tell_answers_apart_whole_answers_lead_and_no_share_is_claimed() -> None:
    token = {"target": "first", "n_trials": 25, "n_answer_shares_it": 25, "n_white_space_alone": 0}
    caveats = {
        **CAVEATS,
        "scored_token": {**token, "tells_answers_apart": False},
        "whole_answers": {"base": 0.0, "with": 0.07, "begun_base": 0.0, "begun_with": 0.5},
    }
    found = controls(0.1, 0.9, fv=0.7, held_out=0.66, random_heads=0.14)
    verdict = conclusions(top(), found, None, caveats, layer=1)["verdict"]
    assert verdict.startswith("Whole answers: 0% right without and 7% with the function vector")
    assert "closes" not in verdict
    assert "Controls" not in verdict
    assert short(found, **caveats) == (
        "Whole answers right: 0% without and 7% with the function vector; the scored tokens do not tell answers apart."
    )


def test_a_vector_that_takes_away_what_is_there_does_harm() -> None:
    verdict = said(controls(0.3, 0.9, fv=0.1))
    assert "does harm here where demos do much: P 0.300 without it and 0.100 with it" in verdict


@pytest.mark.parametrize("rival", DRAWN)
def test_a_control_that_does_as_much_takes_the_claim_back(rival: str) -> None:
    verdict = said(controls(0.1, 0.9, fv=0.7, held_out=0.66, **{rival: 0.71}))
    assert verdict.endswith("not clearly above a random control: that the effect is the relation's own is not shown.")
    one_draw = said(controls(0.1, 0.9, draws=[0.1] * 18 + [0.75], fv=0.7, **{rival: 0.13}))
    assert one_draw.endswith(
        "1 of 19 random draws does as well, each at its best layer: that the effect is the relation's own is not shown."
    )


def test_the_best_layer_of_the_vector_meets_the_best_layer_of_every_draw() -> None:
    found = controls(0.1, 0.9, fv=0.7, random_heads=0.1)
    found["per_layer"]["0"]["random_heads"]["mean_p_of_draws"][7] = 0.71
    assert "1 of 19 random draws does as well" in said(found)


def test_vector_and_draws_choose_among_the_same_layers() -> None:
    found = controls(0.1, 0.9, fv=0.7, random_heads=0.1)
    found["compared_layers"] = [0]  # where nothing happens
    numbers = conclusions(top(), found, None, CAVEATS, layer=1)
    assert numbers["against_random"]["random_heads"]["n_draws_as_good"] == 19
    assert numbers["share_of_gap"]["fv"]["value"] == pytest.approx(0.75)
    assert "19 of 19 random draws do as well" in numbers["verdict"]
    of_one = {"share_of_gap_above": None, "n_draws": 19, "n_draws_as_good": 0}
    rivals = {"a": of_one, "b": {**of_one, "n_draws_as_good": 2}, "c": {**of_one, "n_draws": 5, "n_draws_as_good": 1}}
    assert doubt({**numbers, "against_random": rivals}).startswith("1 of 5 random draws does as well")
    found["compared_layers"] = [1]
    for part in ("per_layer", "by_prompt"):  # where a draw was not made it is not missed
        at_0 = found[part]["0"] if part == "per_layer" else found[part]["p_random_heads"]
        del at_0["random_heads" if part == "per_layer" else "0"]
    numbers = conclusions(top(), found, None, CAVEATS, layer=1)
    assert numbers["against_random"]["random_heads"]["n_draws_as_good"] == 0
    assert numbers["against_random"]["random_heads"]["share_of_gap_above"]["low"] > 0
    assert "is not shown" not in numbers["verdict"]


def test_a_share_that_may_be_nothing_is_not_called_one() -> None:
    found = controls(0.1, 0.9, fv=0.3, held_out=0.12)
    found["by_prompt"]["p_held_out"]["1"] = [0.02, 0.4] + [0.08] * (N - 2)
    verdict = said(found)
    assert verdict.count("so that it closes any of it is not shown") == 1
    assert "choice of layer, so that it closes any of it is not shown." in verdict


def test_the_best_of_many_layers_of_noise_is_no_effect() -> None:
    """Twelve queries whose P goes up and down by luck alone at 32 layers, and the best of them."""
    rng = np.random.default_rng(1)
    claimed = 0
    for _ in range(40):
        found = controls(0.3, 0.9, fv=0.3)
        p = np.clip(0.3 + 0.15 * rng.standard_normal((32, N)), 0, 1)
        found["by_prompt"]["p_fv"] = {str(layer): row.tolist() for layer, row in enumerate(p)}
        found["per_layer"] = {str(layer): {"fv": {"acc": 0.5, "mean_p": row.mean()}} for layer, row in enumerate(p)}
        found["mean_norm_hidden"] = dict.fromkeys(found["per_layer"], 20.0)
        verdict = said(found, layer=int(p.mean(1).argmax()))
        claimed += "closes" in verdict and "so that it closes any of it is not shown" not in verdict
    assert claimed <= 4


def test_the_layer_is_the_one_of_step6_and_held_out_queries_follow_the_same_score() -> None:
    found = controls(0.1, 0.9, fv=0.7, held_out=0.6)
    found["by_prompt"]["logit_held_out"] = {"0": [2.0] * N, "1": [1.0] * N}
    numbers = conclusions(top(), found, None, CAVEATS, layer=0, score_key="mean_delta_logit")
    assert numbers["layer"] == 0
    assert numbers["share_of_gap"]["fv"]["value"] == pytest.approx(0)
    assert numbers["share_of_gap"]["held_out, layer_chosen_by_others"]["value"] == pytest.approx(0)


def test_a_control_that_is_at_one_of_the_compared_layers_alone_is_no_rival_over_all_of_them() -> None:
    found = controls(0.1, 0.9, fv=0.7, held_out=0.66, random_heads=0.14, random_heads_as_written=0.3)
    found["compared_layers"] = [1, 0]
    del found["per_layer"]["0"]["random_heads_as_written"]
    del found["by_prompt"]["p_random_heads_as_written"]["0"]
    stability = {"half_overlap": 0.81, "chance_overlap": 0.02}
    numbers = conclusions(top(), found, stability, CAVEATS, layer=1)
    assert numbers["p"]["random_heads_as_written"] == pytest.approx(0.3)
    assert "random_heads_as_written" not in numbers["against_random"]


def test_a_control_that_overflows_is_left_out() -> None:
    found = controls(0.1, 0.9, fv=0.7, random_direction=0.1)
    found["by_prompt"]["p_random_direction"]["1"][3] = None
    verdict = said(found)
    assert "closes 75%" in verdict
    assert "Controls" not in verdict


def test_no_share_is_claimed_where_there_is_no_gap() -> None:
    assert "P is no higher with demos (0.4 without them, 0.3 with)" in said(controls(0.4, 0.3, fv=0.6))
    verdict = said(controls(0.4, 0.42, fv=0.6))
    assert "too small or too uncertain" in verdict
    assert "closes" not in verdict.replace("what share of it the function vector closes", "")


def test_with_very_few_queries_no_head_can_be_called() -> None:
    heads = top()
    for n_queries, words in ((1, "with 1 query no head can be"), (5, "with 5 queries no head can be")):
        heads["meta"] |= {"n_distinguishable": 0, "n_called_at_once": 2560, "n_queries": n_queries}
        assert words in said(controls(0.1, 0.9, fv=0.7), heads=heads)
    heads["meta"] |= {"n_called_at_once": 40, "n_queries": 10}
    assert "with 10 queries 40 heads would have to be at once" in said(controls(0.1, 0.9, fv=0.7), heads=heads)


def test_what_is_not_known_is_not_said() -> None:
    verdict = said(controls(0.1, 0.9, fv=0.7), heads={"heads": [{}], "meta": {}})
    assert "distinguishable" not in verdict
    assert "other queries" not in verdict
    assert "Controls" not in verdict
    assert "agree" not in said(controls(0.1, 0.9, fv=0.7), overlap=None)


def test_effects_of_few_queries_are_named_and_why_none_is_called() -> None:
    found = controls(0.1, 0.9, fv=0.7)
    verdict = said(found, top(behind=[5] * 17 + [2, 1, 1]))
    assert "distinguishable from noise; of 3 of the 20, half the effect comes from one or two queries;" in verdict
    none = said(found, top(0, n_called_at_once=40, n_queries=10))
    assert (
        "0 of the top 20 heads are distinguishable from noise (with 10 queries 40 heads would have to be at once)"
        in none
    )
    assert "at once" not in said(found, top(3, n_called_at_once=40))


def test_a_finished_q_id_has_its_conclusions(finished: Path) -> None:
    artifacts = finished / "A1/artifacts"
    summary = json.loads((artifacts / "summary.json").read_text())
    found = json.loads((artifacts / "step6/controls.json").read_text())
    layers = json.loads((artifacts / "step6/step6_all_layers_summary.json").read_text())
    for layer, results in layers["per_layer"].items():
        spec = json.loads((artifacts / results["eval_summary_path"]).read_text())
        again = found["per_layer"][layer]["fv"]
        # A probability moves by the share of itself by which its logarithm moves.
        limit = rounding(size_in(artifacts / f"step6/layer_{layer}/eval_trials.jsonl"))
        assert again["mean_p"] == pytest.approx(spec["mean_p_with"], rel=limit)
        assert again["acc"] == pytest.approx(spec["acc_with"])
        assert again["ci_low"] <= again["mean_delta_p"] <= again["ci_high"]
    assert summary["verdict"]
    (line,) = [line for line in (finished / "run.log").read_text().splitlines() if " A1 summary " in line]
    assert line.endswith(f" s: {in_short(summary)}")
    assert len(line) < 400 < len(summary["verdict"])
    assert summary["layer"] == layers["best_layer"]
    assert summary["n_heads_distinguishable"] == sum(
        head["distinguishable"] for head in json.loads((artifacts / "top_heads.json").read_text())["heads"]
    )
