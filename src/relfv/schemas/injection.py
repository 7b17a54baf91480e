"""What Step6 and the stages after it write."""

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
    either,
    keys,
    nullable,
    record,
)

_MEANS: Schema = {
    "n_eval": INDEX,
    **keys("acc_base acc_with delta_acc", NUMBER),
    **{f"mean_{m}_{half}": NUMBER for m in ("p", "logit", "logprob") for half in ("base", "with")},
    **{f"{what}_delta_{m}": NUMBER for m in ("p", "logit", "logprob") for what in ("mean", "std")},
}
EVAL_SUMMARY = record({**_MEANS, **keys("requested_n_eval n_trials", INDEX)})
EVAL_TRIAL = record(
    {
        **keys("idx trial_idx target_id pred_id_base pred_id_with", INDEX),
        **keys("q_id prompt answer target_token pred_token_base pred_token_with", TEXT),
        **keys("accuracy_base accuracy_with", ZERO_OR_ONE),
        **{f"{m}_{half}": NUMBER for m in ("p", "logit", "logprob") for half in ("base", "with")},
        **keys("delta_p delta_logit delta_logprob", NUMBER),
    }
)
EVAL_META = record(
    {
        **keys("model model_spec token_position_rule dtype quant precision engine device sampling", TEXT),
        **keys("edit_layer seed n_eval requested_n_eval", INDEX),
        **keys("alpha fv_norm mean_norm_hidden", NUMBER),
        "share_of_hidden": nullable(NUMBER),
    }
)
RESULTS = record(
    {
        "config": EVAL_META,
        "fv": record({"shape": array(INDEX), "norm": NUMBER}),
        "summary": EVAL_SUMMARY,
        "per_qid": by_name(record(_MEANS)),
        "metadata": record({"trials": array(TEXT), **keys("fv_global_path sampled_trials_path", TEXT)}),
        "results": array(EVAL_TRIAL),
    }
)
_LAYER = record({**keys("results_path eval_summary_path", TEXT), **keys("score_value acc_base acc_with", NUMBER)})
STEP6_SUMMARY = record(
    {
        **keys("q_id score_key", TEXT),
        **keys("expected_layers completed_layers missing_layers", array(INDEX)),
        "best_layer": INDEX,
        "best_score": NUMBER,
        "per_layer": by_name(_LAYER),
    }
)

ACCURACY_AND_P: Schema = keys("acc mean_p", nullable(NUMBER))
JUDGED: Schema = {**ACCURACY_AND_P, **keys("mean_delta_p ci_low ci_high", nullable(NUMBER))}
"""Means over prompts, and the interval of ``mean_delta_p``."""
_JUDGED = record(JUDGED, {"mean_p_of_draws": array(nullable(NUMBER))})
_BY_PROMPT = array(nullable(NUMBER))
CONTROLS = record(
    {
        **keys("q_id precision", TEXT),
        "meaning": by_name(TEXT),
        **keys("n_eval n_queries", INDEX),
        **keys("alpha ci_level", NUMBER),
        **keys("mean_norm_added mean_norm_hidden", by_name(nullable(NUMBER))),
        "notes": array(TEXT),
        "as_written": record(
            {"meaning": TEXT, "known": FLAG},
            {"same_as_fv": nullable(FLAG), **keys("fv_norm norm cosine_with_fv", nullable(NUMBER))},
        ),
        "zero_shot": record(ACCURACY_AND_P),
        "per_layer": by_name(by_name(_JUDGED)),
        "by_prompt": by_name(either(_BY_PROMPT, by_name(_BY_PROMPT))),
        "at_once": record(
            {"meaning": by_name(TEXT), "numbers": by_name(_JUDGED), "by_prompt": by_name(_BY_PROMPT)},
        ),
    },
    {"compared_layers": array(INDEX), "read_in_brief": array(TEXT)},
)

_TOKENS = array(record({"token_id": INDEX, "token": TEXT, "p": NUMBER}))


def _halves(names: str, of: Schema) -> Schema:
    return {f"{name}_{half}": of for half in ("base", "with") for name in names.split()}


_ANSWER = record(
    {
        **keys("query answer", TEXT),
        "other_right_answers": array(TEXT),
        "n_tokens": INDEX,
        **_halves("logprob_answer", NUMBER),
        **_halves("rank_first_token", INDEX),
        **_halves("written", TEXT),
        **_halves("begins exact", ZERO_OR_ONE),
        **_halves("top", _TOKENS),
    }
)
ANSWERS = record(
    {
        **keys("q_id meaning", TEXT),
        **keys("layer n_eval n_several_tokens", INDEX),
        "alpha": NUMBER,
        "summary": record(_halves("exact_match begins_with_answer mean_logprob_answer", NUMBER)),
        "fv_decoded": record({"caution": TEXT, "top": _TOKENS}),
        "rows": array(_ANSWER),
    },
    {"clean_prompts": array(record({"trial_idx": INDEX, "written": TEXT, **keys("begins exact", ZERO_OR_ONE)}))},
)

SHARE = nullable(
    record(
        {
            **keys("value low high high_of_mean others_up_to", NUMBER),
            **keys("n_queries n_closing_half", INDEX),
        }
    )
)
_RIVAL = record(
    {
        "share_of_gap_above": nullable(record(keys("value low high", NUMBER))),
        **keys("n_draws n_draws_as_good", INDEX),
    }
)
_CARRIER = record(
    {"share_of_gap": SHARE},
    {**keys("p acc", nullable(NUMBER)), "share_of_gap_of_draws": array(NUMBER), "layer": INDEX},
)
_CHANGE: Schema = keys("mean_delta_p ci_low ci_high", nullable(NUMBER))
_OF_ROWS = record(
    keys("n_eval n_queries", INDEX), {**keys("acc_base acc_with mean_p_base mean_p_with", NUMBER), **_CHANGE}
)
_ABLE: Schema = {
    "ability": record(
        {
            "can_do": FLAG,
            **keys("why_not judged_by", TEXT),
            "clean_acc": record(keys("value low high", NUMBER)),
            **keys("majority_acc p_by_majority", NUMBER),
            **keys("n_trials n_queries", INDEX),
        }
    ),
    "answered_right": record(
        {
            **keys("n_trials n_queries min_queries", INDEX),
            "top_heads": record(keys("all answered_right", nullable(record(_CHANGE)))),
            "heads": array(record({**keys("layer head", INDEX), "answered_right": nullable(record(_CHANGE))})),
            "step6": record(keys("all answered_right", _OF_ROWS)),
        }
    ),
}
SUMMARY = record(
    {
        **keys("q_id verdict", TEXT),
        **keys("n_heads n_eval n_queries layer", INDEX),
        **keys("n_heads_distinguishable n_heads_called_at_once n_heads_of_few_queries", nullable(INDEX)),
        "n_queries_of_trials": nullable(INDEX),
        **keys("half_overlap_of_top_heads chance_overlap_of_top_heads", nullable(NUMBER)),
        **keys("p acc", by_name(nullable(NUMBER))),
        "share_of_gap": by_name(SHARE),
        "share_of_gap_of_draws": by_name(array(NUMBER)),
        "against_random": by_name(_RIVAL),
        **keys("share_of_hidden share_of_hidden_at_the_median_layer", nullable(NUMBER)),
        "notes": array(TEXT),
        "fv_is_as_written": nullable(FLAG),
        "carriers": by_name(_CARRIER),
        **_ABLE,
        "scored_token": record(
            {
                "target": TEXT,
                **keys("n_trials n_answer_shares_it n_white_space_alone n_space_fed", INDEX),
                "tells_answers_apart": FLAG,
            }
        ),
        "whole_answers": record(keys("base with begun_base begun_with", NUMBER)),
        "corruption": record(
            {
                "how": TEXT,
                **keys("n_demos n_labels_in_place n_distinct_answers", INDEX),
                **keys("acc_clean p_clean acc_corrupted p_corrupted", NUMBER),
            }
        ),
        **keys("n_queries_with_several_answers n_demos_of_query_input", INDEX),
        "ci_level": NUMBER,
    }
)

_ADDED: Schema = keys("alpha norm_added share_of_hidden", nullable(NUMBER))
_SWEPT = record(
    {
        "value": NUMBER,
        "best_layer": nullable(INDEX),
        **_ADDED,
        **ACCURACY_AND_P,
        "per_layer": by_name(record({**JUDGED, **_ADDED})),
    }
)
SWEEPS = record(
    {
        **keys("q_id meaning caution precision", TEXT),
        "own": record({"alpha": NUMBER, "k": INDEX}),
        **keys("n_eval n_queries", INDEX),
        "ci_level": NUMBER,
        "zero_shot": record(ACCURACY_AND_P),
    },
    keys("alpha alpha_relative k", array(_SWEPT)),
)

NEW_QUERIES = record(
    {
        **keys("q_id verdict", TEXT),
        "meaning": by_name(TEXT),
        **keys("layer n_queries", INDEX),
    },
    {
        **keys("alpha ci_level", NUMBER),
        "precision": TEXT,
        **keys("p acc", record(keys("zero_shot fv clean", NUMBER))),
        "share_of_gap": SHARE,
        "per_layer": by_name(record(JUDGED)),
        "queries": array(
            record(
                {
                    **keys("query answer", TEXT),
                    "query_source_index": INDEX,
                    **keys("p_zero_shot p_fv p_clean", NUMBER),
                    **keys("right_zero_shot right_fv right_clean", ZERO_OR_ONE),
                }
            )
        ),
    },
)
