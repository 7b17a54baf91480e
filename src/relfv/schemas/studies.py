"""What is written on request, beside what completes a q_id."""

from __future__ import annotations

from relfv.schemas.notation import FLAG, INDEX, NUMBER, TEXT, array, by_name, keys, nullable, record

PAIRS = record({**keys("mean lowest highest", NUMBER), **keys("low high", nullable(NUMBER)), "n_draws": INDEX})
"""A mean over pairs."""
_CHANCE = {"mean": NUMBER, "p_value": nullable(NUMBER)}
_AGREEMENT = {
    **keys("cosine spearman heads_shared", nullable(PAIRS)),
    "heads_by_chance": record(_CHANCE),
}
_OF_DRAWS = record(keys("mean_p acc", array(nullable(NUMBER))))
_CELL = nullable(record({"value": NUMBER, **keys("low high", nullable(NUMBER))}))
_SCORED = record(keys("acc mean_p", NUMBER))
_FORMAT = record(
    {
        **keys("prompt separator introduction first_clean_prompt first_scored_token", TEXT),
        "demos": FLAG,
        "first_zero_shot_as_fed": array(TEXT),
        **keys("n_answers_tokenised_alone n_space_fed", INDEX),
        **keys("clean", _SCORED),
        "norm": NUMBER,
        "heads": array(array(INDEX)),
    }
)
_CHANGE = {**keys("acc mean_p mean_delta_p", NUMBER), **keys("ci_low ci_high", nullable(NUMBER))}
_TARGET = record(
    {
        "verdict": TEXT,
        "best_layer": INDEX,
        "at_best_layer": record(
            {
                **keys("own others", record(_CHANGE)),
                "p_own_raises_p": NUMBER,
                "rank_of_own": INDEX,
                "best": TEXT,
                "not_apart_from_own": array(TEXT),
            }
        ),
        "rank_of_own_each_at_its_best_layer": INDEX,
        "zero_shot": _SCORED,
        "per_layer": by_name(by_name(record(_CHANGE))),
        "own_minus": by_name(record({"mean": NUMBER, **keys("low high", nullable(NUMBER))})),
    }
)
FORMATS = record(
    {
        **keys("q_id verdict score_key precision", TEXT),
        **keys("meaning left_out", by_name(TEXT)),
        **keys("alpha ci_level", NUMBER),
        **keys("k n_heads", INDEX),
        "formats": by_name(_FORMAT),
        "cosine": array(array(_CELL)),
        "cosine_of_random_heads": nullable(NUMBER),
        "spearman": array(array(nullable(NUMBER))),
        "heads_shared": array(array(INDEX)),
        "heads_by_chance": nullable(record(_CHANCE)),
        "heads_common": record({"heads": array(array(INDEX)), **_CHANCE}),
        "targets": by_name(_TARGET),
    }
)
REPLICATES = record(
    {
        **keys("q_id verdict score_key precision", TEXT),
        "meaning": by_name(TEXT),
        **keys("n_draws n_trials k n_heads", INDEX),
        "ci_level": NUMBER,
        "samples": record({"n_rows": INDEX, "queries_shared": NUMBER}),
        "ladder": array(record({**keys("n_trials n_draws", INDEX), **_AGREEMENT})),
        "cosine_of_random_heads": nullable(NUMBER),
        "cosine": array(array(nullable(NUMBER))),
        "heads_shared": array(array(INDEX)),
        "curve": record(
            {
                **keys("n_eval best_layer", INDEX),
                "zero_shot": record(keys("acc mean_p", NUMBER)),
                "at_best_layer": _OF_DRAWS,
                "best_layer_of_draws": array(INDEX),
                "per_layer": by_name(_OF_DRAWS),
            }
        ),
        "draws": array(record({**keys("seed n_queries", INDEX), "norm": NUMBER, "heads": array(array(INDEX))})),
    }
)
