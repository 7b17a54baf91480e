"""What ``--extras ablation``, ``--extras mlp`` and ``--extras positions`` write."""

from __future__ import annotations

from relfv.schemas.injection import SHARE
from relfv.schemas.notation import INDEX, NUMBER, TEXT, array, by_name, keys, nullable, one_of, record

_CHANGE = record(
    {
        "acc": NUMBER,
        **keys("mean_p mean_delta_p ci_low ci_high", nullable(NUMBER)),
        **keys("mean_delta_logprob delta_logprob_ci_low delta_logprob_ci_high", nullable(NUMBER)),
        "share_of_gap": SHARE,
    },
    {"mean_p_of_draws": array(nullable(NUMBER))},
)
_SET = record(
    {"swapped": _CHANGE, "mean": _CHANGE},
    {
        **keys("zero other_relations", _CHANGE),
        "n_heads": INDEX,
        **keys("mean_cie mean_length_written", NUMBER),
        "heads": array(record(keys("layer head", INDEX))),
    },
)
_UNTOUCHED = record(keys("acc mean_p mean_logprob", NUMBER))
_RIVAL = record({**keys("falls_further_by ci_low ci_high", nullable(NUMBER)), **keys("n_draws n_draws_as_low", INDEX)})
_ROW = record(
    {
        "asks": one_of("sufficient", "necessary"),
        "what": TEXT,
        **keys("share_of_gap held_out", SHARE),
        "random": nullable(NUMBER),
    }
)
ABLATION = record(
    {
        **keys("q_id verdict meaning precision", TEXT),
        "sets": by_name(TEXT),
        **keys("k n_trials n_queries", INDEX),
        "ci_level": NUMBER,
        **keys("clean shuffled", _UNTOUCHED),
        "heads": by_name(_SET),
        "directions": by_name(
            record({"length": NUMBER, **keys("all all_to_mean", _CHANGE)}, {"per_layer": by_name(_CHANGE)})
        ),
        **keys("against_random against_random_other_relations", by_name(_RIVAL)),
        "other_relations": record(
            {
                "not_available": nullable(TEXT),
                "n_prompts": INDEX,
                "n_prompts_of": by_name(INDEX),
                "left_out": by_name(TEXT),
                "fed_ids": by_name(array(INDEX)),
                "prompts": array(record(keys("q_id trial_id clean_prompt_str", TEXT))),
            }
        ),
        "table": array(_ROW),
        "by_prompt": record(
            {
                "query_source_index": array(INDEX),
                **keys("p_clean p_shuffled", array(NUMBER)),
                "p_without": by_name(array(nullable(NUMBER))),
            }
        ),
    }
)

_MLP = record(
    {
        **keys("layer mean_delta_p_queries_behind_half", INDEX),
        **keys("mean_delta_p mean_delta_logit mean_delta_logprob clean_mean_norm", nullable(NUMBER)),
        **keys("mean_delta_p_se mean_delta_p_ci_low mean_delta_p_ci_high", nullable(NUMBER)),
        **keys("mean_delta_p_p_value mean_delta_p_fdr", nullable(NUMBER)),
        "best_head": nullable(record({"head": INDEX, "mean_delta_p": NUMBER})),
    }
)
MLP_CIE = record(
    {
        **keys("q_id meaning precision", TEXT),
        **keys("n_trials n_queries", INDEX),
        "ci_level": NUMBER,
        "mlps": array(_MLP),
        "by_trial": record(
            {
                "query_source_index": array(INDEX),
                "p_base": array(NUMBER),
                "delta_p": by_name(array(nullable(NUMBER))),
            }
        ),
    }
)

_SET_TOGETHER = record(
    {"acc": NUMBER, **keys("mean_p mean_delta_p ci_low ci_high", nullable(NUMBER)), "share_of_gap": SHARE},
    {"mean_p_of_draws": array(nullable(NUMBER))},
)
_OF_HEAD = record(keys("mean_delta_p ci_low ci_high", nullable(NUMBER)))
POSITIONS = record(
    {
        **keys("q_id verdict meaning precision", TEXT),
        "classes": by_name(record({"tokens": TEXT, "n_tokens": INDEX})),
        **keys("n_prompts_with_merged_tokens k n_trials n_queries n_passes", INDEX),
        "ci_level": NUMBER,
        **keys("corrupted clean", _UNTOUCHED),
        "together": by_name(record({"top": _SET_TOGETHER}, {"random": _SET_TOGETHER})),
        "heads": array(
            record(
                {
                    **keys("layer head", INDEX),
                    **keys("label separator query last", _OF_HEAD),
                }
            )
        ),
        "by_trial": record(
            {
                "query_source_index": array(INDEX),
                "p_base": array(NUMBER),
                "p_with": by_name(array(nullable(NUMBER))),
            }
        ),
    }
)
