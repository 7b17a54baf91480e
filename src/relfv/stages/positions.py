"""Earlier tokens, on request (``--extras positions``): what the top heads carry at the demos' labels, at the
separators, at the query and at the last token.

StepD patches the last token alone (Todd et al. 2024, eq. 3), where nothing but that token sees the patch. At an earlier
one everything after it does, so that each edit is a whole pass: by the reference engine, for chosen heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relfv.errors import InputError
from relfv.settings import MODEL_SETTINGS
from relfv.shares import Gap
from relfv.stages.ablation import untouched
from relfv.stages.cie import METRICS, corrupted_prompts
from relfv.stages.controls import ground_of
from relfv.stages.function_vector import FV, TOP_HEADS, heads_of
from relfv.stages.judging import judge_vectors, mean_over_draws
from relfv.stages.means import clean_prompts, clean_run
from relfv.stages.prompts import PREFIXES, SEPARATORS
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.trials import TRIALS
from relfv.stats import LEVEL
from relfv.store.folder import File, QidFolder
from relfv.store.formats import finite, json_bytes, read_json
from relfv.store.status import QidStatus
from relfv.types import Effects, HeadId, Prompts
from relfv.words import first_sentence, percent

if TYPE_CHECKING:
    import torch

    from relfv.engine.reference import AtTokens
    from relfv.stages.control_vectors import Ground

CLASSES = {
    "label": "the last token of each demo's answer, all demos at once",
    "separator": "the last token of what stands after each demo, all at once",
    "query": "the last token of the query",
    "last": "the prompt's last token, as in StepD",
}
"""Classes of tokens: name -> description."""
N_DRAWS = 5
"""Number of draws of random heads."""
_PROMPTS_A_PASS = 8
_MEANING = (
    "On the corrupted prompts of the trials heads are set, at the tokens of one class, to their mean over the clean "
    "prompts: at the j-th demo's label to the mean over the j-th labels, and so on. together: the heads of the "
    "function vector all at once, and as many random heads of each layer (draws of controls.json), mean over draws; "
    "share_of_gap: of the P that right labels bring, clean minus corrupted. heads: each of them alone. A mean at "
    "labels is over different labels: what is put there is what right labels have in common, not these answers."
)


def places_in(text: str, ends: Sequence[int]) -> dict[str, list[int]]:
    """The tokens of each class in a prompt of the spec's format, by index, from where in the text each token ``ends``;
    the last one is left to the caller. A token that ends later than what is looked for, because it holds more, counts.
    """
    breaks = [match.start() for match in re.finditer(SEPARATORS["output"], text)]
    query_end = text.rindex(f"{SEPARATORS['input']}{PREFIXES['output']}")
    wanted = {
        "label": breaks,
        "separator": [start + len(SEPARATORS["output"]) for start in breaks],
        "query": [query_end],
    }
    return {name: [_token_at(char, ends) for char in chars] for name, chars in wanted.items()}


def _token_at(char: int, ends: Sequence[int]) -> int:
    """Index of the last of the tokens that end first at or after ``char``: the bytes of one letter all end with it."""
    end = min(one for one in ends if one >= char)
    return max(i for i, one in enumerate(ends) if one == end)


def places_of(work: Work, texts: Sequence[str], prompts: Prompts) -> list[dict[str, list[int]]]:
    """The tokens of each class in each prompt, by index. Raises InputError for prompts of another form than the
    spec's."""
    found = []
    for text, ids in zip(texts, prompts.ids, strict=True):
        places = places_in(text, work.model.tokens.ends(text)) | {"last": [len(ids) - 1]}
        if len(places["label"]) != work.settings.n_demos:
            raise InputError(
                f"{work.folder.path(TRIALS)}: a prompt with {len(places['label'])} demos; expected the "
                f"{work.settings.n_demos} of --n_demos, in the spec's format, to know their labels"
            )
        found.append(places)
    return found


def slots_of(places: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Class -> its slots: indices into the tokens of all classes, put one after the other."""
    slots, start = {}, 0
    for name, tokens in places.items():
        slots[name] = tuple(range(start, start + len(tokens)))
        start += len(tokens)
    return slots


def in_slots(places: Sequence[Mapping[str, Sequence[int]]]) -> list[list[int]]:
    """(prompt, slot): the index of each slot's token in the prompt."""
    return [[token for tokens in its.values() for token in tokens] for its in places]


def clean_means(work: Work, prompts: Prompts, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 (slot, layer, head, head_dim): z at these tokens of the clean prompts, mean over them."""
    import torch

    from relfv.engine.memory import in_passes
    from relfv.engine.passes import capture_at_tokens

    backbone = work.model.backbone

    def summed(part: slice) -> torch.Tensor:
        return capture_at_tokens(backbone, prompts.ids[part], places[part]).double().sum(0)

    with backbone.running():
        sums, _ = in_passes(backbone, prompts.ids, _PROMPTS_A_PASS, summed)
    return (torch.stack(sums).sum(0) / len(prompts)).float()


def versions_of(
    slots: Mapping[str, tuple[int, ...]], top: Sequence[HeadId], draws: Sequence[Sequence[HeadId]]
) -> list[tuple[str, AtTokens]]:
    """The versions that are tried, with their names: ``label, top`` and ``label, random`` all at once, ``label, 3.5``
    one head alone."""
    from relfv.engine.reference import AtTokens

    sets = [("top", tuple(top)), *(("random", tuple(heads)) for heads in draws[:N_DRAWS])]
    sets += [(name_of(head), (head,)) for head in top]
    return [(f"{name}, {of}", AtTokens(heads, tokens)) for name, tokens in slots.items() for of, heads in sets]


def name_of(head: HeadId) -> str:
    """Name of a head, its layer and its number: ``3.5``."""
    return f"{head.layer}.{head.head}"


def verdict_of(document: Mapping[str, Any]) -> str:
    """The verdict on the numbers of positions.json, in a sentence or two."""
    p, tops = [document[of]["mean_p"] for of in ("corrupted", "clean")], {}
    for name, of in document["together"].items():
        share, random_heads = of["top"]["share_of_gap"], of.get("random", {}).get("share_of_gap")
        if share:
            beside = f"; random heads {percent(random_heads['value'])}" if random_heads else ""
            value, low, high = (percent(share[of]) for of in ("value", "low", "high"))
            tops[name] = f"{value} ({low} to {high}{beside})"
    if not tops:
        return f"Right labels bring too little here (P {p[0]:.2f} to {p[1]:.2f}) for shares of it at any token."
    said = ", ".join(f"{_AT[name]} {words}" for name, words in tops.items())
    return (
        f"Of what right labels bring (P {p[0]:.2f} to {p[1]:.2f}) the {document['k']} heads, set together, make {said}."
    )


_AT = {"label": "at the labels", "separator": "after the demos", "query": "at the query", "last": "at the last token"}


# --- files ---------------------------------------------------------------------------------------------------------

POSITIONS = File("stepD_positions/positions.json", read_json)

# --- the stage -----------------------------------------------------------------------------------------------------


def _measure(work: Work) -> str:
    from relfv.engine.reference import ReferenceEngine

    snapshot, prompts, clean = work.read(TRIALS), work.once(corrupted_prompts), work.once(clean_prompts)
    places = places_of(work, snapshot.prompts, prompts)
    places_clean = places_of(work, snapshot.clean_prompts, clean)
    ground, slots = ground_of(work, prompts.clusters), slots_of(places[0])
    named = versions_of(slots, ground.selected, ground.draws)
    names, versions = [name for name, _ in named], [version for _, version in named]
    means, engine = clean_means(work, clean, in_slots(places_clean)), ReferenceEngine(work.model.backbone)
    effects = work.repeatable(STAGE.name, engine.set_at_tokens, prompts, in_slots(places), means, versions)
    scores = work.once(clean_run).scores
    gap = Gap(effects.base.measure("p"), scores.measure("p"), prompts.clusters)
    document = {
        "q_id": work.q_id,
        "verdict": "",
        "meaning": _MEANING,
        "classes": {name: {"tokens": CLASSES[name], "n_tokens": len(its)} for name, its in slots.items()},
        "n_prompts_with_merged_tokens": sum(len({*row}) < len(row) for row in in_slots(places)),
        "k": len(ground.selected),
        "n_trials": len(prompts),
        "n_queries": len(set(prompts.clusters)),
        "n_passes": len(prompts) * len(versions),
        "precision": work.model.precision,
        "ci_level": LEVEL,
        "corrupted": untouched(effects.base, prompts),
        "clean": untouched(scores, prompts),
        **_judged(effects, prompts, names, gap, ground),
    }
    document["verdict"] = verdict_of(document)
    work.write(POSITIONS, json_bytes(document), content=document)
    return first_sentence(document["verdict"])


def _judged(effects: Effects, prompts: Prompts, names: Sequence[str], gap: Gap, ground: Ground) -> dict[str, Any]:
    """The numbers of sets of heads, of heads alone, and trial by trial of the sets."""
    numbers, reached = judge_vectors(effects, prompts, names)["per_layer"]["0"], mean_over_draws(effects, names)
    base, together = effects.base.measure("p"), {}
    for name in CLASSES:
        together[name] = {}
        for of in ("top", "random"):
            if (key := f"{name}, {of}") in numbers:
                share = gap.share(reached[key] - base[:, None], 0)
                together[name][of] = {**numbers[key], "share_of_gap": share and vars(share)}
    kept = ("mean_delta_p", "ci_low", "ci_high")
    heads = [
        {**vars(head), **{name: _some(numbers[f"{name}, {name_of(head)}"], kept) for name in CLASSES}}
        for head in ground.selected
    ]
    sets = [f"{name}, {of}" for name, its in together.items() for of in its]
    by_trial = {
        "query_source_index": list(prompts.clusters),
        "p_base": base.tolist(),
        "p_with": {key: [finite(p) for p in reached[key][:, 0]] for key in sets},
    }
    return {"together": together, "heads": heads, "by_trial": by_trial}


def _some(numbers: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    return {name: numbers[name] for name in kept}


def _agrees(folder: QidFolder, _: QidStatus) -> Iterator[Check]:
    document, path = folder.read(POSITIONS), folder.path(POSITIONS)
    top = [HeadId(head["layer"], head["head"]) for head in document["heads"]]
    yield Check(path, "the heads of top_heads.json", top == heads_of(folder.read(TOP_HEADS)))
    same = document["by_trial"]["query_source_index"] == [*folder.read(TRIALS).clusters]
    yield Check(path, "the queries of sampled_trials.json", same)


STAGE = Stage(
    "stepD_positions",
    "The top heads at labels, separators, query and last token, by whole passes (--extras positions).",
    _measure,
    reads=(TRIALS, METRICS, FV, TOP_HEADS),
    writes=(POSITIONS,),
    settings=(*MODEL_SETTINGS, "score_key", "seed"),
    agrees=_agrees,
    asked=lambda settings: "positions" in settings.studies,
)
