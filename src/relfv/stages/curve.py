"""The injection curve: P and accuracy over layers, with and without the vector."""

from __future__ import annotations

from pathlib import Path

from relfv.stages.function_vector import STEP_E_EVAL
from relfv.stages.stage import Stage, Work
from relfv.stages.step6 import EVAL_META, EVAL_SUMMARY
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.store.folder import File

CURVE = File("step6/injection_curve.png", Path.stat)


def _draw(work: Work) -> str:
    from relfv.figures import injection_curve_png

    layers = {layer: work.read(EVAL_SUMMARY, layer) for layer in work.read(STEP6_SUMMARY)["completed_layers"]}
    reference = work.read(STEP_E_EVAL).get("reference")
    meta = [work.read(EVAL_META, layer) for layer in layers if work.folder.has(EVAL_META, layer)]
    shares = [one["share_of_hidden"] for one in meta if one.get("share_of_hidden") is not None]  # not in other tools'
    work.write(CURVE, injection_curve_png(layers, reference, work.q_id, shares))
    return f"{len(layers)} layers"


STAGE = Stage(
    "injection_curve",
    "P and accuracy over layers.",
    _draw,
    reads=(STEP6_SUMMARY, STEP_E_EVAL, EVAL_SUMMARY, EVAL_META),
    writes=(CURVE,),
    share=0.02,
)
