from __future__ import annotations

import pytest

from relfv.errors import InputError
from relfv.stages.scores import rank_heads, select_heads
from relfv.types import HeadId, ScoredHead


def scored(layer: int, head: int, value: float) -> ScoredHead:
    return ScoredHead(HeadId(layer, head), {"mean_delta_p": value}, 25)


def test_heads_are_ranked_by_score_and_ties_by_layer_then_head() -> None:
    heads = [scored(2, 0, 0.5), scored(0, 1, 0.1), scored(1, 3, 0.5), scored(1, 2, 0.5), scored(0, 0, -1.0)]
    order = [(head.id.layer, head.id.head) for head in rank_heads(heads, "mean_delta_p")]
    assert order == [(1, 2), (1, 3), (2, 0), (0, 1), (0, 0)]


def test_asking_for_more_heads_than_there_are_is_bad_input() -> None:
    with pytest.raises(InputError, match="only 2 heads were scored"):
        select_heads([scored(0, 0, 1.0), scored(0, 1, 1.0)], 3)
