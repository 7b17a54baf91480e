from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from relfv.errors import InputError
from relfv.language_model import open_model
from relfv.models.size import check_size, stored_depth


def copy_of(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_a_config_with_more_layers_than_its_weights_is_refused_before_they_are_built(
    llama_path: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama_path, tmp_path / "deep", num_hidden_layers=500)
    with pytest.raises(InputError) as caught:
        open_model(str(folder), device="cpu")
    assert "its config.json says num_hidden_layers 500, and its weights have layers 0 to 2" in str(caught.value)


def test_the_depth_of_weights_in_several_files_is_read_from_their_index(tmp_path: Path) -> None:
    names = {"model.embed_tokens.weight": "a", "model.layers.11.mlp.experts.63.weight": "b"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert stored_depth(tmp_path) == 12
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert stored_depth(tmp_path) is None


def test_a_deep_model_without_names_to_compare_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = type("Config", (), {"num_hidden_layers": 10_000})()
    check_size("deep", str(tmp_path), config, torch.device("cpu"), None)
    assert "deep: its config asks for 10000 layers; building them takes minutes" in caplog.text


def test_weights_larger_than_memory_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = type("Config", (), {"num_hidden_layers": 2, "dtype": torch.bfloat16})()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(0.6 * memory))  # sparse: it takes no disk
    with caplog.at_level(logging.WARNING):
        check_size("large", str(tmp_path), config, torch.device("cpu"), None)
        assert not caplog.records
        check_size("large", str(tmp_path), config, torch.device("cpu"), torch.float32)
    assert "large: its weights take" in caplog.text
