"""The form of every JSON artifact: one declaration each, and from it a JSON Schema for whoever reads the files.

The schemas are in the package, as ``schemas/json/<artifact>.schema.json`` (JSON lines: of one line); the tests write
them from the declarations and hold real files against them.
"""

from __future__ import annotations

import re

from relfv.errors import InputError
from relfv.schemas import aggregate, heads, injection, necessity, plans, records, studies
from relfv.schemas.notation import Schema

_DECLARED: dict[str, tuple[str, Schema]] = {
    "sampled_trials.json": ("The frozen trials of a q_id.", heads.TRIALS),
    "sampled_trials_zeroshot.json": ("Their queries without demos.", heads.ZERO_SHOT_TRIALS),
    "trial_metrics.jsonl": ("A line: one head's effect on one trial.", heads.METRICS),
    "noise_floor.json": ("What arithmetic alone makes of an effect.", heads.NOISE_FLOOR),
    "head_stability.json": ("How stable the list of top heads is.", heads.HEAD_STABILITY),
    "top_heads.json": ("The heads of the function vector, best first.", heads.TOP_HEADS),
    "fv_global_resid_meta.json": ("What the function vector is made of.", heads.FV_META),
    "stepE_eval.json": ("A quick check of the vector on the frozen trials.", heads.STEP_E_EVAL),
    "eval_summary.json": ("Means over zero-shot prompts at one layer.", injection.EVAL_SUMMARY),
    "eval_trials.jsonl": ("A line: one zero-shot prompt at one layer.", injection.EVAL_TRIAL),
    "eval_meta.json": ("How it was measured.", injection.EVAL_META),
    "step6_results.json": ("All of one layer: step6_results_<model>_layer<l>_n<N>.json.", injection.RESULTS),
    "step6_all_layers_summary.json": ("Every layer's score, and the best.", injection.STEP6_SUMMARY),
    "controls.json": ("The vector beside what it is held against.", injection.CONTROLS),
    "answers.json": ("Whole answers without and with the vector.", injection.ANSWERS),
    "summary.json": ("What may be concluded.", injection.SUMMARY),
    "sweeps.json": ("Other alphas and numbers of heads.", injection.SWEEPS),
    "new_queries.json": ("The vector on rows that no trial asks.", injection.NEW_QUERIES),
    "ablation.json": ("What is lost without heads and directions.", necessity.ABLATION),
    "mlp_cie.json": ("The effect of every layer's MLP.", necessity.MLP_CIE),
    "positions.json": ("The top heads at earlier tokens.", necessity.POSITIONS),
    "replicates.json": ("How alike several draws of trials are.", studies.REPLICATES),
    "formats.json": ("The trials in other prompt formats.", studies.FORMATS),
    "attribution.json": ("Estimated effects of every head beside the exact ones.", heads.ATTRIBUTION),
    "qid_status.json": ("Where a q_id stands.", records.STATUS),
    "run_manifest.json": ("What ran, with which settings, versions and device.", records.MANIFEST),
    "plan.json": ("What was to be shown, registered before the run; relfv adds the key registered.", plans.PLAN),
    "cross_fv.json": ("Every q_id's vector on every q_id's prompts.", records.CROSS),
    "aggregate.json": ("All relations together: heads that lead, and what they carry.", aggregate.AGGREGATE),
    "made_from.json": ("What the tables were made from, and their hashes.", records.MADE_FROM),
}

ARTIFACTS = tuple(_DECLARED)
"""The names of those that have a schema; of a file whose name holds the model's, the part before that."""

_OF_A_LAYER = re.compile(r"^step6_results_.+\.json$")


def schema_of(artifact: str) -> Schema:
    """The JSON Schema (draft 2020-12) of one of ``ARTIFACTS``, or of a file by its own name. Raises InputError for any
    other."""
    artifact = _OF_A_LAYER.sub("step6_results.json", artifact)
    if artifact not in _DECLARED:
        raise InputError(f"schema_of({artifact!r}): it has no schema; those that have: {', '.join(ARTIFACTS)}")
    about, declared = _DECLARED[artifact]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": artifact,
        "description": f"{about} Floats are finite; keys beyond these may come with later versions.",
        **declared,
    }
