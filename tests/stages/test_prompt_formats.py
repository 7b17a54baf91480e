from __future__ import annotations

import json
from pathlib import Path

import pytest

from relfv.errors import InputError
from relfv.requests import with_requests_of, without_requests
from relfv.settings import Settings
from relfv.stages.prompt_formats import formats_of, names_of, resolved_formats
from relfv.stages.prompts import SPEC_FORMAT, PromptFormat
from relfv.types import WordPair

DEMOS = [WordPair("dog", "puppy"), WordPair("a {output}", "b")]


def test_prompts_are_the_templates_with_the_words_and_end_before_the_answers_space() -> None:
    assert SPEC_FORMAT.clean(DEMOS, "cat") == "Q: dog\nA: puppy\n\nQ: a {output}\nA: b\n\nQ: cat\nA:"
    assert SPEC_FORMAT.zero_shot("cat") == "Q: cat\nA: "
    arrow = PromptFormat("arrow", "{input} -> {output}")
    assert arrow.clean(DEMOS, "cat") == "dog -> puppy\na {output} -> b\ncat ->"
    sentence = PromptFormat("s", "The young of a {input} is a {output}.", " ", "Animals. ")
    assert sentence.corrupted(DEMOS[:1], "cat") == "Animals. The young of a dog is a puppy. The young of a cat is a"
    assert sentence.zero_shot("cat") == "The young of a cat is a "
    told = PromptFormat("told", "{input}: {output}", introduction="Name the young.\n", demos=False)
    assert (told.clean(DEMOS, "cat"), told.corrupted(DEMOS, "cat")) == ("Name the young.\ncat:", "cat:")


def test_names_and_files_become_one_definition_that_needs_no_file_any_more(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"Q1": {"young": "The young of a {input} is a {output}."}}))
    resolved = resolved_formats(f"instruction, {path}")
    assert resolved_formats(resolved) == resolved
    assert names_of(resolved, "Q1") == ["spec", "instruction", "young"]
    assert names_of(resolved, "Q2") == ["spec", "instruction"]
    found, left_out = formats_of(resolved, "Q1", "animal -> its young")
    assert found[1].introduction == "Relation: animal -> its young\n\n"
    assert not left_out
    assert [*formats_of(resolved, "Q2", "")[1]] == ["instruction"]
    both = with_requests_of(Settings(formats=resolved), Settings(formats=resolved_formats("arrow")))
    assert names_of(both.formats, "Q1") == ["spec", "arrow", "instruction", "young"]
    assert resolved_formats("") == without_requests(both).formats == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"Q1": "x"}', "expected {"),
        ('{"Q1": {"spec": "{input}: {output}"}}', "other than 'spec'"),
        ('{"Q1": {"a.b": "{input}: {output}"}}', "expected a name of letters"),
        ('{"Q1": {"a": "{input}:{output}"}}', "expected one space before {output}"),
        ('{"Q1": {"a": "{input}:\\n{output}"}}', "expected one space before {output}"),
        ('{"Q1": {"a": "{output} of {input}"}}', "expected {input} once, and after it {output} once"),
        ('{"Q1": {"a": {"prompt": "{input}: {output}", "demos": 0}}}', "expected true or false"),
        ('{"Q1": {"a": {"prompt": "{input}: {output}", "demos": false}}}', "expected an introduction"),
        ('{"Q1": {"a": {"prompt": "{input}: {output}", "intro": ""}}}', "or an object of some of prompt"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        resolved_formats(str(path))
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="expected one of arrow, colon, instruction, or a JSON file"):
        resolved_formats("arow")
