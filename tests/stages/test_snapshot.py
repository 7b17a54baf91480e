from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relfv.errors import InputError, RunError
from relfv.stages.trials import read_trials
from relfv.stages.zeroshot import read_zero_shot_trials


def test_rows_with_the_same_input_are_one_query(finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "A1/artifacts/sampled_trials.json").read_text())
    rows = [trial["query_source_index"] for trial in document["trials"]]
    other = next(i for i, row in enumerate(rows) if row != rows[0])
    document["trials"][other]["query"]["input"] = document["trials"][0]["query"]["input"]
    (tmp_path / "trials.json").write_text(json.dumps(document))
    before, after = read_trials(finished / "A1/artifacts/sampled_trials.json"), read_trials(tmp_path / "trials.json")
    assert list(before.clusters) == rows
    assert after.clusters[other] == after.clusters[0] == min(rows[0], rows[other])
    document["trials"][other]["q_id"] = "B2"  # a query of its own, in snapshots of several q_ids
    (tmp_path / "two.json").write_text(json.dumps(document))
    apart = read_trials(tmp_path / "two.json").clusters
    assert (apart[0], apart[other]) == (rows[0], rows[other])
    part, trial = after.only([other]), document["trials"][other]
    assert part.clusters == (after.clusters[0],)
    (question,) = part.questions
    assert vars(question.query) == trial["query"]
    assert (question.trial_id, question.answer) == (trial["trial_id"], trial["target_str"])
    assert question.target.token_id == trial["target_first_token_id"]
    assert part.prompts == (trial["corrupted_prompt_str"],)
    assert part.clean_prompts == (trial["clean_prompt_str"],)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("answer_ids", "x", "answer_ids is 'x'; expected a list of token ids"),
        ("answer_ids", [], "answer_ids is '[]'; expected at least one token id"),
        ("answer_ids", [5, -1], "answer_ids is '-1'; expected a token id"),
        ("space_ids", 3, "space_ids is '3'; expected a list of token ids"),
        ("n_answer_tokens_fed", "1", "n_answer_tokens_fed is '1'; expected a whole number of at least 0"),
        ("target_first_token_id", 0, "target_first_token_id is '0'; expected the first of answer_ids that is not fed"),
        ("other_right_answers", [5], "other_right_answers is '5'; expected answers with their tokens"),
        ("other_right_answers", [{"answer": "x", "token_id": -2}], "other_right_answers is '-2'; expected a token id"),
        ("target_first_token_id", True, "target_first_token_id is 'True'; expected a token id"),
        ("target_first_token_id", 1 << 31, "target_first_token_id is '2147483648'; expected a token id"),
        ("target_str", None, "target_str is 'None'; expected a text"),
        ("query", {"input": 5}, "query.input is '5'; expected a text"),
        ("trial_idx", -1, "trial_idx is '-1'; expected a whole number of at least 0"),
        ("q_id", "../x", "q_id is '../x'; expected a q_id"),
        ("corrupted_prompt_str", 7, "corrupted_prompt_str is '7'; expected a text"),
        ("clean_prompt_str", 7, "clean_prompt_str is '7'; expected a text"),
    ],
)
def test_what_is_wrong_with_a_trial_is_named_with_its_number_and_key(
    finished: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    document = json.loads((finished / "A1/artifacts/sampled_trials.json").read_text())
    document["trials"][3][key] = value
    path = tmp_path / "trials.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RunError) as caught:
        read_trials(path)
    said = f"{path}: trial 3: {words}, as StepD writes it; run that stage again, or put the file back"
    assert str(caught.value) == said
    if key == "clean_prompt_str":  # the zero-shot twin has none
        assert read_zero_shot_trials(path).clean_prompts == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; expected a trial snapshot"),
        ("[]", "is not a trial snapshot; expected meta and trials"),
        ('{"meta": {}, "trials": {}}', "is not a trial snapshot; expected meta and trials"),
        ('{"trials": [{}]}', "is not a trial snapshot; expected meta and trials"),
        ('{"meta": {}, "trials": []}', "holds no trials"),
        ('{"meta": {}, "trials": [7]}', "trial 0: query.input is 'None'; expected a text"),
    ],
)
def test_what_is_no_snapshot_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "trials.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError if content is None else RunError) as caught:
        read_trials(path)
    assert str(caught.value).startswith(f"{path}: {words}")
