"""Statuses, manifests, and what concerns all q_ids."""

from __future__ import annotations

from relfv.schemas.injection import ACCURACY_AND_P, JUDGED
from relfv.schemas.notation import (
    ANY,
    FLAG,
    INDEX,
    NUMBER,
    SHA256,
    TEXT,
    WHOLE,
    Schema,
    array,
    by_name,
    either,
    keys,
    nullable,
    one_of,
    record,
)
from relfv.store.formats import SEAL

_SETTINGS = by_name(either(FLAG, NUMBER, TEXT, array(NUMBER)))
_HASHES = by_name(SHA256)
_STAGE = record(
    {"status": TEXT, "started_at": TEXT, "finished_at": nullable(TEXT), "files": _HASHES, "inputs": _HASHES}
)
STATUS = record(
    {
        "status_format": INDEX,
        "q_id": TEXT,
        "status": one_of("pending", "running", "completed", "failed", "skipped"),
        "reason": nullable(TEXT),
        **keys("created_at updated_at", TEXT),
        "q_row_count": INDEX,
        "spec_conformant": FLAG,
        "departures": array(TEXT),
        **keys("config fingerprint_fields", _SETTINGS),
        "fingerprint": SHA256,
        "expected_layers": array(INDEX),
        "trials_per_pass": by_name(INDEX),
        "stages": by_name(_STAGE),
        "other_files": _HASHES,
        SEAL: SHA256,
    }
)

_CHECK = record(
    {
        **keys("engine reason", TEXT),
        "max_effect": NUMBER,
        **keys("max_error reference_error rounding writing_error", nullable(NUMBER)),
        "found_at": nullable(TEXT),
    }
)
_MODEL = record(
    {
        **keys("class family dtype quant precision device device_name engine", TEXT),
        **keys("n_layers n_heads head_dim resid_dim cpu_threads", INDEX),
        "layers_with_attention": array(INDEX),
        "self_check": _CHECK,
        "notes": array(TEXT),
    }
)
_RUN: Schema = {
    **keys("started_at relfv_version csv_sha256 model_id model_identity platform", TEXT),
    **keys("finished_at model_revision git_commit", nullable(TEXT)),
    **keys("algorithm_version pid", WHOLE),
    "spec_conformant": FLAG,
    **keys("departures q_list command", array(TEXT)),
    "settings": _SETTINGS,
    "versions": by_name(nullable(TEXT)),
}
_OPENED: Schema = {"model": _MODEL, "outcomes": by_name(TEXT), "devices": array(TEXT)}
MANIFEST = record({**_RUN, "earlier_runs": array(record(_RUN, _OPENED)), SEAL: SHA256}, _OPENED)

_SOURCE = record(JUDGED)
_TARGET = record(
    {
        "verdict": TEXT,
        "alpha": NUMBER,
        **keys("n_eval n_queries best_layer rank_of_own_each_at_its_best_layer", nullable(INDEX)),
        "made_from": record({"settings": _SETTINGS, "files": _HASHES}),
        "made_by": record({**keys("engine device dtype", TEXT), "prompts_per_pass": INDEX}),
        "at_best_layer": record({"own": _SOURCE, "others": _SOURCE, "not_apart_from_own": array(TEXT)}, {"best": ANY}),
        "zero_shot": record(ACCURACY_AND_P),
        "per_layer": by_name(by_name(_SOURCE)),
    }
)
CROSS = record(
    {
        **keys("relation verdict model model_spec dtype quant precision model_identity", TEXT),
        "meaning": by_name(TEXT),
        "algorithm_version": WHOLE,
        "layers": array(INDEX),
        "ci_level": NUMBER,
        "q_ids": array(TEXT),
        "norms": array(NUMBER),
        "cosine": array(array(NUMBER)),
        "targets": by_name(_TARGET),
        "figure": _HASHES,
        SEAL: SHA256,
    }
)

MADE_FROM = record({"made_from": SHA256, "files": _HASHES, SEAL: SHA256})
