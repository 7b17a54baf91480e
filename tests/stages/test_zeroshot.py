from __future__ import annotations

import json
import shutil
from pathlib import Path

from relfv.cli import main
from relfv.stages.zeroshot import read_zero_shot_trials, trials_to_evaluate
from relfv.types import Question, Snapshot, Target, WordPair


def snapshot(*queries: tuple[str, str]) -> Snapshot:
    questions = [
        Question("A1", f"A1-{i:03d}", i, WordPair(*query), i, query[1], Target((5,), True))
        for i, query in enumerate(queries)
    ]
    return Snapshot({}, tuple(questions), tuple(word for word, _ in queries), (), tuple(range(len(queries))))


def test_each_distinct_query_is_evaluated_once_in_trial_order() -> None:
    trials = snapshot(("a", "x"), ("b", "x"), ("a", "x"), ("c", "x"), ("a", "other answer"))

    def chosen(n_eval: int, *, allow_duplicates: bool) -> list[int]:
        kept = trials_to_evaluate(trials, n_eval, allow_duplicates=allow_duplicates)
        assert [*kept.prompts] == [question.query.input for question in kept.questions]
        return [question.trial_idx for question in kept.questions]

    assert chosen(50, allow_duplicates=False) == [0, 1, 3, 4]
    assert chosen(2, allow_duplicates=False) == [0, 1]
    assert chosen(50, allow_duplicates=True) == [0, 1, 2, 3, 4]


def test_a_snapshot_of_another_tool_that_does_not_say_the_rows_is_made_zero_shot(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copy(finished / "A1/artifacts/sampled_trials.json", tmp_path)
    path = tmp_path / "sampled_trials.json"
    path.chmod(0o644)
    document = json.loads(path.read_text())
    for trial in document["trials"]:
        del trial["query_source_index"]
    path.write_text(json.dumps(document))
    assert main(["zeroshot", "--sampled_trials_path", str(path)]) == 0
    made = read_zero_shot_trials(tmp_path / "sampled_trials_zeroshot.json")
    given = read_zero_shot_trials(finished / "A1/artifacts/sampled_trials_zeroshot.json")
    assert made.prompts == given.prompts
    assert [question.target for question in made.questions] == [question.target for question in given.questions]
    assert {question.query_source_index for question in made.questions} == {None}
