"""A plan that is registered before a run: what a user writes, and what relfv adds when it takes it."""

from __future__ import annotations

from relfv.schemas.notation import ANY, FLAG, INDEX, NUMBER, SHA256, TEXT, array, by_name, either, keys, one_of, record
from relfv.store.formats import SEAL

HYPOTHESIS = record(
    {**keys("says file", TEXT), "value": array(either(TEXT, INDEX))},
    {
        **keys("at_least at_most", NUMBER),
        "equals": either(NUMBER, TEXT, FLAG),
        "q_ids": array(TEXT),
        "in_at_least": INDEX,
    },
)
LAYER_RULES = ("held_out", "best")
REGISTERED = record(
    {
        **keys("at relfv_version csv model model_identity", TEXT),
        **keys("plan_sha256 csv_sha256 fingerprint", SHA256),
        "fingerprint_fields": by_name(ANY),
        "rows_sha256": by_name(SHA256),
        "results_before": array(TEXT),
    }
)
WRITTEN = {
    "hypotheses": array(HYPOTHESIS),
    "layer_rule": either(one_of(*LAYER_RULES), INDEX),
    "exclusions": by_name(TEXT),
    **keys("notes analyst", TEXT),
}
PLAN = record({}, {**WRITTEN, "registered": REGISTERED, SEAL: SHA256})
