"""What StepD and StepE write."""

from __future__ import annotations

from relfv.schemas.notation import (
    FLAG,
    INDEX,
    NUMBER,
    TEXT,
    ZERO_OR_ONE,
    Schema,
    array,
    by_name,
    keys,
    nullable,
    record,
)

_PAIR = record(keys("input output", TEXT))
_COLLISION = record({"token_id": INDEX, "token": TEXT, "answers": array(TEXT)})
_META = record(
    {
        **keys("csv_path csv_sha256 corruption model model_spec target", TEXT),
        "q_list": array(TEXT),
        **keys("n_trials_per_q n_demos seed", INDEX),
        **keys("prefixes separators", record(keys("input output instructions", TEXT))),
        "tok_add_special": FLAG,
        **keys("n_labels_left_in_place n_demos_of_query_input n_answers_tokenised_alone n_space_fed", INDEX),
        **keys("n_blank_targets longest_prompt_tokens", INDEX),
        "first_token_collisions": array(_COLLISION),
        "context_notes": array(TEXT),
    },
    {"zero_shot": FLAG, "prompt_format": TEXT},
)
_QUESTION: Schema = {
    **keys("q_id trial_id corrupted_prompt_str target_str", TEXT),
    **keys("trial_idx query_source_index target_first_token_id n_answer_tokens_fed", INDEX),
    "query": _PAIR,
    **keys("answer_ids space_ids", array(INDEX)),
    **keys("answer_tokenised_with_prompt space_fed", FLAG),
    "other_right_answers": array(record({"answer": TEXT, "token_id": nullable(INDEX)})),
}
_TRIAL = record(
    {
        **_QUESTION,
        "clean_prompt_str": TEXT,
        "demo_source_indices": array(INDEX),
        **keys("demos_clean demos_corrupted", array(_PAIR)),
        **keys("n_labels_in_place n_demos_of_query_input", INDEX),
    }
)
TRIALS = record({"meta": _META, "trials": array(_TRIAL)})
ZERO_SHOT_TRIALS = record({"meta": _META, "trials": array(record({**_QUESTION, "target_id": INDEX}))})

METRICS = record(
    {
        "q_id": TEXT,
        **keys("trial_idx layer head target_id", INDEX),
        **keys("p_base p_patch delta_p logit_base logit_patch delta_logit", NUMBER),
        **keys("logprob_base logprob_patch delta_logprob", NUMBER),
    }
)

_HEAD: Schema = keys("layer head", INDEX)
_NOISE = record({**keys("p logit logprob", record(keys("max median", NUMBER))), "trials_per_pass": INDEX})
NOISE_FLOOR = record(
    {
        **keys("q_id meaning engine precision dtype quant device products", TEXT),
        "kernels": FLAG,
        **keys("trials_per_pass heads_per_trial n_trials", INDEX),
        "heads": array(record(_HEAD)),
        **keys("identity other_shape", _NOISE),
    }
)

HEAD_STABILITY = record(
    {
        **keys("q_id meaning score_key", TEXT),
        **keys("k n_bootstrap n_halvings", INDEX),
        "half_overlap": nullable(NUMBER),
        "chance_overlap": NUMBER,
        "heads": array(record({**_HEAD, "in_top_k": NUMBER})),
    }
)

_OF_CALLS: Schema = {
    **keys("n_distinguishable n_queries n_called_at_once", INDEX),
    "fdr_level": NUMBER,
    "detectable_mean_delta_p": record({"power": NUMBER, **keys("se alone among_all", nullable(NUMBER))}),
}
_MADE_OF: Schema = {"k": INDEX, **keys("score_key model model_spec q_id", TEXT)}
_TOP_HEAD = record(
    {**_HEAD, "score_key": TEXT, **keys("rank_score mean_delta_p mean_delta_logprob", NUMBER), "n_trials": INDEX},
    {
        **{
            f"mean_delta_p_{name}": nullable(NUMBER)
            for name in ("ci_low", "ci_high", "p_value", "fdr", "queries_behind_half")
        },
        "distinguishable": FLAG,
        "in_top_k": NUMBER,
        "share_of_clean_minus_corrupted": nullable(NUMBER),
        "leave_query_out": record(keys("se ci_low ci_high", nullable(NUMBER))),
    },
)
TOP_HEADS = record({"meta": record(_MADE_OF, _OF_CALLS), "heads": array(_TOP_HEAD)})

FV_META = record(
    {
        **_MADE_OF,
        "heads": array(array(INDEX)),
        **keys("token_position_rule precision output_bias", TEXT),
        "fv_norm": NUMBER,
        "notes": array(TEXT),
    },
    _OF_CALLS,
)

_REFERENCE = record({**keys("acc mean_p mean_logit mean_logprob", NUMBER), "n": INDEX, "right": array(ZERO_OR_ONE)})
_QUICK: Schema = {**keys("mean_delta_logit mean_delta_p", NUMBER), "n": INDEX}
STEP_E_EVAL = record(
    {
        "meta": record({**keys("what model model_spec token_position_rule", TEXT), "alpha": NUMBER}),
        "per_layer": by_name(record({**_QUICK, "acc_with": NUMBER})),
        "overall": record(_QUICK),
        "reference": record(keys("clean corrupted", _REFERENCE)),
    }
)

_AGREEMENT = record(keys("spearman recall", nullable(NUMBER)))
_OF_SIZE = record({"from": NUMBER, "n": INDEX, **keys("median_ratio signs_differ", nullable(NUMBER))})
ATTRIBUTION = record(
    {
        **keys("q_id score_key precision", TEXT),
        "meaning": by_name(TEXT),
        **keys("k n_trials n_heads", INDEX),
        "n_passes": by_name(INDEX),
        **keys("first_order graddrop", _AGREEMENT),
        "by_size": array(_OF_SIZE),
        "within_heads": nullable(NUMBER),
        "heads": array(record({**keys("layer head", INDEX), **keys("exact first_order graddrop", NUMBER)})),
    }
)
