from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity import assert_close
from relfv.engine.clean import CleanRun
from relfv.errors import RunError
from relfv.stages.means import mean_activations, read_means
from relfv.types import TokenScores


def test_the_mean_is_over_prompts_whatever_their_order() -> None:
    z = torch.randn(25, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    scores = TokenScores(torch.zeros(25), torch.zeros(25), torch.zeros(25, dtype=torch.long))

    def means(z: torch.Tensor):  # type: ignore[no-untyped-def]
        return mean_activations(CleanRun(z, torch.zeros(3, 48), writing=None, scores=scores))

    found = means(z)
    assert found.n_prompts == 25
    assert found.values.dtype == np.float32
    assert_close(torch.from_numpy(found.values), z.mean(0))
    assert np.array_equal(found.values, means(z.flip(0)).values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "has no float tensor 'clean_mean'"),
        ({"clean_mean": torch.zeros(3, 8)}, "has no float tensor 'clean_mean'"),
        ({"clean_mean": torch.zeros(3, 8, 10, dtype=torch.long)}, "has no float tensor 'clean_mean'"),
        ({"clean_mean": torch.full((3, 8, 10), torch.nan)}, "holds NaN or infinities"),
    ],
)
def test_a_file_without_finite_means_is_named(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RunError, match=rf"x\.pt: .*{words}"):
        read_means(tmp_path / "x.pt")


def test_means_of_other_tools_may_lack_the_number_of_prompts_and_be_of_another_precision(tmp_path: Path) -> None:
    values = torch.randn(3, 8, 10)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.save({"clean_mean": values.to(dtype)}, tmp_path / "x.pt")
        found = read_means(tmp_path / "x.pt")
        assert found.n_prompts == 0
        assert found.values.dtype == np.float32
        assert np.array_equal(found.values, values.to(dtype).float())
