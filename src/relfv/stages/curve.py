"""The injection curve: P and accuracy over layers, with and without the vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from relfv.relations import called
from relfv.stages.function_vector import STEP_E_EVAL
from relfv.stages.stage import Stage, Work
from relfv.stages.step6 import EVAL_META, EVAL_SUMMARY
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.store.folder import File, QidFolder

if TYPE_CHECKING:
    from relfv.figures.canvas import Canvas
    from relfv.figures.images import Curve

CURVE = File("step6/injection_curve.png", Path.stat)


def drawn(work: Work) -> Canvas:
    """The curve of a q_id."""
    from relfv.figures.images import caption, injection_curve

    return injection_curve(curve_of(work.folder, work.name), caption(work.settings))


def curve_of(folder: QidFolder, name: str) -> Curve:
    """The data of a q_id's injection curve."""
    from relfv.figures.images import Curve

    layers = {layer: folder.read(EVAL_SUMMARY, layer) for layer in folder.read(STEP6_SUMMARY)["completed_layers"]}
    reference = folder.read(STEP_E_EVAL).get("reference")
    meta = [folder.read(EVAL_META, layer) for layer in layers if folder.has(EVAL_META, layer)]
    shares = [one["share_of_hidden"] for one in meta if one.get("share_of_hidden") is not None]  # not in other tools'
    return Curve(layers, reference, called(folder.q_id, name), shares)


def _draw(work: Work) -> str:
    work.write(CURVE, drawn(work).to_bytes())
    return f"{len(work.layers)} layers"


STAGE = Stage(
    "injection_curve",
    "P and accuracy over layers.",
    _draw,
    reads=(STEP6_SUMMARY, STEP_E_EVAL, EVAL_SUMMARY, EVAL_META),
    writes=(CURVE,),
    share=0.02,
)
