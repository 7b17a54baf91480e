"""Section of a page about all relations together: aggregate.json and its figures, if they are as they were written."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relfv.errors import RelfvError
from relfv.relations import called
from relfv.report.content import link, with_arrow
from relfv.stages.aggregate import (
    AGGREGATE,
    AGGREGATE_CSV,
    HEATMAP_FIGURE,
    SIMILARITY_FIGURE,
    aggregate_problems,
    read_aggregate,
)
from relfv.stages.similarity import IN_WORDS
from relfv.store.files import read_bytes

_SHOWN = ("own", "others", "random")


def together_of(folder: Path) -> dict[str, Any] | None:
    """The result of relfv aggregate; None where it did not run, or its files are not as it wrote them."""
    try:
        document = read_aggregate(folder)
        damaged, changed = aggregate_problems(folder, document)
    except RelfvError:
        return None
    if damaged:
        return None
    figures = [folder / name for name in (HEATMAP_FIGURE, SIMILARITY_FIGURE)]
    left_out = document["left_out"]["targets"]
    return {
        "verdict": document["verdict"],
        "out_of_date": changed,
        "file": link(folder, folder / AGGREGATE),
        "table": link(folder, folder / AGGREGATE_CSV),
        "relations": [
            {**one, "called": called(name, with_arrow(one["name"])), "changes": _changes(left_out.get(name))}
            for name, one in document["relations"].items()
        ],
        "n": sum(one["included"] for one in document["relations"].values()),
        "universal": document["heads"]["universal"],
        "agreement": [{"words": _in_words(pair)} for pair in document["similarity"]["agreement"]],
        "figures": [
            {"path": link(folder, path), "data": base64.b64encode(read_bytes(path)).decode()} for path in figures
        ],
    }


def _changes(target: Mapping[str, Any] | None) -> list[list[float | None]]:
    """Mean change in P with own, others' and random heads: one list for the vector, one for the heads in place."""
    if target is None:
        return [[None], [None]]
    vector, placed = target["vector"], target["in_place"]
    at = {name: vector["per_layer"][str(vector[f"{layer}_layer"])] for name, layer in
          (("own", "own"), ("others", "own"), ("random", "compared"))}  # fmt: skip
    return [
        [at[name][name]["mean_delta_p"] if name in at[name] else None for name in _SHOWN],
        [placed[name]["mean_delta_p"] if name in placed else None for name in _SHOWN],
    ]


def _in_words(pair: Mapping[str, Any]) -> str:
    words = f"{IN_WORDS[pair['a']]} and {IN_WORDS[pair['b']]} "
    if pair["correlation"] is None:
        return words + "not known (all alike, or too few relations)"
    return words + f"r {pair['correlation']:+.2f}, p {pair['p_value']:.2g}"
