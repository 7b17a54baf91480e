from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from relfv.shares import Gap
from relfv.stages.carrier import carrier_numbers, carrier_sentences, heads_in_short

N = 12
WOBBLE = [0.02 * (i % 3 - 1) for i in range(N)]


def controls(
    *, written: float | None = None, draws: tuple[float, ...] = (0.1, 0.1), **reached: float
) -> dict[str, Any]:
    """controls.json of two layers: what heads and vectors reach between P 0.1 zero-shot and 0.9 clean."""
    as_written = {} if written is None else {"as_written": written, "as_written_held_out": written - 0.05}
    return {
        "meaning": dict.fromkeys(["fv", *as_written], "..."),
        "notes": ["this family norms"] if as_written else [],
        "mean_norm_added": {"fv": 50.0},
        "mean_norm_hidden": {"0": 100.0, "1": 25_000.0},
        "as_written": {"known": True, "same_as_fv": written is None},
        "per_layer": {
            "0": {name: {"acc": 0.0, "mean_p": 0.1} for name in as_written},
            "1": {name: {"acc": 0.5, "mean_p": p} for name, p in as_written.items()},
        },
        "by_prompt": {
            "query_source_index": list(range(N)),
            "p_zero_shot": [0.1 + w for w in WOBBLE],
            "p_clean": [0.9 + w for w in WOBBLE],
            **{f"p_{name}": {"0": [0.1] * N, "1": [p + w for w in WOBBLE]} for name, p in as_written.items()},
        },
        "at_once": {
            "numbers": {
                name: {"acc": 0.5, "mean_p": p, **({"mean_p_of_draws": list(draws)} if "random" in name else {})}
                for name, p in reached.items()
            },
            "by_prompt": {name: [p + w for w in WOBBLE] for name, p in reached.items()},
        },
    }


def said(found: dict[str, Any], fv: float = 0.0, layer: int = 1) -> str:
    share = {"value": fv, "low": fv - 0.01, "high": fv + 0.01, "high_of_mean": fv + 0.01}
    return carrier_sentences({"share_of_gap": {"fv": share}, **numbers(found, layer)})


def in_short(found: dict[str, Any], fv: float = 0.0) -> str:
    share = {"value": fv, "low": fv - 0.01, "high": fv + 0.01, "high_of_mean": fv + 0.01}
    return heads_in_short({"share_of_gap": {"fv": share}, **numbers(found)})


def numbers(found: dict[str, Any], layer: int = 1) -> dict[str, Any]:
    prompts = found["by_prompt"]
    zero, clean = np.array(prompts["p_zero_shot"]), np.array(prompts["p_clean"])
    effects = {
        name.removeprefix("p_"): np.array([*by_layer.values()]).T - zero[:, None]
        for name, by_layer in prompts.items()
        if isinstance(by_layer, dict)
    }
    return carrier_numbers(found, layer, Gap(zero, clean, prompts["query_source_index"]), effects)


IN_PLACE = {"heads_in_place": 0.8, "heads_in_place_held_out": 0.74, "as_written_by_layer": 0.5}


def test_heads_that_carry_what_their_vector_does_not_are_told_from_heads_that_carry_nothing() -> None:
    verdict = said(controls(**IN_PLACE, random_heads_in_place=0.1))
    assert (
        "The heads themselves put in place (their mean activations instead of a vector, held out) close 80%" in verdict
    )
    assert "random heads of the same layers 0%" in verdict
    assert "So the heads carry more of the relation than the vector: as defined" in verdict
    assert "it is the wrong carrier here" in verdict
    nothing = said(controls(heads_in_place=0.1, heads_in_place_held_out=0.1))
    assert "So neither the vector nor its heads carry the relation here." in nothing
    assert "wrong carrier" not in nothing
    assert "carrier" not in said(controls(**IN_PLACE, random_heads_in_place=0.1), fv=0.9)
    short = in_short(controls(**IN_PLACE, random_heads_in_place=0.1))
    assert short.startswith("Its heads put in place close 80% (95% CI ")
    assert in_short(controls(heads_in_place=0.1, heads_in_place_held_out=0.1)) == ""
    assert in_short(controls(**IN_PLACE, random_heads_in_place=0.1), fv=0.9) == ""
    assert in_short(controls(**IN_PLACE, random_heads_in_place=0.75)) == ""


def test_a_family_that_norms_is_named_with_what_its_heads_really_write() -> None:
    verdict = said(controls(written=0.5, **IN_PLACE, random_heads_in_place=0.1))
    assert "wrong carrier in this family, which norms or scales what attention writes" in verdict
    assert "What they really write, added at layer 1, closes 50%" in verdict
    assert "(44% held out)" in verdict
    assert "each layer's part at its own layer 50%" in verdict


def test_other_heads_that_do_as_much_take_the_claim_back() -> None:
    for rival in ({"draws": (0.1, 0.8)}, {"random_heads_in_place": 0.75}):
        verdict = said(controls(**IN_PLACE, **{"random_heads_in_place": 0.12, **rival}))  # type: ignore[arg-type]
        assert "Random heads put in place may do as much" in verdict
        assert "wrong carrier" not in verdict


def test_a_vector_that_is_short_beside_the_hidden_state_is_called_so() -> None:
    found = controls(**IN_PLACE)
    assert numbers(found)["share_of_hidden"] == pytest.approx(0.002)
    assert "0.2% as long as the hidden state there, 25% at the median layer" in said(found)
    assert "as long as" not in said(found, layer=0)
    found["mean_norm_hidden"]["2"] = 20_000.0
    assert "50% as long as the hidden state there, 0.25% at the median layer" in said(found, layer=0)


def test_nothing_is_said_without_a_gap() -> None:
    assert carrier_sentences({"share_of_gap": {"fv": None}, **numbers(controls(**IN_PLACE))}) == ""
