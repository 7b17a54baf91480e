from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from relfv.types import MEASURES, Effects, TokenScores


def scores(logprob: torch.Tensor) -> TokenScores:
    return TokenScores(logit=2 * logprob, logprob=logprob, top_id=torch.zeros_like(logprob, dtype=torch.int64))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_delta_is_each_edited_score_minus_its_prompts_base_in_float64(measure: str) -> None:
    effects = Effects(
        scores(torch.tensor([-1.0, -2.0])), scores(torch.tensor([[-1.5, -1.0, -0.1], [-2.0, -3.0, -9.0]]))
    )
    base, edited = effects.base.measures()[measure], effects.edited.measures()[measure]
    delta = effects.delta(measure)
    assert delta.dtype == np.float64
    assert delta.tolist() == [[e - base[n] for e in edited[n]] for n in range(2)]


def test_types_are_there_without_torch() -> None:
    code = "import sys, relfv.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_prompts_may_have_different_numbers_of_right_tokens_and_token_0_is_one_like_any_other() -> None:
    top = torch.tensor([[0, 7], [0, 5], [0, 3]])
    found = TokenScores(torch.zeros(3, 2), torch.zeros(3, 2), top)
    assert found.correct([[7], [5, 0, 9], [4, 2]]).tolist() == [[0, 1], [1, 1], [0, 0]]
    assert found[:, 0].correct([[0], [5], [4, 0]]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="2 prompts' right tokens for scores of 3 prompts"):
        found.correct([[0], [1]])


def test_effects_to_come_are_waited_for_by_who_first_reads_them_and_once() -> None:
    scores = TokenScores(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    waits: list[int] = []

    def arrived() -> Effects:
        waits.append(1)
        return Effects(base=scores[:, 0], edited=scores[:, 1:], per_pass=5, lengths=torch.ones(2, 1))

    effects = Effects.to_come(5, arrived)
    assert effects.per_pass == 5
    with pytest.raises(AttributeError, match="no 'edit'"):
        _ = effects.edit  # type: ignore[attr-defined]
    assert not waits
    assert replace(effects, edited=scores[:, 2:]).lengths is effects.lengths
    assert effects.delta("p").shape == (2, 2)
    assert len(waits) == 1
    assert Effects(base=scores[:, 0], edited=scores[:, 1:]).lengths is None
