from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from parity import rounding, size_in
from relfv.stages.summary import conclusions

N = 12
DRAWN = ("random_heads", "random_heads_scaled", "random_direction")


def controls(zero: float, clean: float, draws: Sequence[float] = (0.1,), **reached: float) -> dict[str, Any]:
    """controls.json of two layers and twelve prompts: nothing happens at layer 0, ``reached`` at layer 1."""
    wobble = [0.02 * (i % 3 - 1) for i in range(N)]
    return {
        "n_eval": N,
        "n_queries": N,
        "meaning": dict.fromkeys(reached, "..."),
        "zero_shot": {"acc": 0.0, "mean_p": zero},
        "per_layer": {
            layer: {name: {"acc": 0.5, **({"mean_p_of_draws": draws} if name in DRAWN else {})} for name in reached}
            for layer in ("0", "1")
        },
        "by_prompt": {
            "query_source_index": list(range(N)),
            "p_zero_shot": [zero + w for w in wobble],
            "p_clean": [clean + w for w in wobble],
            **{f"p_{name}": {"0": [zero] * N, "1": [p + w for w in wobble]} for name, p in reached.items()},
        },
    }


TOP = {"heads": [{}] * 20, "meta": {"n_distinguishable": 17}}


def said(found: dict[str, Any], top: dict[str, Any] = TOP, overlap: float | None = 0.81) -> str:
    return conclusions(top, found, {"half_overlap": overlap, "chance_overlap": 0.02})["verdict"]


def test_the_verdict_says_what_the_numbers_say() -> None:
    verdict = said(controls(0.1, 0.9, fv=0.7, held_out=0.66, random_heads=0.14, random_direction=0.1, mean_hidden=0.3))
    assert verdict.startswith(
        "17 of the top 20 heads are distinguishable from noise; two halves of the queries agree on 81% of them (by "
        "chance 2%)"
    )
    assert "closes 75% (95% CI" in verdict
    assert "at layer 1, the best of all on these very prompts (12 distinct queries)" in verdict
    assert "; 70% (95% CI" in verdict
    assert "with each query's own trials left out of means, ranking and choice of layer" in verdict
    assert "other heads' vectors 5%, random directions of its length 0%, the mean hidden state 25%" in verdict
    assert "is not shown" not in verdict


def test_a_control_that_does_as_much_takes_the_claim_back() -> None:
    for rival in DRAWN:
        verdict = said(controls(0.1, 0.9, fv=0.7, held_out=0.66, **{rival: 0.71}))
        assert verdict.endswith("reaches the vector's interval: that the effect is the relation's own is not shown.")
    one_draw = said(controls(0.1, 0.9, draws=[0.1, 0.1, 0.1, 0.1, 0.75], fv=0.7, random_heads_scaled=0.23))
    assert one_draw.endswith("the relation's own is not shown.")


def test_a_share_that_may_be_nothing_is_not_called_one() -> None:
    found = controls(0.1, 0.9, fv=0.3, held_out=0.12)
    found["by_prompt"]["p_held_out"]["1"] = [0.02, 0.4] + [0.08] * (N - 2)
    verdict = said(found)
    assert verdict.count("so that it closes any of it is not shown") == 1
    assert verdict.endswith("choice of layer, so that it closes any of it is not shown.")


def test_a_control_that_overflows_is_left_out() -> None:
    found = controls(0.1, 0.9, fv=0.7, random_direction=0.1)
    found["by_prompt"]["p_random_direction"]["1"][3] = None
    verdict = said(found)
    assert "closes 75%" in verdict
    assert "Controls" not in verdict


def test_no_share_is_claimed_where_there_is_no_gap() -> None:
    assert "Demos do not help this model here" in said(controls(0.4, 0.3, fv=0.6))
    verdict = said(controls(0.4, 0.42, fv=0.6))
    assert "too small or too uncertain" in verdict
    assert "closes" not in verdict.replace("what share of it the function vector closes", "")


def test_what_is_not_known_is_not_said() -> None:
    verdict = said(controls(0.1, 0.9, fv=0.7), top={"heads": [{}], "meta": {}})
    assert "distinguishable" not in verdict
    assert "other queries" not in verdict
    assert "Controls" not in verdict
    assert "agree" not in said(controls(0.1, 0.9, fv=0.7), overlap=None)


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
    assert summary["n_heads_distinguishable"] == sum(
        head["distinguishable"] for head in json.loads((artifacts / "top_heads.json").read_text())["heads"]
    )
