"""Whole answers at the best layer, without and with the vector held on, and what the vector alone decodes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.settings import MODEL_SETTINGS
from relfv.stages.caveats import tells_apart, trial_numbers
from relfv.stages.cie import corrupted_prompts
from relfv.stages.function_vector import FV
from relfv.stages.means import clean_prompts
from relfv.stages.stage import Stage, Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated, evaluated_prompts
from relfv.store.folder import File
from relfv.store.formats import json_bytes, read_json
from relfv.types import Question

if TYPE_CHECKING:
    from relfv.engine.answers import ScoredAnswer
    from relfv.models.tokens import Tokens

ANSWERS = File("step6/answers.json", read_json)

_MEANING = (
    "logprob_answer: of all the answer's tokens; written: the most probable token, one at a time, one token further "
    "than the answer; begins: whether the answer's tokens are what is written first; exact: whether an accepted answer "
    "is written and ends there, at a line break or the end of the text; with: alpha times the vector added after the "
    "layer at the last prompt token and at every token written. Where the answer begins with tokens of white space "
    "alone, they are fed with the prompt. clean_prompts: what is written after the trials' clean prompts, nothing "
    "added; only where scored tokens do not tell answers apart, and so cannot say whether the model does the relation."
)


def _write_answers(work: Work) -> str:
    from relfv.engine.answers import Injection, decode_vector, score_answers

    model, alpha, vector = work.model, work.settings.alpha, work.read(FV)
    layer, trials = work.read(STEP6_SUMMARY)["best_layer"], work.once(evaluated)
    prompts, answers, lengths = _asked(model.tokens, trials.prompts, trials.questions)
    # Both halves in one go: the same prompts with nothing added, then with the vector.
    added = np.stack([0 * vector, np.float32(alpha) * vector]).repeat(len(prompts), axis=0)
    scored = score_answers(model.backbone, 2 * prompts, 2 * answers, Injection(layer, added), lengths=2 * lengths)
    without, with_it = scored[: len(prompts)], scored[len(prompts) :]
    rows = _rows(work, without, with_it)
    document = {
        "q_id": work.q_id,
        "meaning": _MEANING,
        "layer": layer,
        "alpha": alpha,
        "n_eval": len(rows),
        "n_several_tokens": sum(row["n_tokens"] > 1 for row in rows),
        "summary": {
            f"{mean}_{name}": sum(row[f"{key}_{name}"] for row in rows) / len(rows)
            for name in ("base", "with")
            for mean, key in (
                ("exact_match", "exact"),
                ("begins_with_answer", "begins"),
                ("mean_logprob_answer", "logprob_answer"),
            )
        },
        "fv_decoded": {
            "caution": "What final norm and unembedding make of the vector alone. A vector that works need not "
            "decode to anything telling, and one that decodes well need not work (Todd et al. 2024, section 3.2).",
            "top": _tokens(model.tokens, decode_vector(model.backbone, model.tokens.encode("a")[:1], vector)),
        },
        "first_trial_as_fed": _as_fed(work),
        "rows": rows,
        **({} if tells_apart(trial_numbers(work.read(TRIALS))) else {"clean_prompts": _after_clean_prompts(work)}),
    }
    work.write(ANSWERS, json_bytes(document), content=document)
    shares = document["summary"]
    exact, begun = (
        " -> ".join(f"{shares[f'{name}_{half}']:.2f}" for half in ("base", "with"))
        for name in ("exact_match", "begins_with_answer")
    )
    return f"at layer {layer}, whole answers {exact}; begun with the answer {begun}"


def _asked(
    tokens: Tokens, texts: Sequence[str], questions: Sequence[Question]
) -> tuple[list[Any], list[Any], list[int]]:
    """Prompts and answers as token ids, and how many tokens to write. Whole answers begin at their first token,
    whichever token is scored."""
    prompts = [
        [*tokens.encode(text), *question.target.space_ids] for text, question in zip(texts, questions, strict=True)
    ]
    answers = [question.target.answer_ids for question in questions]
    return prompts, answers, [_length(tokens, question) for question in questions]


def _after_clean_prompts(work: Work) -> list[dict[str, Any]]:
    from relfv.engine.answers import score_answers

    tokens, trials = work.model.tokens, work.read(TRIALS)
    prompts, answers, lengths = _asked(tokens, trials.clean_prompts, trials.questions)
    scored = score_answers(work.model.backbone, prompts, answers, lengths=lengths)
    return [
        {"trial_idx": question.trial_idx, **_written(tokens, question, one)}
        for question, one in zip(trials.questions, scored, strict=True)
    ]


def _written(tokens: Tokens, question: Question, scored: ScoredAnswer) -> dict[str, Any]:
    ids = list(question.target.answer_ids)
    return {
        "written": tokens.joined(scored.written),
        "begins": int(scored.written[: len(ids)] == ids),
        "exact": int(tokens.answer_in(scored.written) in accepted_answers(question)),
    }


def _as_fed(work: Work) -> dict[str, Any]:
    """The first trial's prompts token by token, with what is fed of the answer, and the token that is scored."""
    text = work.model.tokens.text
    prompts = {"clean": clean_prompts, "corrupted": corrupted_prompts, "zero_shot": evaluated_prompts}
    return {
        **{kind: [text(token) for token in work.once(tokenised).ids[0]] for kind, tokenised in prompts.items()},
        "scored": text(work.once(evaluated).questions[0].target.token_id),
    }


def accepted_answers(question: Question) -> list[str]:
    """All right answers to a question, the trial's own first."""
    return [question.answer, *(answer for answer, _ in question.accepted)]


def _length(tokens: Tokens, question: Question) -> int:
    """How many tokens must be written to see the longest accepted answer end."""
    others = [len(tokens.encode(f"A: {answer}")) - len(tokens.encode("A:")) for answer, _ in question.accepted]
    return 1 + max(len(question.target.answer_ids), *others, 0)


def _rows(work: Work, without: Sequence[ScoredAnswer], with_it: Sequence[ScoredAnswer]) -> list[dict[str, Any]]:
    rows, tokens = [], work.model.tokens
    for question, before, after in zip(work.once(evaluated).questions, without, with_it, strict=True):
        row: dict[str, Any] = {
            "query": question.query.input,
            "answer": question.answer,
            "other_right_answers": accepted_answers(question)[1:],
            "n_tokens": len(question.target.answer_ids),
        }
        for name, scored in (("base", before), ("with", after)):
            row |= {
                f"logprob_answer_{name}": scored.logprob,
                f"rank_first_token_{name}": scored.rank,
                **{f"{key}_{name}": value for key, value in _written(tokens, question, scored).items()},
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
    reads=(TRIALS, ZERO_SHOT_TRIALS, STEP6_SUMMARY, FV),
    writes=(ANSWERS,),
    settings=(*MODEL_SETTINGS, "alpha", "n_eval", "allow_query_duplicates"),
    extra=True,
    share=0.05,
)
