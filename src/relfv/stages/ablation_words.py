"""The verdict of ablation.json: its numbers in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relfv.stages.carrier import NOTHING
from relfv.stages.caveats import tells_apart
from relfv.words import percent, with_interval

Numbers = Mapping[str, Any]


def verdict_of_ablation(document: Numbers, summary: Numbers) -> str:
    """A few sentences that are never stronger than the numbers of ``document``; ``summary`` is summary.json."""
    if not tells_apart(summary):
        return (
            "Scored tokens do not tell this relation's answers apart: what is lost of their P says little of the task."
        )
    heads, p, p_shuffled = document["heads"], document["clean"]["mean_p"], document["shuffled"]["mean_p"]
    top = heads["top"]["swapped"]
    falls = (
        f"At the last token, with the {document['k']} heads as on shuffled prompts, P goes from {p:.2f} to {_p(top)}"
    )
    if not top["share_of_gap"]:
        return (
            f"Right labels bring too little here (P {p:.2f} with them, {p_shuffled:.2f} shuffled) for a share of it to "
            f"be lost. {falls}."
        )
    parts = [
        f"{falls}: {with_interval(top['share_of_gap'])} of what right labels bring is lost{_beside(heads, 'swapped')}.",
        _conclusion(top["share_of_gap"], document["against_random"]),
        _set_to_means(heads, "other_relations", "Set to their mean over prompts of other relations"),
        _set_to_means(heads, "mean", "Set to their mean over shuffled prompts, which takes the query away, too"),
        _direction(document["directions"]),
        _cancellers(heads, p),
    ]
    return " ".join(part for part in parts if part)


def _beside(heads: Numbers, how: str) -> str:
    """The shares lost when other heads are edited in the same way, each where there is a number."""
    named = {
        "top_held_out": "{} held out",
        "random_of_layers": "random heads of the same layers {}",
        "random_of_norm": "others that write as much {}",
    }
    shares = {name: heads.get(name, {}).get(how, {}).get("share_of_gap") for name in named}
    said = [words.format(percent(share["value"])) for name, words in named.items() if (share := shares[name])]
    return f" ({', '.join(said)})" if said else ""


def _conclusion(share: Numbers, against: Numbers) -> str:
    if share["high_of_mean"] < NOTHING:
        return "So the model does without them there: others make up for them, or earlier tokens do."
    if share["low"] <= 0:
        return "That they are needed is not shown."
    if any(not rival["ci_low"] or rival["ci_low"] <= 0 or rival["n_draws_as_low"] for rival in against.values()):
        return "Random heads do about as much harm: that these in particular are needed is not shown."
    return "So these heads are needed there for that much." if against else ""


def _set_to_means(heads: Numbers, how: str, words: str) -> str:
    share = heads["top"].get(how, {}).get("share_of_gap")
    return f"{words}: {percent(share['value'])}{_beside(heads, how)}." if share else ""


def _direction(directions: Numbers) -> str:
    """Sentence on directions set to their mean. Those taken out whole are not named: in some families (Gemma 3) the
    stream has so large a constant part that any direction's loss breaks the model, random ones' too."""
    named = {
        "fv": "the vector's direction",
        "fv_as_written": "that of the vector as written",
        "random_heads": "those of random heads' vectors",
    }
    shares = {name: directions.get(name, {}).get("all_to_mean", {}).get("share_of_gap") for name in named}
    said = [f"{words} {percent(share['value'])}" for name, words in named.items() if (share := shares[name])]
    how = "Lost where a direction is set, after every layer, to its mean on shuffled prompts"
    return f"{how}: {', '.join(said)}." if said else ""


def _cancellers(heads: Numbers, p: float) -> str:
    if "cancellers" not in heads:
        return ""
    n, swapped = heads["cancellers"]["n_heads"], heads["cancellers"]["swapped"]
    return f"With the {n} other heads that lower P most swapped instead, P goes from {p:.2f} to {_p(swapped)}."


def _p(numbers: Numbers) -> str:
    return "no finite number" if numbers["mean_p"] is None else f"{numbers['mean_p']:.2f}"
