from __future__ import annotations

import pytest
import torch
from torch import nn

from relfv.engine.hooks import called_instead, editing_inputs, editing_outputs, turn_of
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


def test_an_edit_of_one_pass_does_nothing_in_anothers_turn() -> None:
    module, one, other = nn.Identity(), object(), object()
    with turn_of(one):
        edits = editing_inputs([(module, lambda x: x * 10)])
        edits.__enter__()
    with editing_outputs([(module, lambda x: x + 1)]):  # everybody's
        found = []
        for whose in (one, other, None):
            with turn_of(whose):
                found.append(float(module(torch.ones(1))))
    edits.__exit__(None, None, None)
    assert found == [11, 2, 2]


def test_a_function_called_instead_of_a_module_is_called_without_its_hooks() -> None:
    module = nn.Identity()
    with editing_inputs([(module, lambda x: x * 10)]):
        with called_instead([(module, lambda x: x + 1)]):
            assert module(torch.ones(1)) == 2
            with called_instead([(module, None)]):
                assert module(torch.ones(1)) == 10
        assert module(torch.ones(1)) == 10


def test_an_edit_that_never_ran_is_an_error() -> None:
    called, silent = nn.Identity(), nn.Linear(1, 1)
    with (
        pytest.raises(RunError, match=r"1 of 2 hooks never ran \(Linear\)"),
        editing_inputs([(called, lambda x: x), (silent, lambda x: x)]),
    ):
        called(torch.ones(1))
