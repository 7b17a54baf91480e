"""What is written on request, beside what completes a q_id."""

from __future__ import annotations

from relfv.schemas.notation import INDEX, NUMBER, TEXT, array, by_name, keys, nullable, record

PAIRS = record({**keys("mean lowest highest", NUMBER), **keys("low high", nullable(NUMBER)), "n_draws": INDEX})
"""A mean over pairs."""
_AGREEMENT = {
    **keys("cosine spearman", nullable(PAIRS)),
    "heads_shared": PAIRS,
    "heads_by_chance": record(keys("mean p_value", NUMBER)),
}
_OF_DRAWS = record(keys("mean_p acc", array(nullable(NUMBER))))
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
