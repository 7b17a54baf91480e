"""All relations together."""

from __future__ import annotations

from relfv.schemas.injection import ACCURACY_AND_P, JUDGED
from relfv.schemas.notation import (
    FLAG,
    INDEX,
    NUMBER,
    SHA256,
    TEXT,
    WHOLE,
    Schema,
    array,
    by_name,
    keys,
    nullable,
    record,
)
from relfv.store.formats import SEAL

_HASHES = by_name(nullable(SHA256))
_INTERVAL = record(keys("mean ci_low ci_high", nullable(NUMBER)))
_RELATION = record(
    {
        **keys("name why_not", TEXT),
        "included": FLAG,
        **keys("clean_acc majority_acc p_by_majority", NUMBER),
        **keys("n_trials n_queries", INDEX),
    }
)
_HEAD = record(
    {
        **keys("layer head n_positive n_in_own_top", INDEX),
        **keys("aie p_value fdr in_top_k", NUMBER),
        **keys("se ci_low ci_high", nullable(NUMBER)),
    }
)
_HEADS = record(
    {
        **keys("n_heads n_called n_called_at_once n_resamples", INDEX),
        **keys("fdr_level chance_overlap", NUMBER),
        "half_overlap": nullable(NUMBER),
        "universal": array(_HEAD),
    }
)
_SOURCE = record(JUDGED)
_COMPARED: Schema = {"others_minus_own": _INTERVAL, "n_draws_as_good": INDEX}
_TARGET = record(
    {
        "made_from": record({"files": _HASHES, "heads_of_the_others": array(array(INDEX)), "algorithm_version": WHOLE}),
        "made_by": record(keys("engine device dtype", TEXT)),
        **keys("n_eval n_queries n_heads_shared_with_own n_draws", INDEX),
        **keys("compared_layers prompts_per_pass", array(INDEX)),
        "vector": record(
            {
                **_COMPARED,
                **keys("own_layer others_layer compared_layer", INDEX),
                "zero_shot": record(ACCURACY_AND_P),
                "per_layer": by_name(by_name(_SOURCE)),
            }
        ),
        "in_place": record({**_COMPARED, "own": _SOURCE, "others": _SOURCE}, {"random": _SOURCE}),
    }
)
_OVER = record({"n_relations": INDEX}, keys("own others random others_minus_own others_minus_random", _INTERVAL))
AGGREGATE = record(
    {
        **keys("root verdict model model_spec dtype quant precision model_identity score_key", TEXT),
        "meaning": by_name(TEXT),
        "algorithm_version": WHOLE,
        "k": INDEX,
        **keys("alpha ci_level", NUMBER),
        "all": FLAG,
        "relations": by_name(_RELATION),
        "heads": _HEADS,
        "left_out": record(
            {
                "targets": by_name(_TARGET),
                "waiting": array(TEXT),
                "over_relations": record(keys("vector in_place", _OVER)),
            }
        ),
        "similarity": record(
            {
                "order": array(TEXT),
                "matrices": by_name(array(array(nullable(NUMBER)))),
                "agreement": array(
                    record({**keys("a b", TEXT), **keys("correlation p_value", nullable(NUMBER)), "n_orders": INDEX})
                ),
            }
        ),
        "made_from": _HASHES,
        "beside": _HASHES,
        SEAL: SHA256,
    }
)
