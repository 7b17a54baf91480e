"""Function vectors of other relations: is a q_id's own vector better on its prompts than other q_ids' vectors are?

The control of Todd et al. (2024, section 3.2) that random directions cannot replace: another relation's vector is a
vector of the same kind, made in the same way. Vectors are added as they are. One that is longer may do more for its
length alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import RunError
from relfv.relations import is_q_id
from relfv.stages.agreement import cosines
from relfv.stages.function_vector import FV
from relfv.stages.judging import judge_vectors
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.stats import LEVEL, best_column_p_value
from relfv.store.files import sha256_file
from relfv.store.folder import QidFolder
from relfv.store.formats import SEAL, finite, read_json, unsealed
from relfv.types import Effects, Prompts

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

MEANING = {
    "sources": "alpha (the target's own) times each q_id's function vector, its own included, added after each layer "
    "at the last token of the target's Step6 prompts; all sources in one batch",
    "scale": "vectors are added at their own length, unscaled: see norms before reading a difference as one of "
    "direction",
    "mean_delta_p": "with the vector minus without; ci_low and ci_high at ci_level, clustered by query, for one "
    "vector at a time: they are not widened for the number of vectors or q_ids",
    "at_best_layer": "at the layer of step6_all_layers_summary.json, which is the best of all layers for the "
    "target's own vector on these very prompts, and so favours it; others is the mean over the other q_ids' vectors, "
    "taken within a prompt first; rank_of_own counts from 1, ties against it",
    "rank_of_own_each_at_its_best_layer": "the same rank with every vector at the layer of its own largest "
    "mean_delta_p",
    "p_own_raises_p": "one-sided p-value, by sign flips of whole queries, that the own vector raises P at no layer: it "
    "allows for the choice of the layer",
    "own": "the target's own vector was made from trials with these very queries, the others were not; controls.json "
    "has it held out",
}
"""Name -> what it is, for cross_fv.json."""


def inject_vectors(
    model: LanguageModel,
    prompts: Prompts,
    names: Sequence[str],
    vectors: np.ndarray,
    alpha: float,
    per_pass: int | None = None,
) -> Effects:
    """Add ``vectors`` float32 (vector, resid_dim), times ``alpha``, after every block: ``edited`` is (prompt, layer *
    vector).

    Raises RunError, naming the vector, for NaN or infinite logits.
    """
    effects = model.engine.inject(prompts, np.float32(alpha) * vectors, range(model.arch.n_layers), per_pass=per_pass)
    broken = (~np.isfinite(effects.edited.measure("logit"))).any(0).nonzero()[0]
    if len(broken):
        layer, column = divmod(int(broken[0]), len(names))
        raise RunError(
            f"adding the vector of {names[column]} at layer {layer} gives NaN or infinite logits; expected finite "
            "numbers (fp16 overflows in some models: --dtype bf16, or --precision exact, for relfv run as well)"
        )
    return effects


def judge_target(effects: Effects, prompts: Prompts, names: Sequence[str], own: str, best_layer: int) -> dict[str, Any]:
    """The numbers of one target: every vector of ``names`` after every layer, ``own`` against the others at
    ``best_layer``.

    ``effects`` as ``inject_vectors`` gives them. At least two names.
    """
    judged = judge_vectors(effects, prompts, names)
    columns = slice(best_layer * len(names), (best_layer + 1) * len(names))
    at_best = Effects(base=effects.base, edited=effects.edited[:, columns])
    sides = judge_vectors(at_best, prompts, ["own" if name == own else "others" for name in names])
    there = judged["per_layer"][str(best_layer)]
    highest = {name: max(row[name]["mean_delta_p"] for row in judged["per_layer"].values()) for name in names}
    mine = there[own]
    own_delta = np.nan_to_num(effects.delta("p")[:, names.index(own) :: len(names)])
    rank = _rank({name: there[name]["mean_delta_p"] for name in names}, own)
    others = [name for name in names if name != own]
    best = own if rank == 1 else max(others, key=lambda name: there[name]["mean_delta_p"])
    mean_of_others = sides["per_layer"]["0"]["others"]
    mean_of_others.pop("mean_p_of_draws", None)
    judgement = {
        "best_layer": best_layer,
        "at_best_layer": {
            "own": mine,
            "p_own_raises_p": best_column_p_value(own_delta, prompts.clusters, best_layer),
            "others": mean_of_others,
            "rank_of_own": rank,
            "best": best,
            "not_apart_from_own": [name for name in others if not _apart(there[name], mine)],
        },
        "rank_of_own_each_at_its_best_layer": _rank(highest, own),
    }
    verdict = _verdict_of_target(judgement, there[best], len(names))
    return {"verdict": verdict, **judgement, "zero_shot": judged["zero_shot"], "per_layer": judged["per_layer"]}


def compare_directions(vectors: np.ndarray) -> tuple[list[float], list[list[float | None]]]:
    """``vectors`` (vector, resid_dim) -> their lengths, and the cosine of each with each; None with a vector of
    zeros."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return norms.tolist(), [[finite(value) for value in row] for row in cosines(vectors).tolist()]


def overall_verdict(targets: Mapping[str, Mapping[str, Any]], n_vectors: int) -> str:
    """The verdict in one sentence, over the entries of ``judge_target`` made so far; they may be fewer than the
    vectors."""
    entries = [entry["at_best_layer"] for entry in targets.values()]
    best = [entry for entry in entries if entry["rank_of_own"] == 1]
    n_shown = sum(not entry["not_apart_from_own"] for entry in best)
    so_far = " done so far" if len(entries) < n_vectors else ""
    words = f"The own vector is the best of {n_vectors} for {len(best)} of {len(entries)} q_ids{so_far}"
    if best:
        words += f"; that is shown, by an interval above every other vector's, for {n_shown or 'none'} of them"
    return f"{words} (each at the layer that is best for its own vector on these very prompts, which favours it)."


def _verdict_of_target(judgement: Mapping[str, Any], best: Mapping[str, Any], n_vectors: int) -> str:
    """The verdict on one target in one sentence; ``best`` are the numbers of the best vector. What intervals do not
    show is said not to be shown."""
    at = judgement["at_best_layer"]
    mine, near = at["own"], at["not_apart_from_own"]
    where = (
        f"at layer {judgement['best_layer']}, which is chosen for it on these very queries (mean change in P "
        f"{_signed(mine)}, with the others' {_signed(at['others'])})"
    )
    if at["rank_of_own"] == 1:
        words = f"The own vector is the best of {n_vectors} {where}"
        if near:
            other = "vector" if len(near) == 1 else "vectors"
            words += f"; that it is better than {len(near)} other {other} is not shown, intervals overlap"
        else:
            words += ", its interval above every other's"
    else:
        shown = (
            "that this one is better is not shown" if at["best"] in near else "its interval lies above the own one's"
        )
        words = f"The own vector ranks {at['rank_of_own']} of {n_vectors} {where}; the best is that of {at['best']} "
        words += f"({_signed(best)}), {shown}"
    if at["p_own_raises_p"] > (1 - LEVEL) / 2:
        words += "; that the own one raises P at all is not shown"
    return f"{words}."


def _signed(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['mean_delta_p']:+.3f}"


def _rank(values: Mapping[str, float], own: str) -> int:
    return 1 + sum(values[name] >= values[own] for name in values if name != own)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if the intervals do not touch; False where one is not known."""
    ends = [one["ci_low"], one["ci_high"], other["ci_low"], other["ci_high"]]
    return None not in ends and (one["ci_high"] < other["ci_low"] or other["ci_high"] < one["ci_low"])


# --- files, beside the q_ids' folders --------------------------------------------------------------------------------

CROSS, CROSS_FIGURE = "cross_fv.json", "cross_fv.png"
CROSS_SETTINGS = ("model_spec", "dtype", "quant", "precision", "model_identity", "algorithm_version")
"""Fingerprint fields that q_ids must share for their vectors to be compared."""
_TARGET_SETTINGS = ("alpha", "n_eval", "allow_query_duplicates", *CROSS_SETTINGS)


def cross_origin(folder: Path, target: str, sources: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Record of what the numbers of one ``target`` in cross_fv.json rest on, in its present state: settings, out of the
    q_id's fingerprint ``fields``, and the sha256 of files by their names in the relation's ``folder``; None where one
    is missing."""
    of_target = QidFolder(folder / target / "artifacts", target)
    vectors = [QidFolder(folder / source / "artifacts", source).path(FV) for source in sources]
    return {
        "settings": {name: fields.get(name) for name in _TARGET_SETTINGS},
        "files": {
            path.relative_to(folder).as_posix(): sha256_file(path)
            for path in (of_target.path(ZERO_SHOT_TRIALS), of_target.path(STEP6_SUMMARY), *vectors)
        },
    }


def read_cross(folder: Path) -> dict[str, Any]:
    """The document that ``relfv cross`` wrote, without its own hash. Raises RunError if it is missing or not as it was
    written."""
    path = folder / CROSS
    content = read_json(path)
    try:
        sound = {SEAL, "verdict"} <= content.keys() and CROSS_FIGURE in content["figure"]
        sound &= all(map(is_q_id, content["q_ids"])) and set(content["targets"]) <= set(content["q_ids"])
        sound &= all({"made_from", "best_layer", "per_layer"} <= entry.keys() for entry in content["targets"].values())
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise RunError(f"{path}: is damaged or not a file of relfv cross")
    return unsealed(content, path)


def cross_changes(folder: Path, document: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List, in words, of what ``document``, as ``read_cross`` gives it, was made from and has changed since. ``fields``
    are the fingerprint fields of each q_id, and empty for one that is gone."""
    changes: dict[str, None] = {}
    for target, entry in document["targets"].items():
        then, now = entry["made_from"], cross_origin(folder, target, document["q_ids"], fields[target])
        changes |= {
            f"{target}'s {name} was {value}, now {now['settings'][name]}": None
            for name, value in then["settings"].items()
            if now["settings"].get(name) != value
        }
        changes |= {
            f"made from another {name}": None
            for name, digest in then["files"].items()
            if now["files"].get(name) != digest
        }
    return list(changes)
