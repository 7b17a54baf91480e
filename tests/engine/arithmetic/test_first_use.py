"""First calls on a card, made while weights are read."""

from __future__ import annotations

import threading

import pytest
import torch

from relfv.engine.arithmetic import first_used


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])  # which most machines with these tests have not: that is no error
def test_no_thread_is_left_and_errors_pass_through(device: str) -> None:
    before, seed = threading.active_count(), torch.initial_seed()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), first_used(torch.device(device)):
        _ = 1 // 0
    assert (threading.active_count(), torch.initial_seed()) == (before, seed)
    assert torch.equal(torch.get_rng_state(), state)
