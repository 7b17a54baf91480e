"""The verdict of summary.json: a few sentences that are never stronger than its numbers.

Each sentence is a function of the document that gives one thought, or nothing where the numbers do not allow it.
summary.py puts what these functions need into the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from relfv.stages.ability import ability_sentence
from relfv.stages.ability import in_short as ability_in_short
from relfv.stages.answered_right import stratum_sentence
from relfv.stages.carrier import NOTHING, carrier_sentences, heads_in_short
from relfv.stages.caveats import leading_sentence, tells_apart, trial_sentences
from relfv.stages.control_vectors import CONTROLS
from relfv.stats import FDR, smallest_p_value
from relfv.words import percent, with_interval

HELD_OUT = "held_out, layer_chosen_by_others"

Numbers = Mapping[str, Any]


def verdict(numbers: Numbers) -> str:
    """The verdict: the content of summary.json in words."""
    of_tokens = OF_SHARES if tells_apart(numbers) else ()
    sentences = (ability_sentence, leading_sentence, _heads, *of_tokens, trial_sentences)
    return " ".join(said for said in (sentence(numbers) for sentence in sentences) if said)


def in_short(numbers: Numbers) -> str:
    """The verdict in one to three short sentences, for a log's line and the head of a page: what the model can do,
    what the vector does, and why that is not to be read as the relation's own."""
    able = ability_in_short(numbers["ability"])
    words = [f"The model {able} this relation."] if able else []
    if not tells_apart(numbers):
        whole = numbers["whole_answers"]
        right = f"{percent(whole['base'])} without and {percent(whole['with'])} with the function vector"
        return " ".join([*words, f"Whole answers right: {right}; the scored tokens do not tell answers apart."])
    reason = doubt(numbers)
    own = f"That this is the relation's own effect is not shown: {reason}." if reason else ""
    return " ".join(filter(None, [*words, _effect_in_short(numbers), own, heads_in_short(numbers)]))


def _effect_in_short(numbers: Numbers) -> str:
    p, share = numbers["p"], numbers["share_of_gap"]["fv"]
    if not share:
        there = "too small or too uncertain to say what share of it is closed"
        return f"The gap is {there}." if p["clean"] > p["zero_shot"] else "P is no higher with demos: there is no gap."
    if _does_nothing(numbers):
        return f"The function vector {_how_little(share)}: P {p['zero_shot']:.3f} without and {p['fv']:.3f} with it."
    held_out = numbers["share_of_gap"].get(HELD_OUT)
    shown, how = (held_out, ", held out") if held_out else (share, " on these very prompts")
    rivals = [numbers["share_of_gap"].get(name) for name, control in CONTROLS.items() if control.rival]
    rival = max((rival["value"] for rival in rivals if rival), default=None)
    beside = "" if rival is None else f"; random controls close up to {percent(rival)} on average"
    return f"The function vector closes {with_interval(shown)} of the gap{how}{_unless_shown(shown)}{beside}."


def _heads(numbers: Numbers) -> str:
    n, called, overlap = numbers["n_heads"], numbers["n_heads_distinguishable"], numbers["half_overlap_of_top_heads"]
    if called is None:
        return ""
    words = f"{called} of the top {n} heads are distinguishable from noise"
    at_once = numbers["n_heads_called_at_once"]
    if not called and at_once and at_once > 1:
        n_queries = numbers["n_queries_of_trials"]
        enough = f"{at_once} heads would have to be at once" if smallest_p_value(n_queries) <= FDR else "no head can be"
        words += f" (with {n_queries} {'query' if n_queries == 1 else 'queries'} {enough})"
    few = numbers["n_heads_of_few_queries"]
    if few:
        words += f"; of {few} of the {n}, half the effect comes from one or two queries"
    if overlap is not None:
        chance = numbers["chance_overlap_of_top_heads"]
        words += f"; two halves of the queries, with one clean mean for both, agree on {overlap:.0%} of the {n} (by "
        words += f"chance {chance:.0%})"
    return words + "."


def _no_share(numbers: Numbers) -> str:
    p = numbers["p"]
    if numbers["share_of_gap"]["fv"]:
        return ""
    if p["clean"] - p["zero_shot"] <= 0:
        return (
            f"P is no higher with demos ({p['zero_shot']:.2g} without them, {p['clean']:.2g} with): there is no gap "
            "here for a function vector to close."
        )
    return (
        f"The gap between zero-shot (P {p['zero_shot']:.2f}) and clean prompts with demos ({p['clean']:.2f}) is "
        "too small or too uncertain to say what share of it the function vector closes."
    )


def _nothing(numbers: Numbers) -> str:
    if not _does_nothing(numbers):
        return ""
    p, share = numbers["p"], numbers["share_of_gap"]["fv"]
    return (
        f"The function vector {_how_little(share)} where demos do much: P {p['zero_shot']:.3f} without it and "
        f"{p['fv']:.3f} with it {_where(numbers)}, against {p['clean']:.2f} with demos. {_counted(share)}."
    )


def _closes(numbers: Numbers) -> str:
    share = numbers["share_of_gap"]["fv"]
    if not share or _does_nothing(numbers):
        return ""
    words = (
        f"The function vector closes {with_interval(share)} of the gap between zero-shot and clean prompts "
        f"{_where(numbers)}{_unless_shown(share)}"
    )
    held_out = numbers["share_of_gap"].get(HELD_OUT)
    if held_out:
        left_out = "with each query's own trials left out of means, ranking and choice of layer"
        words += f"; {with_interval(held_out)} {left_out}{_unless_shown(held_out)}"
    return f"{words}. {_counted(share)}."


def _controls(numbers: Numbers) -> str:
    share = numbers["share_of_gap"]
    parts = [
        f"{control.in_verdict} {percent(share[name]['value'])}"
        for name, control in CONTROLS.items()
        if control.in_verdict and share.get(name)
    ]
    return f"Controls at that layer: {', '.join(parts)}." if parts else ""


def _against_random(numbers: Numbers) -> str:
    reason = doubt(numbers)
    return f"{reason[0].upper()}{reason[1:]}: that the effect is the relation's own is not shown." if reason else ""


def doubt(numbers: Numbers) -> str:
    """The reason why the vector's effect is not shown to be the relation's own; empty where it is, or where no effect
    is claimed."""
    share, against = numbers["share_of_gap"]["fv"], numbers["against_random"].values()
    if not tells_apart(numbers) or not share or share["low"] <= 0 or _does_nothing(numbers) or not against:
        return ""  # nothing is claimed that could be taken back
    if (rival := max(against, key=lambda rival: rival["n_draws_as_good"] / rival["n_draws"]))["n_draws_as_good"]:
        n, n_draws = rival["n_draws_as_good"], rival["n_draws"]
        return f"{n} of {n_draws} random draws {'does' if n == 1 else 'do'} as well, each at its best layer"
    if not all(rival["share_of_gap_above"] and rival["share_of_gap_above"]["low"] > 0 for rival in against):
        return "query by query the vector is not clearly above a random control"
    return ""


OF_SHARES: tuple[Callable[[Numbers], str], ...] = (
    _no_share,
    _nothing,
    _closes,
    _controls,
    _against_random,
    carrier_sentences,
    stratum_sentence,
)
"""Sentences that rest on scores of single tokens; they are said only where those tell answers apart."""


def _does_nothing(numbers: Numbers) -> bool:
    share = numbers["share_of_gap"]["fv"]
    return bool(share) and share["high_of_mean"] < NOTHING


def _how_little(share: Numbers) -> str:
    return "does nothing here" if share["value"] > -NOTHING else "does harm here"


def _where(numbers: Numbers) -> str:
    n = numbers["n_queries"]
    return f"at layer {numbers['layer']}, the best of all on these very prompts ({n} distinct queries)"


def _counted(share: Numbers) -> str:
    n, closed, up_to = share["n_queries"], share["n_closing_half"], f"up to {percent(share['others_up_to'])} of others"
    words = f"{closed} of {n} queries have half of their own gap closed or more"
    return f"{words}; by their number alone, {up_to} may {'not' if 2 * closed >= n else ''}".rstrip()


def _unless_shown(share: Numbers) -> str:
    return "" if share["low"] > 0 else ", so that it closes any of it is not shown"
