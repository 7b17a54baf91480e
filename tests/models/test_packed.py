"""``--quant`` with bitsandbytes itself, which has a CPU back end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import llama
from parity import all_heads, assert_close, assert_same_scores, prompts_of_different_length, replacements
from relfv.engine.reference import ReferenceEngine
from relfv.engine.selfcheck import TOLERANCE
from relfv.engine.shared_prefix import SharedPrefixEngine
from relfv.language_model import LanguageModel, open_model
from relfv.models.packed import is_readable, weight_dtype, weight_of
from relfv.types import Prompts

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import LinearNF4

ROUNDED = {"8bit": 0.02, "4bit": 0.15}
"""How far packed weights are from the stored ones, at most, as a share of their length."""


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model(llama().to(torch.bfloat16))


@pytest.fixture(scope="module", params=ROUNDED)
def packed(folder: Path, request: pytest.FixtureRequest) -> LanguageModel:
    return open_model(str(folder), quant=request.param)


def test_a_packed_model_keeps_the_fast_engine_and_says_how_it_computes(packed: LanguageModel) -> None:
    assert packed.engine.name == "shared_prefix"
    assert packed.check.max_error is not None
    assert packed.check.max_error < TOLERANCE
    assert packed.check.knows_writing
    assert packed.quant in ROUNDED
    assert "packed by bitsandbytes and read in bfloat16" in packed.arch.notes[-1]


def test_both_engines_agree_on_packed_weights_to_the_rounding_of_float32(packed: LanguageModel) -> None:
    """With bitsandbytes' own products they differ by a percent in 8 bit: what shares a batch changes them."""
    ids, targets = prompts_of_different_length()
    backbone = packed.backbone.plain().in_float32()
    values, heads = replacements(backbone, ids), all_heads(backbone)
    fast, plain = (
        engine(backbone).sweep_heads(Prompts(ids, targets), values, heads)
        for engine in (SharedPrefixEngine, ReferenceEngine)
    )
    assert_same_scores(fast.edited, plain.edited)
    assert_same_scores(fast.base, plain.base)
    assert abs(plain.delta("logprob")).max() > 0.1


def test_a_packed_layers_weight_is_read_as_what_it_stands_for(packed: LanguageModel, folder: Path) -> None:
    block = packed.arch.blocks[0]
    stored = open_model(str(folder)).arch.blocks[0].state_dict()
    n_packed = 0
    for name, linear in block.named_modules():
        if is_readable(linear):
            n_packed += 1
            assert linear.weight.dtype in (torch.int8, torch.uint8)
            read, true = weight_of(linear), stored[f"{name}.weight"].float()
            assert (read.dtype, read.shape) == (weight_dtype(linear), true.shape)
            assert 0 < (read.float() - true).norm() < ROUNDED[packed.quant] * true.norm()
    assert n_packed == 7


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (64, 64), (7, 96), (9, 10), (3, 5), (1, 128), (130, 1)])
def test_a_weight_in_4_bit_is_read_block_by_block_whatever_the_width_of_its_rows(
    shape: tuple[int, int], nested: bool
) -> None:
    linear = LinearNF4(shape[1], shape[0], bias=False, compress_statistics=nested)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    linear.load_state_dict({"weight": stored})
    linear.to("cpu")  # which packs it
    assert is_readable(linear)
    state = linear.weight.quant_state
    scales = state.absmax
    if nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = linear.weight.data.flatten().to(torch.int64)
    codes = torch.stack((codes >> 4, codes & 15), -1).flatten()[: stored.numel()]  # two of four bits in each byte
    true = state.code[codes] * scales.repeat_interleave(state.blocksize)[: stored.numel()]
    torch.testing.assert_close(weight_of(linear), true.reshape(shape))
    assert (true.reshape(shape) - stored).norm() < ROUNDED["4bit"] * stored.norm()


def test_a_head_of_a_packed_projection_is_its_slice_of_the_weight(packed: LanguageModel) -> None:
    arch = packed.arch
    z = torch.randn(arch.head_dim, generator=torch.Generator().manual_seed(0))
    part = slice(arch.head_dim, 2 * arch.head_dim)
    true = weight_of(arch.out_projs[1])[:, part].double().cpu() @ z.double()  # type: ignore[arg-type]
    assert_close(arch.project_head(1, 1, z), true)
