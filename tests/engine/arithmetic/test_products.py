"""Products in bf16 pieces against float64, on the CPU, where the same pieces go through float32 products."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from relfv.engine.arithmetic import leaving_out_padding, replaced
from relfv.engine.arithmetic.products import FLOAT32, Differences, Pieces, Whole, split


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bf16_layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias).to(torch.bfloat16)


def in_float64(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


def copies(size: float) -> torch.Tensor:
    """(3 prompts, 11 copies, 96): copy 0, and others that differ from it by about ``size`` of it."""
    base = random(3, 1, 96)
    changes = size * random(3, 11, 96, seed=1)
    changes[:, 0] = 0
    return base + changes


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def test_three_pieces_are_the_float32_number_itself() -> None:
    x = random(5, 96) * torch.logspace(-6, 6, 96)
    assert torch.equal(split(x, 3).view(3, 5, 96).float().sum(0), x)
    assert not torch.equal(split(x, 2).view(2, 5, 96).float().sum(0), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("pieces", "error"), [(1, 3e-3), (2, 1e-5), (3, 3e-7)])
def test_whole_products_are_as_exact_as_their_pieces(pieces: int, error: float, bias: bool) -> None:
    layer, x = bf16_layer(bias), random(2, 7, 96)
    with torch.inference_mode():
        found = Whole(pieces).forward(layer)(x)
    assert found.shape == (2, 7, 40)
    assert relative_error(found, in_float64(layer, x)) < error


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_difference_is_rounded_relative_to_itself_and_not_to_what_it_differs_from(size: float, bias: bool) -> None:
    layer, x = bf16_layer(bias), copies(size)
    true = in_float64(layer, x)
    with torch.inference_mode():
        found = Differences(Pieces()).forward(layer)(x)
        in_float32 = Differences(FLOAT32).forward(layer)(x)
        rounded = layer(x.bfloat16())
    assert relative_error(found[:, 0], true[:, 0]) < 3e-7
    true_change = true[:, 1:] - true[:, :1]
    assert relative_error(found[:, 1:] - found[:, :1], true_change) < 4e-3
    assert relative_error(in_float32[:, 1:] - in_float32[:, :1], true_change) < 3e-7 / size
    if size < 1:
        assert relative_error(rounded[:, 1:] - rounded[:, :1], true_change) > 0.1


def test_a_copy_that_is_the_base_comes_out_as_the_base() -> None:
    layer, x = bf16_layer(), copies(0.1)
    x[:, 4] = x[:, 0]
    with torch.inference_mode():
        found = Differences(Pieces()).forward(layer)(x)
    assert torch.equal(found[:, 4], found[:, 0])
    assert not torch.equal(found[:, 5], found[:, 0])


def test_inputs_that_are_no_copies_go_through_whole() -> None:
    layer, x = bf16_layer(), random(9, 96)
    with torch.inference_mode():
        found = Differences(Pieces()).forward(layer)(x)
    assert found.shape == (9, 40)
    assert relative_error(found, in_float64(layer, x)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_padding_is_not_multiplied(bias: bool) -> None:
    layer, x, places = bf16_layer(bias), random(2, 7, 96), torch.tensor([0, 1, 2, 7, 8, 9, 10])
    x[0, 3:] = torch.nan
    with torch.inference_mode(), leaving_out_padding((2, 7), places):
        found = Whole(3).forward(layer)(x)
        copies = Whole(3).forward(layer)(x[:, :3])
    assert relative_error(found.flatten(0, 1)[places], in_float64(layer, x.flatten(0, 1)[places])) < 3e-7
    assert found[0, 3:].count_nonzero() == found[1, 4:].count_nonzero() == 0
    assert copies[1, 2].count_nonzero() == 40


def test_layers_that_share_an_input_and_layers_that_do_not() -> None:
    one, two = bf16_layer(), nn.Linear(96, 40, bias=False).to(torch.bfloat16)
    differences = Differences(FLOAT32)
    x, y = copies(0.1), copies(0.2)
    with torch.inference_mode():
        for layer, given in ((one, x), (two, x), (two, y), (one, y)):
            assert relative_error(differences.forward(layer)(given), in_float64(layer, given)) < 1e-6


def test_a_pass_leaves_nothing_behind_without_the_cycle_collector() -> None:
    layer, x = bf16_layer(), copies(0.1)
    gone = []
    weakref.finalize(x, gone.append, True)
    gc.disable()
    try:
        with torch.inference_mode(), replaced([(layer, Differences(Pieces()).forward(layer))]):
            layer(x)
        del x
        assert gone
    finally:
        gc.enable()


def test_a_replaced_forward_keeps_hooks_and_is_undone_after_an_error() -> None:
    layer = nn.Linear(4, 4)
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = random(1, 4)
    with replaced([(layer, lambda given: given * 2)]):
        assert torch.equal(layer(x), x * 2)
    with pytest.raises(ZeroDivisionError), replaced([(layer, lambda _: 1 / 0)]):
        layer(x)
    assert len(seen) == 2
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_models_are_judged_by_sums_like_float32_however_wide_a_layer_is(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = random(2, 16, 28_700).to(device)
    layer = nn.Linear(28_700, 16, bias=False).to(device, torch.bfloat16)
    with torch.inference_mode():
        whole = Whole(FLOAT32.whole, FLOAT32.depth).forward(layer)(x)
        copies = Differences(FLOAT32).forward(layer)(x)
        true = in_float64(layer, x)
    assert relative_error(whole, true) < 3e-6
    assert relative_error(copies, true) < 3e-6
