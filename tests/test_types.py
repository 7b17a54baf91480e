from __future__ import annotations

import subprocess
import sys

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
