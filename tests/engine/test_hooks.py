from __future__ import annotations

import pytest
import torch
from torch import nn

from relfv.engine.hooks import editing_inputs, editing_outputs
from relfv.errors import RunError


class Tupled(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden_states + 1, "kept"


def test_an_input_is_edited_whether_it_comes_by_position_or_by_name() -> None:
    module = Tupled()
    with editing_inputs([(module, lambda x: x * 10)]):
        assert module(torch.ones(1))[0] == 11
        assert module(hidden_states=torch.ones(1))[0] == 11


def test_an_output_is_edited_in_a_tuple_and_alone() -> None:
    tupled, plain = Tupled(), nn.Identity()
    with editing_outputs([(tupled, lambda x: x * 10), (plain, lambda x: x * 10)]):
        assert tupled(torch.ones(1)) == (torch.tensor([20.0]), "kept")
        assert plain(torch.ones(1)) == 10


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    module = nn.Identity()
    with pytest.raises(ValueError, match="boom"), editing_outputs([(module, lambda x: x * 10)]):
        raise ValueError("boom")
    assert module(torch.ones(1)) == 1


def test_an_edit_that_never_ran_is_an_error() -> None:
    called, silent = nn.Identity(), nn.Linear(1, 1)
    with (
        pytest.raises(RunError, match=r"1 of 2 hooks never ran \(Linear\)"),
        editing_inputs([(called, lambda x: x), (silent, lambda x: x)]),
    ):
        called(torch.ones(1))
