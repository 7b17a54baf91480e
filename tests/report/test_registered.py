from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relfv.report.registered import judged_in
from relfv.store.status import read_status

K, KEY = ["meta", "k"], ["meta", "score_key"]


@pytest.mark.parametrize(
    ("value", "limits", "state"),
    [
        (K, {"at_least": 20}, "held"),
        (K, {"at_least": 21}, "did not hold"),
        (K, {"at_most": 20}, "held"),
        (K, {"at_most": 19}, "did not hold"),
        (K, {"at_least": 10, "at_most": 30}, "held"),
        (K, {"at_least": 10, "at_most": 15}, "did not hold"),
        (K, {"equals": 20}, "held"),
        (K, {"equals": 19}, "did not hold"),
        (["heads", 0, "distinguishable"], {"equals": 1}, "did not hold"),
        (KEY, {"equals": "mean_delta_p"}, "held"),
        (KEY, {"at_least": 3}, "cannot be told"),
        (["meta", "no_such_key"], {"at_least": 3}, "cannot be told"),
    ],
)
def test_a_hypothesis_holds_within_all_its_limits(
    finished: Path, value: list[Any], limits: dict[str, Any], state: str
) -> None:
    status = read_status(finished / "A1/artifacts")
    assert status is not None
    hypothesis = {"says": "It is so.", "file": "top_heads.json", "value": value, **limits}
    plan = {"hypotheses": [hypothesis], "registered": {"rows_sha256": {"A1": ""}}}
    ((name, _, outcome),) = judged_in(plan, status)
    assert (name, outcome.q_id, outcome.state) == ("H1", "A1", state)
    assert judged_in({**plan, "exclusions": {"A1": "why"}}, status) == []
