"""Adapters merged by the real peft where it is installed; what is said where it, or the base model, is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import llama
from parity import assert_close
from relfv.errors import InputError
from relfv.language_model import open_model
from relfv.models.sources import model_identity

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def save_adapter(llama_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a LoRA adapter with random weights for the tiny Llama (or another base) as a folder."""
    peft = pytest.importorskip("peft")

    def save(name: str = "adapter", seed: int = 0, base: str | None = None, **changes: Any) -> Path:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model = peft.get_peft_model(llama(**changes), config)
        model.save_pretrained(tmp_path / name)
        return name_base(tmp_path / name, str(llama_path) if base is None else base)

    return save


def name_base(folder: Path, base: str | None) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0, -1]


def test_an_adapter_is_merged_into_its_base_model_and_said_in_the_notes(
    save_adapter: Callable[..., Path], llama_path: Path
) -> None:
    import peft

    folder = save_adapter()
    opened = open_model(str(folder), "llama3", device="cpu")
    unmerged = peft.PeftModel.from_pretrained(llama(), str(folder)).eval()
    assert_close(logits(opened.backbone.model), logits(unmerged))
    assert (
        logits(unmerged) - logits(open_model(str(llama_path), "llama3", device="cpu").backbone.model)
    ).abs().max() > 1
    assert opened.engine.name == "shared_prefix"
    assert opened.arch.notes == (f"the LORA adapter 'adapter' was merged into '{llama_path}'",)


def test_two_adapters_or_two_bases_are_two_models(save_adapter: Callable[..., Path], llama_path: Path) -> None:
    one, two = save_adapter("one"), save_adapter("two", seed=1)
    other_base = shutil.copytree(llama_path, one.parent / "base")
    (other_base / "config.json").write_text((other_base / "config.json").read_text() + "\n")
    seen = [model_identity(str(folder)) for folder in (llama_path, one, two)]
    assert seen[1].endswith("+" + seen[0])
    seen.append(model_identity(str(name_base(one, str(other_base)))))
    assert len(set(seen)) == 4
    assert seen[3].partition("+")[2] == model_identity(str(other_base))


def test_a_base_beside_the_adapter_is_found_and_a_tokenizer_of_its_own_is_used(
    save_adapter: Callable[..., Path], llama_path: Path
) -> None:
    folder = save_adapter(base="../base-beside-the-adapter")
    shutil.copytree(llama_path, folder.parent / "base-beside-the-adapter")
    (folder.parent / "base-beside-the-adapter" / "tokenizer.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_path / name, folder)
    assert open_model(str(folder), "llama3", device="cpu").arch.n_layers == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "/no/such/model"}, "is an adapter for '/no/such/model', which cannot be opened"),
        ({"base": "someone/some-model-that-is-nowhere"}, "write the base model's folder into base_model_name_or_path"),
        ({"base": ""}, "names no base model"),
        ({"num_hidden_layers": 4}, "cannot be merged into"),
        ({"num_hidden_layers": 2}, "cannot be merged into"),
        ({"hidden_size": 64}, "cannot be merged into"),
    ],
)
def test_an_adapter_that_does_not_fit_is_said_in_one_line(
    save_adapter: Callable[..., Path], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_model(str(save_adapter(**change)), "auto", device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_tuning_adapter_has_nothing_to_merge(llama_path: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match="its PROMPT_TUNING adapter cannot be merged"):
        open_model(str(name_base(tmp_path / "prompt", str(llama_path))), "auto", device="cpu")


def test_packed_weights_take_no_adapter(save_adapter: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="cannot be merged into packed weights; use --quant none"):
        open_model(str(save_adapter()), "auto", device="cpu", quant="4bit")


def bare_adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_without_peft_the_remedy_is_said(llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft, which merges it, is not installed; run: pip install 'relfv\[peft\]'"):
        open_model(str(bare_adapter(tmp_path / "adapter", llama_path)), "auto", device="cpu")


def test_a_damaged_adapter_config_is_bad_input(llama_path: Path, tmp_path: Path) -> None:
    folder = bare_adapter(tmp_path / "adapter", llama_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not the config of an adapter"):
        model_identity(str(folder))
