from __future__ import annotations

import json
from pathlib import Path

from relfv.store.artifacts import read_deltas, read_trials


def test_rows_with_the_same_input_are_one_query(finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "A1/artifacts/sampled_trials.json").read_text())
    rows = [trial["query_source_index"] for trial in document["trials"]]
    other = next(i for i, row in enumerate(rows) if row != rows[0])
    document["trials"][other]["query"]["input"] = document["trials"][0]["query"]["input"]
    (tmp_path / "trials.json").write_text(json.dumps(document))
    before, after = read_trials(finished / "A1/artifacts/sampled_trials.json"), read_trials(tmp_path / "trials.json")
    assert before.queries == rows
    assert after.queries[other] == after.queries[0] == min(rows[0], rows[other])
    part = after.only([other])
    assert part.queries == [after.queries[0]]
    assert part.trials == [document["trials"][other]]


def test_deltas_are_those_of_the_file_whatever_was_read_before(finished: Path, tmp_path: Path) -> None:
    original = finished / "A1/artifacts/trial_metrics.jsonl"
    heads, first = read_deltas(original, "p")
    lines = original.read_text().splitlines()
    row = json.loads(lines[-1])
    row["delta_p"] += 0.5
    (tmp_path / "changed.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]))
    changed = read_deltas(tmp_path / "changed.jsonl", "p")[1]
    assert changed[-1, -1] == first[-1, -1] + 0.5
    first[:] = 0  # a caller may do with its own what it likes
    again = read_deltas(original, "p")
    assert again[0] == heads
    assert (again[1][:-1] == changed[:-1]).all()
