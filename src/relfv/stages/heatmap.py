"""The heatmap: the score of every head, layers by heads, with the top k marked."""

from __future__ import annotations

from pathlib import Path

from relfv.stages.scores import AIE, rank_heads, require_score, select_heads
from relfv.stages.stage import Stage, Work
from relfv.store.folder import File

HEATMAP = File("aie_heatmap_{q_id}.png", Path.stat)


def _draw(work: Work) -> str:
    from relfv.figures import heatmap_png

    metric, scored = work.settings.score_key, work.read(AIE)
    require_score(scored, metric, work.folder.path(AIE))
    top = select_heads(rank_heads(scored, metric), work.settings.topk)
    work.write(HEATMAP, heatmap_png(scored, metric, top, work.q_id))
    return f"{metric}, top {len(top)} marked"


STAGE = Stage(
    "heatmap",
    "The score of every head, layers by heads, the top k marked.",
    _draw,
    reads=(AIE,),
    writes=(HEATMAP,),
    settings=("score_key", "topk"),
    share=0.02,
)
