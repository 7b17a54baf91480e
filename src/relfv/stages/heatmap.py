"""The heatmap: the score of every head, layers by heads, with the top k marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from relfv.relations import called
from relfv.stages.scores import AIE, rank_heads, require_score, select_heads
from relfv.stages.stage import Stage, Work
from relfv.store.folder import File

if TYPE_CHECKING:
    from relfv.figures.canvas import Canvas
    from relfv.figures.images import Heatmap

HEATMAP = File("aie_heatmap_{q_id}.png", Path.stat)


def drawn(work: Work) -> Canvas:
    """The heatmap as the settings of the work say."""
    from relfv.figures.images import caption, heatmap

    return heatmap(heatmap_of(work), work.settings.score_key, caption(work.settings))


def heatmap_of(work: Work) -> Heatmap:
    """The data of a q_id's heatmap."""
    from relfv.figures.images import Heatmap

    metric, scored = work.settings.score_key, work.read(AIE)
    require_score(scored, metric, work.folder.path(AIE))
    top = select_heads(rank_heads(scored, metric), work.settings.topk)
    return Heatmap(scored, top, called(work.q_id, work.name))


def _draw(work: Work) -> str:
    work.write(HEATMAP, drawn(work).to_bytes())
    return f"{work.settings.score_key}, top {work.settings.topk} marked"


STAGE = Stage(
    "heatmap",
    "The score of every head, layers by heads, the top k marked.",
    _draw,
    reads=(AIE,),
    writes=(HEATMAP,),
    settings=("score_key", "topk"),
    share=0.02,
)
