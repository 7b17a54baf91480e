"""Whole answers at the best layer, without and with the vector held on, and what the vector alone decodes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.settings import MODEL_SETTINGS
from relfv.stages.function_vector import FV
from relfv.stages.stage import Stage, Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated, evaluated_prompts
from relfv.store.folder import File
from relfv.store.formats import json_bytes, read_json

if TYPE_CHECKING:
    from relfv.engine.answers import ScoredAnswer
    from relfv.models.tokens import Tokens

ANSWERS = File("step6/answers.json", read_json)


def _write_answers(work: Work) -> str:
    from relfv.engine.answers import Injection, decode_vector, score_answers

    model, alpha, vector = work.model, work.settings.alpha, work.read(FV)
    layer, prompts = work.read(STEP6_SUMMARY)["best_layer"], work.once(evaluated_prompts)
    answers = [question.answer_ids for question in work.once(evaluated).questions]
    # Both halves in one go: the same prompts with nothing added, then with the vector.
    added = np.stack([0 * vector, np.float32(alpha) * vector]).repeat(len(prompts), axis=0)
    scored = score_answers(model.backbone, 2 * [*prompts.ids], 2 * answers, Injection(layer, added))
    without, with_it = scored[: len(prompts)], scored[len(prompts) :]
    rows = _rows(work, without, with_it)
    document = {
        "q_id": work.q_id,
        "meaning": "logprob_answer: of all the answer's tokens; written: the most probable token, as many times as the "
        "answer has tokens; with: alpha times the vector added after the layer at the last prompt token and at every "
        "token written.",
        "layer": layer,
        "alpha": alpha,
        "n_eval": len(rows),
        "n_several_tokens": sum(row["n_tokens"] > 1 for row in rows),
        "summary": {
            f"{mean}_{name}": sum(row[f"{key}_{name}"] for row in rows) / len(rows)
            for name in ("base", "with")
            for mean, key in (("exact_match", "exact"), ("mean_logprob_answer", "logprob_answer"))
        },
        "fv_decoded": {
            "caution": "What final norm and unembedding make of the vector alone. A vector that works need not "
            "decode to anything telling, and one that decodes well need not work (Todd et al. 2024, section 3.2).",
            "top": _tokens(model.tokens, decode_vector(model.backbone, model.tokens.encode("a")[:1], vector)),
        },
        "rows": rows,
    }
    work.write(ANSWERS, json_bytes(document), content=document)
    exact = document["summary"]
    return f"whole answers at layer {layer}: {exact['exact_match_base']:.2f} -> {exact['exact_match_with']:.2f}"


def _rows(work: Work, without: Sequence[ScoredAnswer], with_it: Sequence[ScoredAnswer]) -> list[dict[str, Any]]:
    rows, tokens = [], work.model.tokens
    for question, before, after in zip(work.once(evaluated).questions, without, with_it, strict=True):
        row: dict[str, Any] = {
            "query": question.query.input,
            "answer": question.answer,
            "n_tokens": len(question.answer_ids),
        }
        for name, scored in (("base", before), ("with", after)):
            row |= {
                f"logprob_answer_{name}": scored.logprob,
                f"rank_first_token_{name}": scored.rank,
                f"written_{name}": tokens.joined(scored.written),
                f"exact_{name}": int(scored.written == list(question.answer_ids)),
                f"top_{name}": _tokens(tokens, scored.top),
            }
        rows.append(row)
    return rows


def _tokens(tokens: Tokens, best: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    return [{"token_id": token, "token": tokens.text(token), "p": p} for token, p in best]


STAGE = Stage(
    "step6_answers",
    "Whole answers at the best layer, without and with the vector.",
    _write_answers,
    reads=(ZERO_SHOT_TRIALS, STEP6_SUMMARY, FV),
    writes=(ANSWERS,),
    settings=(*MODEL_SETTINGS, "alpha", "n_eval", "allow_query_duplicates"),
)
