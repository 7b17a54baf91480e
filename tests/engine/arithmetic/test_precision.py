from __future__ import annotations

import pytest
import torch

from conftest import llama
from relfv.engine.arithmetic.precision import mode_of
from relfv.models.architecture import resolve


def test_a_bf16_model_computes_in_float32_and_keeps_its_own_weights() -> None:
    model = llama(300).to(torch.bfloat16)
    arch = resolve(model, "auto")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), mode_of(model, arch, "exact").in_force():
        wide = model.base_model(input_ids=ids)[0]
    assert wide.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])
    with torch.inference_mode():
        assert model.base_model(input_ids=ids)[0].dtype == torch.bfloat16


def test_weights_are_the_models_own_again_after_an_error_in_the_middle_of_a_pass() -> None:
    model = llama(300).to(torch.bfloat16)
    arch = resolve(model, "auto")
    handle = arch.out_projs[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), mode_of(model, arch, "exact").in_force():
        model.base_model(input_ids=torch.tensor([[1, 2, 3]]))
    handle.remove()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_tf32_is_for_fast_alone_and_the_setting_of_the_process_is_left_as_it_was() -> None:
    model = llama(300)
    before = torch.get_float32_matmul_precision()
    for precision, setting in (("exact", "highest"), ("fast", "high")):
        with mode_of(model, resolve(model, "auto"), precision).in_force():
            assert torch.get_float32_matmul_precision() == setting
        assert torch.get_float32_matmul_precision() == before
