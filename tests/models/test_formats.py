"""Checkpoints that come packed, made with the package that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import llama
from relfv.cli import main
from relfv.language_model import open_model

compressed_tensors = pytest.importorskip("compressed_tensors", exc_type=ImportError)


def compress(folder: Path, form: str, **weights: object) -> dict[str, torch.Tensor]:
    """Pack the model in ``folder`` as ``compressed_tensors`` does -> the weights it stands for then."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle import fake_quantize

    model = llama().to(torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **weights))  # type: ignore[arg-type]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=form,
        quantization_status="compressed",  # type: ignore[arg-type]
    )
    apply_quantization_config(model, config)
    stands_for = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            args = module.quantization_scheme.weights
            groups = module.weight.data.unflatten(1, (-1, args.group_size or module.weight.shape[1]))
            top = 448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 0.5
            module.weight_scale.data = (groups.abs().amax(-1) / top).to(module.weight_scale.dtype)
            zero = getattr(module, "weight_zero_point", None)
            stands_for[name] = fake_quantize(module.weight.data, module.weight_scale, zero, args)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return stands_for


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "type": "int"}),
        ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
    ],
)
def test_a_packed_checkpoint_is_unpacked_and_keeps_the_fast_engine(
    form: str, weights: dict[str, object], save_model: Callable[..., Path]
) -> None:
    folder = save_model(llama())
    stands_for = compress(folder, form, **weights)
    model = open_model(str(folder), device="cpu", offload="cpu" if form == "pack-quantized" else "auto")
    assert model.engine.name == "shared_prefix"
    assert model.check.max_error is not None
    assert model.check.max_error < 1e-3
    assert model.arch.notes[-1].startswith(
        "weights are stored packed (compressed-tensors) and were unpacked to bfloat16"
    )
    found = dict(model.backbone.model.named_modules())
    assert len(stands_for) == 21
    for name, true in stands_for.items():
        assert (found[name].weight.float() - true.float()).abs().max() <= 2**-8 * true.float().abs().max()


def test_doctors_size_is_that_of_the_unpacked_weights(
    csv_path: Path, save_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(llama())
    compress(folder, "float-quantized", num_bits=8, strategy="channel", type="float")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (
        main(
            [
                "run",
                "--model",
                str(folder),
                "--relation_csv_path",
                str(csv_path),
                "--out_root",
                str(tmp_path / "out"),
                "--dry_run",
            ]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "in bfloat16; stored as compressed-tensors and unpacked on opening" in said
