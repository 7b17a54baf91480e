"""What is wrong with relations, named before a run: files that failed, of each kind one, and a tokenizer that splits
digits off as Llama-3's does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from conftest import make_tokenizer
from relfv.cli import main
from relfv.models.context import Context
from relfv.models.tokens import Tokens
from relfv.relations import load_relations
from relfv.runs.checks import CHECKS, Evidence, Line, check_bos, check_relations
from relfv.settings import Settings

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    digit = pre_tokenizers.Split(Regex("[0-9]"), "isolated")
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\n+|[^\p{L}\n]"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [digit, words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["<bos>", "<eos>"], show_progress=False)
    text = [line for path in sorted(CASES.glob("*.csv")) for line in re.sub("[,;]", " ", path.read_text()).splitlines()]
    raw.train_from_iterator([f" {line}" for line in text] * 3 + ["0123456789"], trainer)
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>"))


def lines_of(csv_path: Path, tokens: Tokens, settings: Settings | None = None, limit: int = 8192) -> dict[str, Line]:
    evidence = [
        Evidence(relation, settings or Settings(), tokens, Context(limit))
        for relation in load_relations(csv_path).values()
    ]
    found = [line for having in ("rows", "tokenizer", "config") for line in check_relations(evidence, having)]
    assert [line.check for line in found] == [
        check.name for having in ("rows", "tokenizer", "config") for check in CHECKS if check.needs == having
    ]
    return {line.check: line for line in found}


@pytest.mark.parametrize(
    ("name", "check", "words", "remedy"),
    [
        ("letters", "white space", "the answer begins with a token of white space alone", "whole answers"),
        ("shared_first_token", "first tokens", "of 25 trials are scored on a token that other answers begin with, too (as '1': 1901, 1902, 1903, 1904, ...)", "--target distinguishing"),  # noqa: E501
        ("two_labels", "corruption", "of 225 corrupted demos keep a right label; with 2 distinct answers the others teach another relation", "--corruption random"),  # noqa: E501
        ("repeated_inputs", "answers of an input", "6 inputs stand there with several answers, as 'light' with dark, heavy", "each counts as such"),  # noqa: E501
        ("several_answers", "answers of a row", "6 rows have an answer such as 'den/earth', which is taken as one", "a row of its own"),  # noqa: E501
    ],
)  # fmt: skip
def test_each_file_that_failed_is_told_what_is_wrong_with_it(
    name: str, check: str, words: str, remedy: str, tokens: Tokens
) -> None:
    line = lines_of(CASES / f"{name}.csv", tokens)[check]
    (said,) = line.by_q_id.values()
    assert (line.level, words in said, words in line.found, remedy in line.remedy) == ("warn", True, True, True), said


def test_a_target_that_tells_answers_apart_is_no_longer_warned_of(tokens: Tokens) -> None:
    found = lines_of(CASES / "shared_first_token.csv", tokens, Settings(target="distinguishing"))
    assert found["first tokens"].level == "pass"


def test_labels_drawn_from_elsewhere_are_no_longer_warned_of(tokens: Tokens, tmp_path: Path) -> None:
    both = tmp_path / "both.csv"
    both.write_text(
        (CASES / "two_labels.csv").read_text() + (CASES / "semicolons.csv").read_text().replace(";", ",")[12:]
    )
    assert lines_of(both, tokens)["corruption"].by_q_id.keys() == {"mood"}
    assert lines_of(both, tokens, Settings(corruption="other"))["corruption"].level == "pass"


def test_a_file_with_another_separator_has_nothing_wrong(tokens: Tokens) -> None:
    levels = {name: line.level for name, line in lines_of(CASES / "semicolons.csv", tokens).items()}
    assert levels.pop("first tokens") == "warn"  # reply0, reply1, ...
    assert set(levels.values()) == {"pass"}


def test_what_a_run_would_skip_or_could_not_read_is_said_of_that_q_id(tokens: Tokens, tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    rows = [f"few,word{i},answer{i}" for i in range(9)] + [f"odd,{a},b{a}" for a in ("<bos>", *"cdefghijkl")]
    path.write_text("\n".join(["id,ex_A,ex_B", *rows]))
    found = lines_of(path, tokens)
    assert found["rows"].by_q_id == {"few": "skipped: 9 rows, fewer than the 10 that 1 query + 9 demos need"}
    assert found["words"].level == "fail"
    assert "'<bos>', a special token" in found["words"].by_q_id["odd"]


def test_prompts_that_do_not_fit_are_said(tokens: Tokens) -> None:
    found = lines_of(CASES / "letters.csv", tokens, limit=20)["length"]
    assert "skipped: prompt and answer have up to" in found.found


def test_so_few_queries_that_nothing_can_be_told_from_noise_are_said(tokens: Tokens) -> None:
    found = lines_of(CASES / "letters.csv", tokens, Settings(n_trials_per_q=5))["queries"]
    assert found.by_q_id == {"letters": "5 distinct queries"} or found.by_q_id["letters"].endswith("distinct queries")
    assert lines_of(CASES / "letters.csv", tokens)["queries"].level == "pass"


def test_a_tokenizer_that_merges_prompt_and_answer_is_said(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    raw.train_from_iterator(["Q: x\nA: puppy\n\n"] * 50, trainer)
    merging = Tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    path = tmp_path / "pairs.csv"
    path.write_text("id,ex_A,ex_B\n" + "".join(f"Q,{'x' * (i + 1)},puppy{'p' * i}\n" for i in range(11)))
    assert "in 25 trials the tokenizer merges" in lines_of(path, merging)["merges"].found


def test_bos_is_once_or_none_or_warned_of() -> None:
    from tokenizers import processors

    assert (check_bos(Tokens(make_tokenizer())).level, check_bos(Tokens(make_tokenizer())).found) == (
        "pass",
        "<bos>, once",
    )
    assert check_bos(Tokens(make_tokenizer(bos=False))).level == "warn"
    twice = make_tokenizer()
    twice.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <bos> $A", special_tokens=[("<bos>", 0)]
    )
    assert check_bos(Tokens(twice)).found == "the tokenizer adds <bos> 2 times"
    as_gpt2 = make_tokenizer(bos=False)
    as_gpt2.eos_token = "<bos>"
    assert check_bos(Tokens(as_gpt2)).level == "pass"


def test_rows_that_cannot_be_read_are_a_line_and_the_run_would_be_refused(
    llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--relation_csv_path", str(CASES / "line_breaks.csv"), "--model", str(llama_path)]
    assert main(["doctor", *given, "--out_root", str(tmp_path / "out"), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (line,) = document["checks"]
    assert (line["check"], line["level"]) == ("relations", "fail")
    assert "contains a line break" in line["found"]
    assert document["refused"]
