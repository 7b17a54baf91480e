"""Reading a file of frozen trials, relfv's own or another tool's, into typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RunError
from relfv.relations import is_q_id
from relfv.store.formats import read_json
from relfv.types import Question, Snapshot, Target, WordPair

_LARGEST_TOKEN_ID = 2**31 - 1


def read_snapshot(path: Path, *, with_demos: bool) -> Snapshot:
    """Read sampled_trials.json (``with_demos``), or its zero-shot twin.

    Raises InputError if it is missing, RunError, naming the trial and the key, if something in it is not as it should
    be.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a trial snapshot, as StepD or 'relfv zeroshot' write it")
    return snapshot_of(read_json(path), path, with_demos=with_demos)


def snapshot_of(document: Any, path: Path, *, with_demos: bool) -> Snapshot:
    """The snapshot from the content of a file of frozen trials; ``path`` is what errors name."""
    trials = document.get("trials") if isinstance(document, dict) else None
    if not isinstance(trials, list) or not isinstance(document.get("meta"), dict):
        raise RunError(f"{path}: is not a trial snapshot; expected meta and trials as StepD writes them")
    if not trials:
        raise RunError(f"{path}: holds no trials")
    readers = [_Trial(path, number, trial) for number, trial in enumerate(trials)]
    questions = tuple(reader.question() for reader in readers)
    return Snapshot(
        meta=document["meta"],
        questions=questions,
        prompts=tuple(reader.text("corrupted_prompt_str") for reader in readers),
        clean_prompts=tuple(reader.text("clean_prompt_str") for reader in readers) if with_demos else (),
        clusters=_clusters(questions),
    )


def _clusters(questions: Sequence[Question]) -> tuple[int, ...]:
    """The cluster of each question. Rows that have the same input count as one query: a pair that stands in the CSV
    twice is no two observations."""
    first: dict[tuple[str, str], int] = {}
    inputs = [(question.q_id, question.query.input) for question in questions]
    for number, (word, question) in enumerate(zip(inputs, questions, strict=True)):
        row = number if question.query_source_index is None else question.query_source_index
        first[word] = min(first.get(word, row), row)
    return tuple(first[word] for word in inputs)


def target_keys(target: Target, accepted: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
    """The keys on a trial's answer tokens, as both files have them."""
    return {
        "target_first_token_id": target.token_id,
        "answer_ids": list(target.answer_ids),
        "answer_tokenised_with_prompt": target.joint,
        "space_fed": bool(target.space_ids),
        "space_ids": list(target.space_ids),
        "n_answer_tokens_fed": target.n_fed,
        "other_right_answers": [{"answer": answer, "token_id": token_id} for answer, token_id in accepted],
    }


class _Trial:
    """Reader of one trial of a file, key by key."""

    def __init__(self, path: Path, number: int, values: Any) -> None:
        self._path, self._number = path, number
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}

    def question(self) -> Question:
        query = self._values.get("query")
        words = query if isinstance(query, dict) else {}
        pair = WordPair(
            *(self._checked(f"query.{side}", words.get(side), str, "a text") for side in ("input", "output"))
        )
        q_id = self.text("q_id")
        if not is_q_id(q_id):  # file names are made from the q_id
            raise self._wrong("q_id", q_id, "a q_id")
        row = self._values.get("query_source_index")
        return Question(
            q_id=q_id,
            trial_id=self.text("trial_id"),
            trial_idx=self._number_of("trial_idx"),
            query=pair,
            query_source_index=None if row is None else self._number_of("query_source_index"),
            answer=self.text("target_str"),
            target=self._target(),
            accepted=tuple(map(self._accepted, self._list("other_right_answers", "answers"))),
        )

    def text(self, key: str) -> str:
        return self._checked(key, self._values.get(key), str, "a text")

    def _target(self) -> Target:
        if not self._checked("answer_ids", self._values.get("answer_ids"), list, "a list of token ids"):
            raise self._wrong("answer_ids", [], "at least one token id")
        target = Target(
            answer_ids=self._ids("answer_ids"),
            joint=self._values.get("answer_tokenised_with_prompt", True) is True,
            space_ids=self._ids("space_ids"),
            n_fed=self._number_of("n_answer_tokens_fed") if "n_answer_tokens_fed" in self._values else 0,
        )
        token_id = self._token("target_first_token_id", self._values.get("target_first_token_id"))
        if target.n_fed >= len(target.answer_ids) or target.token_id != token_id:
            raise self._wrong("target_first_token_id", token_id, "the first of answer_ids that is not fed")
        return target

    def _accepted(self, other: Any) -> tuple[str, int | None]:
        values = self._checked("other_right_answers", other, dict, "answers with their tokens")
        answer = self._checked("other_right_answers", values.get("answer"), str, "a text for each answer")
        token_id = values.get("token_id")
        return answer, None if token_id is None else self._token("other_right_answers", token_id)

    def _ids(self, key: str) -> tuple[int, ...]:
        return tuple(self._token(key, one) for one in self._list(key, "token ids"))

    def _list(self, key: str, of: str) -> list[Any]:
        """The list at ``key``; empty where the key is missing, as in the snapshots of other tools."""
        return self._checked(key, self._values.get(key, []), list, f"a list of {of}")

    def _number_of(self, key: str) -> int:
        number = self._checked(key, self._values.get(key), int, "a whole number of at least 0")
        if number < 0:
            raise self._wrong(key, number, "a whole number of at least 0")
        return number

    def _token(self, key: str, value: Any) -> int:
        token = self._checked(key, value, int, "a token id")
        if not 0 <= token <= _LARGEST_TOKEN_ID:
            raise self._wrong(key, token, "a token id")
        return token

    def _checked(self, key: str, value: Any, kind: type, expected: str) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._wrong(key, value, expected)
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> RunError:
        return RunError(
            f"{self._path}: trial {self._number}: {key} is {str(value)[:60]!r}; expected {expected}, as StepD writes "
            "it; run that stage again, or put the file back"
        )
