"""The sentences of aggregate.json: what may be concluded from all relations together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relfv.stages.similarity import IN_WORDS
from relfv.words import ci

_FEW = 8
"""Number of relations below which intervals are said to be wide: Student's t of six degrees of freedom is 2.4 standard
errors."""
_STAYS = 0.9
"""Share of resamples of the relations in which a head must be among the top to be said to stay."""


def verdict(document: Mapping[str, Any]) -> str:
    """The verdict over all relations, in a few sentences."""
    included = [name for name, one in document["relations"].items() if one["included"]]
    parts = [
        _counted(document, len(included)),
        _universal(document["heads"], document["k"], len(included)),
        _left_out(document["left_out"]),
        _alike(document["similarity"]["agreement"], len(included)),
    ]
    return " ".join(part for part in parts if part)


def _counted(document: Mapping[str, Any], n: int) -> str:
    out = [name for name, one in document["relations"].items() if not one["included"]]
    said = f"{n} of {len(document['relations'])} relations are counted"
    if out:
        said += f"; left out, as ones that the model cannot do: {', '.join(out)}"
    elif document["all"]:
        cannot = [name for name, one in document["relations"].items() if one["why_not"]]
        said += f" (--all), {', '.join(cannot)} among them, which the model cannot do" if cannot else " (--all)"
    few = f". With {n} relations intervals are wide" if n < _FEW else ""
    return f"{said}{few}."


def _universal(heads: Mapping[str, Any], k: int, n: int) -> str:
    listed = heads["universal"]
    stay = sum(head["in_top_k"] >= _STAYS for head in listed)
    everywhere = sum(head["n_in_own_top"] == n for head in listed)
    called = sum(head["fdr"] <= heads["fdr_level"] for head in listed)
    at_once = heads["n_called_at_once"]
    if called or at_once <= 1:
        told = f"{called} are told from 0"
    elif at_once > heads["n_heads"]:
        told = f"with {n} relations no head can be told from 0"
    else:
        told = f"none is told from 0 (with {n} relations {at_once} of all heads would have to be at once)"
    return (
        f"Of the {len(listed)} heads with the largest AIE {everywhere} are among every relation's own top {k}, {stay} "
        f"stay in the list in {_STAYS:.0%} of the resamples of the relations, and {told}."
    )


def _left_out(left_out: Mapping[str, Any]) -> str:
    found = left_out["over_relations"]
    if not left_out["targets"]:
        return "Whether heads chosen by the other relations carry a relation was not tried (--no_model)."
    so_far = f" ({len(left_out['waiting'])} relations are still to come)" if left_out["waiting"] else ""
    words = "; ".join(
        f"{how} P changes by {_signed(of['others'])} with heads that the other relations chose, by "
        f"{_signed(of['own'])} with the relation's own{_random(of)}: {_compared(of)}"
        for how, of in (
            ("as a vector", found["vector"]),
            ("put in place", found["in_place"]),
        )
    )
    return f"One relation left out at a time{so_far}, {words}."


def _random(of: Mapping[str, Any]) -> str:
    return "" if of["random"]["mean"] is None else f" and by {_signed(of['random'])} with random heads"


def _compared(of: Mapping[str, Any]) -> str:
    own, drawn = of["others_minus_own"], of["others_minus_random"]
    if own["ci_high"] is not None and own["ci_high"] < 0:
        words = f"less than the own ({_ends(own)})"
    elif own["ci_low"] is not None and own["ci_low"] > 0:
        words = f"more than the own ({_ends(own)})"
    else:
        words = f"a difference to the own is not shown ({_ends(own)})"
    if drawn["mean"] is None:
        return words
    shown = "above" if drawn["ci_low"] is not None and drawn["ci_low"] > 0 else "not shown to be above"
    return f"{words}, {shown} random ones ({_ends(drawn)})"


def _signed(of: Mapping[str, Any]) -> str:
    return "an unknown amount" if of["mean"] is None else f"{of['mean']:+.3f}"


def _ends(of: Mapping[str, Any]) -> str:
    if of["mean"] is None or of["ci_low"] is None:
        return "interval unknown"
    return f"{of['mean']:+.3f}, {ci(of['ci_low'], of['ci_high'], '{:+.3f}'.format)}"


def _alike(pairs: Sequence[Mapping[str, Any]], n: int) -> str:
    known = [pair for pair in pairs if pair["correlation"] is not None]
    if not known:
        return ""
    shown = [pair for pair in known if pair["p_value"] <= 0.05 / len(known)]
    if not shown:
        least = 1 / known[0]["n_orders"]
        why = f" (with {n} relations no p-value is below {least:.2g})" if least > 0.05 / len(known) else ""
        return f"That relations are alike in one measure where they are in another is not shown{why}."
    said = ", ".join(
        f"{IN_WORDS[pair['a']]} and {IN_WORDS[pair['b']]} (r {pair['correlation']:.2f}, p {pair['p_value']:.2g})"
        for pair in shown
    )
    return f"Relations that are alike in one measure are alike in the other for {said}, {len(known)} pairs tested."
