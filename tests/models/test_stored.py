"""What a checkpoint is, before it is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import llama
from relfv.errors import InputError
from relfv.models.stored import resolved
from relfv.settings import Settings

LIGHT = """
import sys
from relfv.models.stored import resolved
from relfv.settings import Settings
print(resolved(Settings(model="demo", model_spec="auto")).model_spec)
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""


def of(folder: Path, spec: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    settings = resolved(Settings(model=str(folder), model_spec=spec, dtype=dtype))
    return settings.model_spec, settings.dtype


def configured(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_resolving_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.stdout == "llama3\n[]\n", done.stdout + done.stderr


def test_a_family_is_the_checkpoints_by_whichever_of_its_names(tmp_path: Path) -> None:
    folder = configured(tmp_path, model_type="llama", dtype="float16")
    assert {of(folder, spec) for spec in ("auto", "llama", "llama3")} == {("llama3", "float16")}
    multimodal = configured(tmp_path, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    assert of(multimodal)[0] == of(multimodal, "gemma")[0] == "gemma"


def test_another_family_is_refused_and_the_right_one_named(tmp_path: Path) -> None:
    folder = configured(tmp_path, model_type="gemma3_text")
    with pytest.raises(
        InputError, match=r"'llama3'.*model_type 'gemma3_text'; expected gemma: use --model_spec gemma, or auto"
    ):
        of(folder, "llama3")


def test_a_named_family_is_taken_at_its_word_where_none_is_known(tmp_path: Path) -> None:
    folder = configured(tmp_path, model_type="of_our_own")
    assert of(folder, "llama3")[0] == "llama3"
    assert of(folder)[0] == "auto"


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None}, "float32"),
        ({"dtype": "float64"}, "float32"),
    ],
)
def test_the_dtype_is_what_the_config_says(tmp_path: Path, said: dict[str, Any], dtype: str) -> None:
    folder = configured(tmp_path, model_type="llama", **said)
    assert of(folder)[1] == dtype
    assert of(folder, dtype="float16")[1] == "float16"


def test_without_a_word_in_the_config_the_weights_say(tmp_path: Path) -> None:
    folder = configured(tmp_path, model_type="llama")
    weights = {"a": torch.zeros(3, dtype=torch.int32), "b": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert of(folder)[1] == "bfloat16"
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    assert of(folder)[1] == "float32"


@pytest.mark.parametrize("text", ["[]", "{", "[" * 5000, ""])
def test_a_config_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="cannot open its config"):
        of(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_loaded_is_what_was_resolved(save_model: Callable[..., Path], dtype: str) -> None:
    from relfv.language_model import open_model

    folder = save_model(llama().to(getattr(torch, dtype)))
    config = json.loads((folder / "config.json").read_text())
    for said in (config, {key: value for key, value in config.items() if "dtype" not in key}):
        (folder / "config.json").write_text(json.dumps(said))
        settings = resolved(Settings(model=str(folder), model_spec="auto"))
        assert settings == replace(settings, model_spec="llama3", dtype=dtype)
        assert open_model(str(folder), dtype=settings.dtype).dtype == dtype
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == getattr(torch, dtype)
