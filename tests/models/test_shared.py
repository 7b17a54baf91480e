"""Memory for weights that several processes have in common."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from relfv.models import shared


@pytest.fixture
def sharing() -> int:
    file = shared.new_file()
    if file is None:
        pytest.skip("needs Linux")
    shared.share(file)
    yield file
    shared.share(None)
    os.close(file)


def test_a_layer_is_filled_once_and_again_if_whoever_filled_it_died(sharing: int) -> None:
    sizes, filled = [5000, 3, 7000], list[int]()

    def filling(value: int) -> None:
        def fill(buffer: torch.Tensor) -> None:
            buffer.fill_(value)
            filled.append(value)
            if value == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        found = of_layer(2, fill)
        assert found.shape == (7000,)
        assert (found == 2).all()

    of_layer = shared.shared_layers(sizes)
    assert of_layer
    if (child := os.fork()) == 0:
        filling(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    filling(2)
    if (child := os.fork()) == 0:
        try:
            filling(3)
        finally:
            os._exit(len(filled) - 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.bytes_shared() >= 7000


def test_what_is_shared_already_counts_as_free_for_what_is_to_be_shared(sharing: int) -> None:
    from relfv.models.memory import available_bytes, take_at_most

    of_layer = shared.shared_layers([64 << 20])
    assert of_layer
    of_layer(0, lambda buffer: buffer.fill_(1))
    take_at_most(1000)
    try:
        assert available_bytes() == 1000
        assert available_bytes(to_share=True) >= 64 << 20
    finally:
        take_at_most(None)
