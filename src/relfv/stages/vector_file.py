"""``function_vector.safetensors``: the vector in one file that says what it is, of which model, and how it is used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from relfv import __version__
from relfv.errors import RunError
from relfv.models.tokens import Tokens
from relfv.stages.function_vector import FV, FV_BY_LAYER, TOP_HEADS, heads_of
from relfv.stages.injection import TOKEN_RULE
from relfv.stages.prompts import ZERO_SHOT_FORMAT, zero_shot_prompt
from relfv.stages.stage import Check, Stage, Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.store.folder import File, QidFolder
from relfv.store.safetensors import read_safetensors, safetensors_bytes
from relfv.store.status import QidStatus
from relfv.types import Question

KIND = "relfv function vector 1"
"""Kind of file that the metadata names; the number grows when a key changes its meaning."""
VECTOR, PART = "function_vector", "by_layer."
"""Names of the arrays: the vector, and its part from the heads of each layer, before the layer's number."""
_OTHER_WORDS = ("a", "7", "\u00e9t\u00e9")
"""Words that begin in different ways: what they share with the relation's own is the prompt's frame."""


def frame_of(tokens: Tokens, questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """The token ids that every prompt, as it is fed, begins and ends with."""
    words = [(question.query.input, list(question.target.space_ids)) for question in questions]
    spaces = words[0][1]
    fed = [
        [*tokens.encode(zero_shot_prompt(word)), *space]
        for word, space in [*words, *((word, spaces) for word in _OTHER_WORDS)]
    ]
    return _shared(fed), _shared([ids[::-1] for ids in fed])[::-1]


def _shared(rows: Sequence[Sequence[int]]) -> list[int]:
    """The items that all ``rows`` begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in columns]


def spaces_of(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Token ids that are fed after the prompt's text, where answers begin with tokens of white space alone: under an
    empty key those of most prompts, and by query those of the others."""
    by_query = {question.query.input: question.target.space_ids for question in questions}
    usual = Counter(by_query.values()).most_common(1)[0][0]
    return {"": list(usual), **{word: list(ids) for word, ids in by_query.items() if ids != usual}}


# --- files ---------------------------------------------------------------------------------------------------------


def read_vector_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """-> (arrays, metadata) of a function_vector.safetensors. Raises RunError for any other file."""
    arrays, metadata = read_safetensors(path)
    kind, vector = metadata.get("kind"), arrays.get(VECTOR)
    if kind != KIND or vector is None or vector.ndim != 1 or not np.isfinite(vector).all():
        raise RunError(f"{path}: its metadata call it {kind!r}; expected {KIND!r} with finite numbers in one dimension")
    return arrays, metadata


VECTOR_FILE = File("function_vector.safetensors", read_vector_file)

# --- the stage -----------------------------------------------------------------------------------------------------


def _write(work: Work) -> str:
    best = work.read(STEP6_SUMMARY)
    parts = {f"{PART}{layer}": part for layer, part in sorted(work.read(FV_BY_LAYER).items())}
    data = safetensors_bytes({VECTOR: work.read(FV), **parts}, _metadata(work, best["best_layer"]))
    work.write(VECTOR_FILE, data)
    return f"for layer {best['best_layer']}, {len(data)} bytes"


def _metadata(work: Work, layer: int) -> Mapping[str, str]:
    """The metadata of the file. Values are text, since the format knows no others; lists and objects as JSON."""
    model, questions, top = work.model, work.read(ZERO_SHOT_TRIALS).questions, work.read(TOP_HEADS)
    begins, ends = frame_of(model.tokens, questions)
    return {
        "kind": KIND,
        "relfv_version": __version__,
        "q_id": work.q_id,
        "model": model.name,
        "model_identity": work.model_identity,
        "model_type": str(model.backbone.model.config.model_type),
        "n_layers": str(model.arch.n_layers),
        "layer": str(layer),
        "layer_meaning": "after this block, counted from 0, alpha times the vector is added to the residual stream",
        "alpha": repr(work.settings.alpha),
        "token_position_rule": TOKEN_RULE,
        "prompt_format": ZERO_SHOT_FORMAT,
        "prompt_begins_with_ids": json.dumps(begins),
        "prompt_ends_with_ids": json.dumps(ends),
        "space_ids": json.dumps(spaces_of(questions), ensure_ascii=False),
        "heads": json.dumps([[head.layer, head.head] for head in heads_of(top)]),
        "score_key": top["meta"]["score_key"],
        "precision": model.precision,
    }


def _agrees(folder: QidFolder, status: QidStatus) -> Iterator[Check]:
    path, (arrays, metadata) = folder.path(VECTOR_FILE), folder.read(VECTOR_FILE)
    yield Check(path, "the vector of fv_global_resid.pt", np.array_equal(arrays[VECTOR], folder.read(FV)))
    parts = {int(name.removeprefix(PART)): part for name, part in arrays.items() if name.startswith(PART)}
    there = folder.read(FV_BY_LAYER)
    same = parts.keys() == there.keys() and all(np.array_equal(parts[layer], there[layer]) for layer in parts)
    yield Check(path, "the parts of fv_by_layer.pt", same)
    same = metadata["layer"] == str(folder.read(STEP6_SUMMARY)["best_layer"])
    yield Check(path, "the best layer of step6_all_layers_summary.json", same)


STAGE = Stage(
    "vector_file",
    "The vector in one file that says what it is and how to use it.",
    _write,
    reads=(FV, FV_BY_LAYER, TOP_HEADS, STEP6_SUMMARY, ZERO_SHOT_TRIALS),
    writes=(VECTOR_FILE,),
    settings=("alpha", "model_spec"),
    agrees=_agrees,
)
